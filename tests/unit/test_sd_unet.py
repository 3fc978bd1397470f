"""Stable Diffusion's U-Net has the published size, honors masks, and computes what CompVis' program does."""

from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import InProcess
from diffusers.models.attention_processor import Attention
from test_ldm import golden, golden_weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launch.builders.components import build
from launch.command.app import CONF
from model.convert import from_sd, to_sd
from model.family import Facts
from model.flops import multiply_adds, num_parameters, weightless
from model.ldm_weights import LABELS
from model.network import checkpoint_units, compile_each_unit
from model.sd_family import StableDiffusion
from model.sd_unet import SDUNet, SDUNetConfig
from model.starting import take_over
from runtime.sharding import sharding_of

SMALL: dict[str, Any] = {
    "latent_size": 8,
    "channels": 2,
    "num_classes": 0,
    "width": 16,
    "multipliers": (1, 2),
    "layers": 1,
    "attention_at": (2,),
    "head_dim": 8,
    "num_groups": 4,
    "context_dim": 12,
    "context_length": 5,
    "outputs_per_channel": 1,
}
LENGTHS = torch.tensor([2, 5])  # of the captions in a batch
UNET = "model.diffusion_model."
OF_32: dict[str, Any] = {"width": 32, "head_dim": 16, "num_groups": 32}
ATTN2 = "middle_block.1.transformer_blocks.0.attn2.to_k.weight"


def published(**changes: Any) -> SDUNet:
    section = yaml.safe_load((CONF / "model/sd_unet.yaml").read_text())
    del section["defaults"]
    return weightless(lambda: build(section | changes, outputs_per_channel=1))


def random_network(**changes: Any) -> SDUNet:
    """Return a small network with random numbers added to all weights, since a new one predicts zero."""
    network, generator = SDUNet(SDUNetConfig(**(SMALL | changes))), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def inputs(network: SDUNet) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return two noisy latents, their steps, and captions of 2 and 5 tokens."""
    generator, config = torch.Generator().manual_seed(1), network.config
    x_t = torch.randn(2, *network.latent_shape, generator=generator)
    text = torch.randn(2, 5, config.context_dim, generator=generator)
    return x_t, torch.tensor([3, 700]), {"text": text, "text_mask": torch.arange(5) < LENGTHS.unsqueeze(1)}


def counted_by_layers(network: SDUNet) -> int:
    """Count multiply-adds by what each layer is called with: weights for each output, and attention's two products."""
    total = 0

    def count(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        nonlocal total
        if isinstance(layer, Attention):
            tokens, context = given[0], named.get("encoder_hidden_states")
            total += 2 * tokens.shape[1] * (tokens if context is None else context).shape[1] * layer.inner_dim
        else:
            assert isinstance(layer.weight, Tensor)
            total += output.numel() * layer.weight[0].numel()

    for layer in network.modules():
        if isinstance(layer, Attention | nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count, with_kwargs=True)
    network(*network.example_inputs(1))
    return total


def test_the_published_network_has_its_parameters_and_its_multiply_adds() -> None:
    network = published()
    assert num_parameters(network) == 859_520_964
    assert multiply_adds(network) == counted_by_layers(published()) == 401_636_720_640
    assert network.facts() == {"family": "SD", "size": "320 channels, 4 levels", "width": 320, "levels": 4}
    assert network.example_inputs(3)[2]["text"].shape == (3, 77, 768)
    version_2 = published(num_heads=None, head_dim=64, context_dim=1024, linear_projection=True)
    assert num_parameters(version_2) == 865_910_724


def test_a_plan_takes_its_latents_and_its_process(in_process: InProcess) -> None:
    config = yaml.safe_load(in_process("plan", "model=sd_unet", "diffusion/prediction=v", "--cfg", "job"))
    assert [config["model"][name] for name in ("latent_size", "channels", "num_classes")] == [64, 4, 0]
    process = build(config["diffusion"])
    roots = torch.tensor(process.schedule.betas()).sqrt()
    torch.testing.assert_close(roots, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64))
    assert process.outputs_per_channel == 1
    assert process.parameterization.name == "v"
    shown = in_process("plan", "model=sd_unet_digits", "data=digits")
    assert "images with captions of 77 tokens, latents 8x8x1" in shown
    assert shown.splitlines()[-1].split()[0] == "sd_unet_digits-w32"


