"""The network has the paper's numbers and gives the released implementation's outputs."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from model.attention import QKNormSelfAttention
from model.autoencoder import IdentityAutoencoder
from model.blocks import (
    AdaLNBlock,
    AdaLNUnshiftedBlock,
    AdaLNZeroBlock,
    AdaLNZeroCrossBlock,
    AdaLNZeroSharedBlock,
    AdaLNZeroSharedCrossBlock,
    AdaLNZeroUnshiftedBlock,
    Block,
    CrossAttentionBlock,
    InContextBlock,
)
from model.dit import DiT, DiTConfig
from model.embeddings import Embedded
from model.flops import multiply_adds, num_parameters, training_multiply_adds, weightless
from model.memory import saved_bytes
from model.network import checkpoint_units
from model.released import from_reference

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Paper, table 4: model, patch size, Gflops, parameters in millions (some rounded, some cut off).
PAPER = [
    ("S", 8, 0.36, 33),
    ("S", 4, 1.41, 33),
    ("S", 2, 6.06, 33),
    ("B", 8, 1.42, 131),
    ("B", 4, 5.56, 130),
    ("B", 2, 23.01, 130),
    ("L", 8, 5.01, 459),
    ("L", 4, 19.70, 458),
    ("L", 2, 80.71, 458),
    ("XL", 8, 7.39, 676),
    ("XL", 4, 29.05, 675),
    ("XL", 2, 118.64, 675),
]
BLOCKS = [
    InContextBlock,
    CrossAttentionBlock,
    AdaLNBlock,
    AdaLNZeroBlock,
    AdaLNZeroUnshiftedBlock,
    AdaLNZeroSharedBlock,
    AdaLNUnshiftedBlock,
    AdaLNZeroCrossBlock,
    AdaLNZeroSharedCrossBlock,
]


def tiny(**changes: Any) -> DiT:
    return DiT(
        DiTConfig(
            **{
                "latent_size": 8,
                "channels": 4,
                "patch_size": 2,
                "width": 48,
                "depth": 2,
                "num_heads": 4,
                "num_classes": 10,
                **changes,
            }
        )
    )


def golden_model() -> tuple[DiT, dict[str, torch.Tensor]]:
    """Return the released implementation's tiny network, and everything that it computed."""
    with np.load(GOLDEN / "official_tiny_p2.npz", allow_pickle=False) as stored:
        golden = {name: torch.from_numpy(stored[name]) for name in stored.files}
    weights = {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}
    model = from_reference(weights, num_heads=4)
    return model, golden


def test_forward_equals_the_released_implementation() -> None:
    model, golden = golden_model()
    output = model(*forward_inputs(golden))
    scale = golden["forward/out"].abs().max()
    assert (output - golden["forward/out"]).abs().max() / scale < 1e-5


def test_position_embedding_equals_the_released_one() -> None:
    model, golden = golden_model()
    torch.testing.assert_close(model.position_embedding, golden["weights/pos_embed"][0], rtol=0, atol=1e-6)


