"""LDM has the published sizes and costs, refuses shapes that do not fit, and computes what CompVis' program does."""

import re
from collections.abc import Callable
from functools import partial, partialmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import InProcess
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launch.builders.components import build
from launch.command.app import CONF
from model.convert import from_ldm, to_ldm
from model.family import Facts
from model.flops import multiply_adds, num_parameters, weightless
from model.ldm import LDM, LDMConfig
from model.ldm_family import LatentDiffusion
from model.ldm_weights import LABELS
from model.network import checkpoint_units, compile_each_unit
from runtime.sharding import SHARDED, Axes, sharding_of

GOLDEN = Path(__file__).parent.parent / "golden/ldm_unet_tiny.npz"
SMALL: dict[str, Any] = {
    "latent_size": 8,
    "channels": 2,
    "num_classes": 3,
    "width": 16,
    "multipliers": (1, 2),
    "layers": 1,
    "attention_at": (2,),
    "head_dim": 8,
    "num_groups": 4,
    "context_dim": 12,
}


def published(name: str) -> LDM:
    section = yaml.safe_load((CONF / f"model/{name}.yaml").read_text())
    del section["defaults"]
    return weightless(lambda: build(section | {"num_classes": 1000}, outputs_per_channel=1))


def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def golden_weights() -> dict[str, Tensor]:
    """Return the state dict of a checkpoint, in float32: 5 classes and the null class, latents of 16x16x4."""
    return {name.removeprefix("weights/"): value.float() for name, value in golden().items() if "weights/" in name}


@pytest.mark.parametrize(
    ("name", "of_unet", "macs", "published_gmacs"),
    [("ldm4", 400_920_579, 104_227_160_064, 104.22), ("ldm8", 394_984_196, 57_038_602_240, 57.04)],
)
def test_published_networks_have_their_parameters_and_multiply_adds(
    name: str, of_unet: int, macs: int, published_gmacs: float
) -> None:
    network = published(name)
    assert sum(value.numel() for value in network.unet.parameters()) == of_unet
    assert num_parameters(network) == of_unet + 1001 * 512
    assert multiply_adds(network) == macs
    assert macs / 1e9 == pytest.approx(published_gmacs, abs=0.01)
    assert network.facts()["family"] == "LDM"


