"""The network against the paper's numbers and the released implementation's outputs."""

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from torch.utils.flop_counter import FlopCounterMode

from model.autoencoder import IdentityAutoencoder
from model.dit import DiT, DiTConfig
from model.flops import multiply_adds, num_parameters, training_multiply_adds

SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16)}
# Paper, Table 4 (model, patch size, Gflops as printed, parameters in millions).
PAPER = [
    ("S", 8, 0.36, 33.1),
    ("S", 4, 1.41, 32.9),
    ("S", 2, 6.06, 33.0),
    ("B", 8, 1.42, 130.9),
    ("B", 4, 5.56, 130.5),
    ("B", 2, 23.01, 130.5),
    ("L", 8, 5.01, 458.6),
    ("L", 4, 19.70, 458.1),
    ("L", 2, 80.71, 458.1),
    ("XL", 8, 7.39, 675.7),
    ("XL", 4, 29.05, 675.1),
    ("XL", 2, 118.64, 675.1),
]
# Names of the released weights -> ours.
RENAMED = [
    ("x_embedder.proj", "patch_embedding"),
    ("t_embedder.mlp.0", "timestep_embedding.input"),
    ("t_embedder.mlp.2", "timestep_embedding.output"),
    ("y_embedder.embedding_table", "label_embedding"),
    ("attn.qkv", "attention.qkv"),
    ("attn.proj", "attention.projection"),
    ("mlp.fc1", "mlp.hidden"),
    ("mlp.fc2", "mlp.output"),
    ("adaLN_modulation.1", "modulation"),
    ("final_layer.linear", "final_layer.decoder"),
]


def tiny(**changes: int) -> DiT:
    return DiT(
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


def golden_model() -> tuple[DiT, dict[str, torch.Tensor]]:
    """The released implementation's tiny network, and everything it computed."""
    with np.load(GOLDEN / "official_tiny_p2.npz", allow_pickle=False) as stored:
        golden = {name: torch.from_numpy(stored[name]) for name in stored.files}
    weights = {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}
    del weights["pos_embed"]
    weights["x_embedder.proj.weight"] = weights["x_embedder.proj.weight"].flatten(1)
    for theirs, ours in RENAMED:
        weights = {name.replace(theirs, ours): value for name, value in weights.items()}
    model = tiny()
    model.load_state_dict(weights)
    return model, golden


def test_forward_equals_the_released_implementation() -> None:
    model, golden = golden_model()
    output = model(golden["forward/x"], golden["forward/t"], golden["forward/y"])
    scale = golden["forward/out"].abs().max()
    assert (output - golden["forward/out"]).abs().max() / scale < 1e-5


def test_position_embedding_equals_the_released_one() -> None:
    model, golden = golden_model()
    torch.testing.assert_close(model.position_embedding, golden["weights/pos_embed"][0], rtol=0, atol=1e-6)


def test_untrained_output_is_exactly_zero() -> None:
    output = tiny()(torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.tensor([0, 9, 10]))
    assert output.shape == (3, 8, 8, 8)
    assert (output == 0).all()


def test_untrained_block_is_the_identity() -> None:
    tokens, condition = torch.randn(2, 16, 48), torch.randn(2, 2, 48)
    assert torch.equal(tiny().blocks[0](tokens, condition), tokens)


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
    size: str, patch_size: int, gflops: float, params_millions: float
) -> None:
    depth, width, num_heads = SIZES[size]
    config = DiTConfig(32, 4, patch_size, width, depth, num_heads, 1000)
    assert multiply_adds(config) / 1e9 == pytest.approx(gflops, rel=0.006)
    assert num_parameters(config) / 1e6 == pytest.approx(params_millions, rel=0.006)


def test_multiply_adds_equal_a_counted_forward_pass() -> None:
    model = tiny()
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.tensor([1]))
    assert counter.get_total_flops() == 2 * multiply_adds(model.config)


def test_training_compute_is_three_forward_passes_an_image() -> None:
    config = tiny().config
    assert training_multiply_adds(config, 100) == 300 * multiply_adds(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 3}, "model.patch_size 3 does not divide the latent size 8"),
        ({"num_heads": 5}, "model.num_heads 5 does not divide model.width 48"),
        ({"depth": 0}, "model.depth is 0"),
        ({"width": 6, "num_heads": 1}, "multiple of 4, but the width is 6"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_numbers(changes: dict[str, int], words: str) -> None:
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