def trained(block: Any, seed: int = 0) -> DiT:
    """Return a network whose zero-initialized parts are random, so that every part affects the output."""
    model, generator = tiny(block=block), torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def forward_inputs(golden: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    return golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"]}


def inputs() -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    x_t = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return x_t, torch.tensor([0, 500, 999]), {"label": torch.tensor([0, 9, 10])}


@pytest.mark.parametrize("block", BLOCKS)
def test_untrained_output_is_exactly_zero(block: type[Block]) -> None:
    output = tiny(block=block)(*inputs())
    assert output.shape == (3, 8, 8, 8)
    assert (output == 0).all()


def test_untrained_blocks_with_gates_are_the_identity_and_no_others_are() -> None:
    tokens, condition = torch.randn(2, 16, 48), torch.randn(2, 2, 48)
    embedded = Embedded(condition.sum(dim=1), condition, None, modulation=torch.zeros(2, 6 * 48))
    for block in BLOCKS:
        same = torch.equal(tiny(block=block).blocks[0](tokens, embedded), tokens)
        assert same == issubclass(block, AdaLNZeroBlock)  # whose gates are zero


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_sees_timestep_and_label(block: type[Block]) -> None:
    model, (x_t, t, condition) = trained(block), inputs()
    output = model(x_t, t, condition)
    assert (model(x_t, t + 1, condition) - output).abs().max() > 1e-4
    assert (model(x_t, t, {"label": (condition["label"] + 1) % 10}) - output).abs().max() > 1e-4


@pytest.mark.parametrize("block", [*BLOCKS, partial(AdaLNZeroBlock, attention=QKNormSelfAttention)])
def test_images_of_a_batch_do_not_touch_each_other(block: Any) -> None:
    model, (x_t, t, condition), order = trained(block), inputs(), [2, 0, 1]
    shuffled = model(x_t[order], t[order], {"label": condition["label"][order]})
    torch.testing.assert_close(shuffled, model(x_t, t, condition)[order], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_are_finite_and_reach_every_weight_in_bf16(block: type[Block]) -> None:
    model = trained(block)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(*inputs())
    output.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.dtype == torch.float32


@pytest.mark.parametrize("block", BLOCKS)
def test_activation_checkpointing_changes_memory_and_no_number(block: type[Block]) -> None:
    plain, recomputing = trained(block), trained(block)
    checkpoint_units(recomputing, partial(checkpoint, use_reentrant=False))
    assert plain.state_dict().keys() == recomputing.state_dict().keys()
    kept: dict[bool, int] = {}
    for model in (plain, recomputing):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(*inputs()).square().mean()
        kept[model is recomputing] = sum(sizes)
        loss.backward()
    assert kept[True] < kept[False] / 2
    for (name, one), two in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert one.grad is not None
        assert two.grad is not None
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_normalized_queries_and_keys_bound_the_scores() -> None:
    attention = QKNormSelfAttention(16, 2)
    query, key = attention.normalize(1e6 * torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    assert (query @ key.transpose(2, 3)).abs().max() <= 8 + 1e-3


def test_latents_of_another_shape_are_refused() -> None:
    _, t, condition = inputs()
    for shape in ((3, 4, 8, 16), (3, 4, 16, 16), (3, 3, 8, 8)):
        with pytest.raises(ValueError, match=r"but this model was built for \(4, 8, 8\)"):
            tiny()(torch.zeros(shape), t, condition)
    with pytest.raises(ValueError, match="latents are square"):
        tiny(latent_size=(8, 16))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = tiny()
    torch.manual_seed(2)
    second = tiny()
    third = tiny()
    third.initialize(1)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert not torch.equal(first.patch_embedding.weight, third.patch_embedding.weight)


@pytest.mark.parametrize(("size", "patch_size", "gflops", "params_millions"), PAPER)
def test_compute_and_size_equal_the_papers_table(
    size: str, patch_size: int, gflops: float, params_millions: int
) -> None:
    depth, width, num_heads = SIZES[size]
    model = weightless(lambda: DiT(DiTConfig(32, 4, patch_size, width, depth, num_heads, 1000)))
    assert multiply_adds(model) / 1e9 == pytest.approx(gflops, rel=0.006)
    assert num_parameters(model) / 1e6 == pytest.approx(params_millions, rel=0.006)


@pytest.mark.parametrize(
    ("block", "gflops", "params_millions"),
    [
        (InContextBlock, 119.37, 449),
        (CrossAttentionBlock, 137.62, 598),
        (AdaLNBlock, 118.56, 600),
        (AdaLNZeroBlock, 118.64, 675),
    ],
)
def test_compute_and_size_of_the_blocks_equal_the_papers_table(
    block: type[Block], gflops: float, params_millions: int
) -> None:
    model = weightless(lambda: DiT(DiTConfig(32, 4, 2, 1152, 28, 16, 1000, block)))
    assert multiply_adds(model) / 1e9 == pytest.approx(gflops, rel=3e-4)
    assert num_parameters(model) / 1e6 == pytest.approx(params_millions, abs=1)


def test_compute_at_512_pixels_equals_the_papers_text() -> None:
    model = weightless(lambda: DiT(DiTConfig(64, 4, 2, 1152, 28, 16, 1000)))
    assert multiply_adds(model) / 1e9 == pytest.approx(524.6, rel=0.006)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_multiply_adds_equal_a_counted_forward_pass(block: type[Block], patch_size: int) -> None:
    model, math_only = tiny(block=block, patch_size=patch_size), torch.nn.attention.SDPBackend.MATH
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(math_only):
        model(torch.randn(1, 4, 8, 8), torch.tensor([5]), {"label": torch.tensor([1])})
    assert counter.get_total_flops() == 2 * multiply_adds(model)


def test_counts_in_several_threads_leave_the_compiler_working() -> None:
    networks = [tiny() for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        counts = set(threads.map(multiply_adds, networks))
    assert len(counts) == 1
    assert not is_in_torch_dispatch_mode()  # PyTorch compiles nothing where it is


def test_training_compute_is_three_forward_passes_an_image() -> None:
    model = tiny()
    assert training_multiply_adds(model, 100) == 300 * multiply_adds(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 3}, "model.patch_size 3 does not divide the latent size 8"),
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.width 48"),
        ({"depth": 0}, "model.depth is 0"),
        ({"width": 6, "num_heads": 1}, "multiple of 4, but the width is 6"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_numbers(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny(**changes)


def test_identity_autoencoder_gives_back_the_image() -> None:
    autoencoder, images = IdentityAutoencoder(1), torch.rand(2, 1, 8, 8) * 2 - 1
    moments = autoencoder.moments(images)
    assert moments.shape == (2, 2, 8, 8)
    latent = autoencoder.draw(moments, torch.randn(2, 1, 8, 8))
    assert torch.equal(autoencoder.decode(latent), images)
    with pytest.raises(ValueError, match="configured for 1 channels, but the images have 3"):
        autoencoder.moments(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
def test_planned_activation_memory_is_what_a_real_pass_saves(block: type[Block], bf16: bool) -> None:
    model = tiny(block=block)
    saved = []
    for batch_size in (3, 4):
        storages: dict[int, int] = {}
        held = []

        def pack(tensor: torch.Tensor, storages: dict[int, int] = storages, held: list[Any] = held) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        index = torch.zeros(batch_size, dtype=torch.int64)
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            model(torch.randn(batch_size, 4, 8, 8), index, {"label": index})
        saved.append(sum(storages.values()))
    assert saved_bytes(model, bf16).per_image == pytest.approx(saved[1] - saved[0], rel=0.02)