def test_a_plan_takes_an_ldms_own_latents_and_process(in_process: InProcess) -> None:
    shown = in_process("plan", "model=ldm8")
    assert "latents 32x32x4" in shown
    assert shown.splitlines()[-1].split()[:3] == ["ldm8-w256", "57.039", "395.5"]
    for words, variance in (([], "FixedSmall"), (["diffusion/variance=learned_range"], "LearnedRange")):
        config = yaml.safe_load(in_process("plan", "model=ldm4", *words, "--cfg", "job"))
        assert config["diffusion"]["schedule"]["beta_end"] == 0.0195
        assert config["diffusion"]["variance"]["_target_"] == f"diffusion.variances.{variance}Variance"
    config = yaml.safe_load(in_process("plan", "model=ldm4", "diffusion=flow", "--cfg", "job"))
    assert config["diffusion"]["_target_"] == "diffusion.flow.Flow"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"latent_size": 9}, "latent size is 9, which is not a multiple of 2"),
        ({"latent_size": 32, "multipliers": (1, 1, 1, 1, 1, 1, 1)}, "latent size is 32, which is not a multiple of 64"),
        ({"head_dim": 12}, "model.head_dim 12 does not divide the 32 channels"),
        ({"head_dim": None, "num_heads": 3}, "model.num_heads 3 does not divide the 32 channels"),
        ({"num_groups": 3}, "model.num_groups 3 does not divide the 16 channels"),
        ({"context_dim": 0}, "model.context_dim is 0, but it must be a whole number from 1 to 16384"),
        ({"context_dim": 2**20}, "model.context_dim is 1048576, but it must be a whole number from 1 to 16384"),
        ({"context_dim": 1.5}, "model.context_dim is 1.5, but"),
        ({"attention_at": (4,)}, "model.attention_at has 4, but the levels of this network are downsampled by 1, 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_numbers(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        LDMConfig(**(SMALL | change))


def test_latents_of_another_shape_are_refused() -> None:
    network = LDM(LDMConfig(**SMALL))
    _, t, condition = network.example_inputs(2)
    with pytest.raises(ValueError, match=r"latent has shape \(2, 16, 16\), but this model was built for \(2, 8, 8\)"):
        network(torch.zeros(2, 2, 16, 16), t, condition)


@torch.no_grad()
def test_a_new_network_predicts_zero_and_its_units_are_the_residual_blocks_and_transformers() -> None:
    network = LDM(LDMConfig(**SMALL))
    assert not network(torch.randn(2, *network.latent_shape), *network.example_inputs(2)[1:]).any()
    # Down: 2 residual blocks and a transformer; middle: 2 and 1; up: 4 and 2.
    assert [type(unit).__name__ for unit in network.units()].count("ResnetBlock2D") == 8
    assert [type(unit).__name__ for unit in network.units()].count("Transformer2DModel") == 4
    again = LDM(LDMConfig(**SMALL))
    assert all(torch.equal(one, other) for one, other in zip(network.parameters(), again.parameters(), strict=True))


@torch.no_grad()
def test_a_label_changes_the_output_and_an_unconditional_network_takes_none() -> None:
    network = from_ldm(golden_weights())
    x_t, t = golden()["x"], golden()["t"]
    labels = [network(x_t, t, {"label": torch.full((2,), label)}) for label in (0, 4, 5)]
    assert all((one - other).abs().max() > 1e-3 for one, other in pairwise(labels))
    free = LDM(LDMConfig(**(SMALL | {"num_classes": 0})))
    assert free.has_null_class
    assert free.example_inputs(1)[2] == {}
    assert free(torch.zeros(2, *free.latent_shape), torch.tensor([1, 2]), {}).shape == (2, 4, 8, 8)


@torch.no_grad()
def test_weights_of_latent_diffusion_compute_its_outputs_and_convert_back_bit_for_bit() -> None:
    weights, found = golden_weights(), golden()
    network = from_ldm(weights)
    assert (network.config.latent_size, network.config.num_classes, network.config.head_dim) == (16, 5, 16)
    output = network(found["x"], found["t"], {"label": found["y"]})
    torch.testing.assert_close(output, found["out"], rtol=0, atol=1e-5)
    one_head = from_ldm(weights, num_heads=1)
    assert (one_head(found["x"], found["t"], {"label": found["y"]}) - found["out"]).abs().max() > 1e-4
    back = to_ldm(network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize(("rows", "classes"), [(1000, 1000), (1001, 1000), (6, 5), (1, 1)])
def test_the_label_tables_of_both_published_networks_have_1000_classes(rows: int, classes: int) -> None:
    weights = golden_weights()
    weights[LABELS] = weights[LABELS][:1].expand(rows, -1)
    config = from_ldm(weights).config
    assert (config.num_classes, config.null_class) == (classes, rows == classes + 1)
    read = LatentDiffusion().read({name.removeprefix(UNET): v for name, v in weights.items()}, Facts(head_dim=16))
    assert read.network.config == config


def test_a_checkpoint_may_have_other_tensors_and_its_averages_are_not_read() -> None:
    weights = golden_weights()
    others = {"first_stage_model.encoder.conv_in.weight": torch.ones(3), "model_ema.decay": torch.tensor(0.9999)}
    others |= {f"model_ema.{name[6:].replace('.', '')}": torch.zeros_like(value) for name, value in weights.items()}
    network, plain = from_ldm(weights | others), from_ldm(weights)
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in network.state_dict().items())


UNET = "model.diffusion_model."


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda weights: weights.pop("cond_stage_model.embedding.weight"),
            "cond_stage_model.embedding.weight is missing",
        ),
        (
            lambda weights: weights.pop(f"{UNET}middle_block.0.in_layers.0.bias"),
            r"middle_block.0.in_layers.0.bias is mis",
        ),
        (lambda weights: weights.update({f"{UNET}input_blocks.9.0.x": torch.ones(1)}), "input_blocks.9.0.x is unknown"),
        (lambda weights: weights.update({f"{UNET}out.0.bias": torch.ones(7)}), r"out.0.bias is \(7,\), not \(32,\)"),
        (
            lambda weights: weights.update({f"{UNET}out.2.weight": torch.ones(7)}),
            r"out.2.weight is \(7,\), but it must",
        ),
        (lambda weights: weights.update({LABELS: torch.ones(6, 20)}), r"to_k.weight is \(32, 24\), not \(32, 20\)"),
        (lambda weights: weights.update({LABELS: torch.ones(())}), r"embedding.weight is \(\), but it must have 2 dim"),
        (lambda weights: weights.update({f"{UNET}time_embed.0.weight": torch.ones(128, 0)}), "blocks of the way up"),
        (lambda weights: [weights.pop(name) for name in list(weights) if "output" in name], "0 blocks of the way up"),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, Tensor]], Any], expected: str) -> None:
    weights = golden_weights()
    change(weights)
    with pytest.raises(ValueError, match=f"not an LDM's weights.*{expected}"):
        from_ldm(weights)