def test_a_run_without_captions_is_refused(in_process: InProcess, digits: Path) -> None:
    words = ["train", "model=sd_unet_digits", f"data.shards={digits}", "runtime=cpu", "run_dir=run"]
    shown = in_process(*words, "data/condition=none", "sample_every=null", "evaluate_every=null", expect=2)
    assert "but data/condition is not text; set data/condition=text." in shown
    sizes = ["model.context_dim=16", "model.context_length=12"]
    shown = in_process(*words, *sizes, "data/condition=none", "sample_every=null", "evaluate_every=null", expect=2)
    assert "The network SDUNet embeds text, text_mask, but conditions of data/condition have nothing" in shown
    assert "model.num_classes is 0, but the shards have 10" in in_process(*words, expect=2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_classes": 10}, "model.num_classes is 10, but Stable Diffusion's U-Net has 0"),
        ({"context_dim": 0}, "model.context_dim is 0, but it must be a whole number from 1 to 16384"),
        ({"context_length": 0}, "model.context_length is 0, but it must be a whole number from 1 to 4096"),
        ({"context_length": 7.5}, "model.context_length is 7.5, but"),
        ({"latent_size": 9}, "latent size is 9, which is not a multiple of 2"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_numbers(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        SDUNetConfig(**(SMALL | change))


@torch.no_grad()
@pytest.mark.parametrize("linear_projection", [False, True])
def test_what_lies_beyond_the_mask_changes_no_output(linear_projection: bool) -> None:
    network = random_network(linear_projection=linear_projection)
    x_t, t, condition = inputs(network)
    output, padding = network(x_t, t, condition), ~condition["text_mask"]
    for other in (0.0, 1e30, float("inf"), float("nan")):
        changed = condition["text"].masked_fill(padding.unsqueeze(2), other)
        assert torch.equal(network(x_t, t, condition | {"text": changed}), output), other
    short = {name: value[:1, :2] for name, value in condition.items()}
    torch.testing.assert_close(network(x_t[:1], t[:1], short), output[:1], rtol=0, atol=1e-5)
    whole = network(x_t, t, condition | {"text_mask": torch.ones_like(padding)})
    assert (whole[0] - output[0]).abs().max() > 1e-2  # the padding is seen where the mask does not hide it
    torch.testing.assert_close(whole[1], output[1], rtol=0, atol=1e-5)
    half = condition | {"text": condition["text"].half()}
    torch.testing.assert_close(network(x_t, t, half), output, rtol=0, atol=1e-2)


@torch.no_grad()
def test_a_new_network_predicts_zero_and_latents_of_another_shape_are_refused() -> None:
    network = SDUNet(SDUNetConfig(**SMALL))
    x_t, t, condition = inputs(network)
    assert not network(x_t, t, condition).any()
    assert [type(unit).__name__ for unit in network.units()].count("Transformer2DModel") == 4
    with pytest.raises(ValueError, match=r"latent has shape \(2, 16, 16\), but this model was built for \(2, 8, 8\)"):
        network(torch.zeros(2, 2, 16, 16), t, condition)


@torch.no_grad()
def test_weights_of_latent_diffusions_program_compute_its_outputs_and_convert_back_bit_for_bit() -> None:
    """Read the program's network with the embedding of a label as a caption of one token: it is the same network."""
    weights, found = golden_weights(), golden()
    labels = weights.pop(LABELS)
    network = from_sd(weights, head_dim=16)
    assert (network.config.latent_size, network.config.context_dim) == (16, labels.shape[1])
    condition = {"text": labels[found["y"].long()].unsqueeze(1), "text_mask": torch.ones(2, 1, dtype=torch.bool)}
    torch.testing.assert_close(network(found["x"], found["t"], condition), found["out"], rtol=0, atol=1e-5)
    back = to_sd(network)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


VERSIONS = [
    {"num_heads": 8, "head_dim": None, "context_dim": 768, "linear_projection": False},
    {"num_heads": None, "head_dim": 64, "context_dim": 1024, "linear_projection": True},
]


@pytest.mark.parametrize("version", VERSIONS, ids=["1", "2"])
def test_the_shape_of_both_published_versions_is_inferred(version: dict[str, Any]) -> None:
    network = published(**version)
    state = {name.removeprefix(UNET): value for name, value in to_sd(network).items()}
    family = StableDiffusion()
    assert family.recognises(state)
    read = weightless(lambda: family.read(state, Facts()).network)
    assert read.config == network.config


def test_a_file_tells_its_heads_by_its_width_alone() -> None:
    state = {name.removeprefix(UNET): value for name, value in to_sd(random_network(**OF_32)).items()}
    family = StableDiffusion()
    with pytest.raises(ValueError, match=r"width is not that of Stable Diffusion 1 and 2; give foreign.num_heads"):
        family.read(state, Facts())
    assert family.read(state, Facts(head_dim=16, latent_size=8)).network.config == SDUNetConfig(
        **(SMALL | OF_32 | {"context_length": 77})
    )
    like = random_network(**OF_32)
    assert family.read(state, Facts(like=like)).network.config.head_dim == 16


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop(f"{UNET}middle_block.1.norm.bias"), "middle_block.1.norm.bias is missing"),
        (lambda weights: weights.update({f"{UNET}label_emb.0.0.weight": torch.ones(1)}), "label_emb.0.0.weight is unk"),
        (lambda weights: weights.update({f"{UNET}out.0.bias": torch.ones(7)}), r"out.0.bias is \(7,\), not \(32,\)"),
        (lambda weights: weights.pop(f"{UNET}{ATTN2}"), f"{ATTN2} is missing"),
        (
            lambda weights: weights.update({f"{UNET}{ATTN2}": torch.ones(3)}),
            r"to_k.weight is \(3,\), but it must",
        ),
        (
            lambda weights: weights.update({f"{UNET}input_blocks.0.0.weight": torch.ones(32, 9, 3, 3)}),
            "model.outputs_per_channel is 0, but",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(change: Callable[[dict[str, Tensor]], Any], expected: str) -> None:
    weights = to_sd(random_network(**OF_32))
    change(weights)
    with pytest.raises(ValueError, match=f"not a Stable Diffusion U-Net's weights.*{expected}"):
        from_sd(weights, head_dim=16)


def test_a_network_that_the_program_does_not_have_is_not_written_for_it() -> None:
    from test_model import tiny

    with pytest.raises(ValueError, match="has only its own U-Net, but the model is of class DiT"):
        to_sd(tiny())
    with pytest.raises(ValueError, match=r"has 32 groups in each norm, but the model has model.num_groups 4; keep"):
        to_sd(random_network())


def test_a_run_starts_with_weights_of_captions_of_as_many_channels() -> None:
    network = SDUNet(SDUNetConfig(**SMALL))
    take_over(network, random_network(context_length=7), "run")
    assert all(
        torch.equal(ours, theirs)
        for ours, theirs in zip(network.parameters(), random_network().parameters(), strict=True)
    )
    with pytest.raises(ValueError, match=r"init_from run has context_dim 8, but model.context_dim is 12; set it to 8"):
        take_over(network, random_network(context_dim=8), "run")


@pytest.mark.parametrize("version", VERSIONS, ids=["1", "2"])
def test_every_matrix_is_sharded(version: dict[str, Any]) -> None:
    network = published(**version)
    for num_shards in (8, 64):
        found = sharding_of(network, num_shards)
        whole = [name for name, axes in found.items() if len(axes) > 1 and not any(axes)]
        assert whole == []


def test_units_compile_without_breaks_and_equal_ones_share_a_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    network = random_network(multipliers=(1, 1), layers=2, width=8)
    given = inputs(network)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        expected = network(*given)
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True))
        compile_each_unit(network)
        torch.testing.assert_close(network(*given), expected, rtol=1e-5, atol=1e-5)
    assert 1 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(network.units())


def test_recomputation_gives_the_same_gradients_which_reach_every_weight() -> None:
    network, again = random_network(), random_network()
    checkpoint_units(again, partial(checkpoint, use_reentrant=False))
    for one in (network, again):
        one(*inputs(one)).square().mean().backward()
    for (name, ours), theirs in zip(network.named_parameters(), again.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.any(), name
        assert torch.equal(ours.grad, theirs.grad), name