def test_a_network_that_the_program_does_not_have_is_not_written_for_it() -> None:
    from test_model import tiny

    with pytest.raises(ValueError, match="has only LDM's U-Net, but the model is of class DiT"):
        to_ldm(tiny())
    with pytest.raises(ValueError, match=r"has 32 groups in each norm, but the model has model.num_groups 4; keep"):
        to_ldm(LDM(LDMConfig(**SMALL)))


# The axes of every parameter of an LDM, wherever it is sharded.
OF_AN_LDM: tuple[tuple[str, Axes], ...] = (
    (r"label_embedding\.weight", (None, SHARDED)),
    (r"unet\.time_embedding\.linear_[12]\.weight", (SHARDED, None)),
    (r"unet\..+\.(time_emb_proj|to_[qkv]|to_out\.0|proj|net\.2)\.weight", (SHARDED, None)),
    (r"unet\.(conv_in|.+\.(conv[12]?|conv_shortcut|proj_in|proj_out))\.weight", (SHARDED, None, None, None)),
    (r"unet\.conv_out\.weight", (None, SHARDED, None, None)),  # [c, C, 3, 3]
    (r"unet\.(.+\.)?(norm[123]?|conv_norm_out)\.weight", (None,)),
    (r"unet\..+\.bias", (None,)),
)


@pytest.mark.parametrize("name", ["ldm4", "ldm8"])
def test_every_parameter_is_sharded_by_the_table(name: str) -> None:
    network = published(name)
    for num_shards in (8, 64):
        found = sharding_of(network, num_shards)
        assert found.keys() == dict(network.named_parameters()).keys()
        for parameter, axes in found.items():
            (expected,) = (axes for pattern, axes in OF_AN_LDM if re.fullmatch(pattern, parameter))
            assert axes == expected, parameter


def test_units_compile_without_breaks_and_equal_ones_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    network = LDM(LDMConfig(8, 1, 10, 8, (1, 1), 2, (2,), head_dim=8, num_groups=4, context_dim=8))
    for parameter in network.parameters():  # a new network predicts zero
        parameter.data += 0.1
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([0, 5]), {"label": torch.tensor([1, 10])}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        expected = network(*inputs)
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True))
        compile_each_unit(network)
        torch.testing.assert_close(network(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(network.units())


def test_recomputation_gives_the_same_gradients() -> None:
    network, again = from_ldm(golden_weights()), from_ldm(golden_weights())
    checkpoint_units(again, partial(checkpoint, use_reentrant=False))
    inputs = golden()["x"], golden()["t"], {"label": golden()["y"]}
    for one in (network, again):
        one(*inputs).square().mean().backward()
    for ours, theirs in zip(network.parameters(), again.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
