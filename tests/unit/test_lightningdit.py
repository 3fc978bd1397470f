"""LightningDiT's weights come in and go out bit for bit, and compute what its program computes."""

import functools
from functools import partial

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from test_model import tiny
from torch import Tensor, nn

from model.attention import QKRmsNormSelfAttention, RotarySelfAttention
from model.blocks import AdaLNBlock, AdaLNZeroBlock
from model.convert import from_lightningdit, to_lightningdit
from model.mlp import GeluMlp
from model.norms import rms_norm
from model.released import from_reference, to_reference

CONFIGURATIONS = ("swiglu_rope_rmsnorm", "qknorm", "qknorm_rms_swiglu_rope_noshift")
HEADS = 4


@functools.cache
def golden(configuration: str) -> dict[str, Tensor]:
    """Return the arrays of a tiny network with random weights, by their names (tests/golden/lightningdit_tiny.npz)."""
    with np.load(GOLDEN / "lightningdit_tiny.npz", allow_pickle=False) as arrays:
        prefix = f"{configuration}/"
        return {name.removeprefix(prefix): torch.from_numpy(arrays[name]) for name in arrays if name.startswith(prefix)}


def weights(configuration: str) -> dict[str, Tensor]:
    found = golden(configuration)
    return {name.removeprefix("weights/"): found[name] for name in found if name.startswith("weights/")}


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_network_computes_what_lightningdits_program_computes(configuration: str) -> None:
    model, arrays = from_lightningdit(weights(configuration), HEADS), golden(configuration)
    output = model(arrays["x"], arrays["t"], {"label": arrays["y"]})
    torch.testing.assert_close(output, arrays["out"], rtol=1e-5, atol=1e-5)
    assert (model.config.outputs_per_channel, model.config.patch_size, model.config.num_classes) == (1, 1, 5)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_lightningdits_weights_come_in_and_go_out_bit_for_bit(configuration: str) -> None:
    given = weights(configuration)
    back = to_lightningdit(from_lightningdit(given, HEADS))
    assert back.keys() == given.keys()
    assert all(torch.equal(back[name], value) for name, value in given.items())


def test_weights_that_do_not_fit_are_named() -> None:
    given = weights("swiglu_rope_rmsnorm")
    with pytest.raises(ValueError, match=r"blocks.1.mlp.w3.bias is missing \(1 in all\)"):
        from_lightningdit({name: value for name, value in given.items() if name != "blocks.1.mlp.w3.bias"}, HEADS)
    with pytest.raises(ValueError, match=r"feat_rope.freqs_cos differs by .* from the table of whole rows and columns"):
        from_lightningdit(given | {"feat_rope.freqs_cos": given["feat_rope.freqs_cos"].roll(1, dims=0)}, HEADS)
    with pytest.raises(ValueError, match=r"feat_rope.freqs_sin differs by nan"):
        from_lightningdit(given | {"feat_rope.freqs_sin": given["feat_rope.freqs_sin"] * torch.nan}, HEADS)
    with pytest.raises(ValueError, match=r"a multiple of 4, but model.width 48 with model.num_heads 8 gives 6"):
        from_lightningdit(given, 8)
    with pytest.raises(ValueError, match=r"not a DiT's weights: blocks.0.mlp.fc1.weight is missing"):
        from_reference(given, HEADS)


def test_a_network_that_lightningdit_does_not_have_is_refused() -> None:
    for block, named in (
        (AdaLNBlock, "block adaLN is not the one"),
        (partial(AdaLNZeroBlock, mlp=GeluMlp, mlp_ratio=2.0), "none of its options"),
        (partial(AdaLNZeroBlock, norm=partial(rms_norm, always_scaled=False)), "has with rms_norm; keep it"),
        (partial(AdaLNZeroBlock, attention=QKRmsNormSelfAttention), "has with qk_norm; keep it"),
    ):
        with pytest.raises(ValueError, match=named):
            to_lightningdit(tiny(block=block))
    with pytest.raises(ValueError, match=r"model.position_table none"):
        to_lightningdit(tiny(position_table="none", block=partial(AdaLNZeroBlock, attention=RotarySelfAttention)))
    with pytest.raises(ValueError, match="frequency_shift 1, but LightningDiT has 0 only"):
        to_lightningdit(tiny(frequency_shift=1))
    with pytest.raises(ValueError, match="a DiT with labels"):
        to_lightningdit(tiny(num_classes=0))


def test_the_papers_dit_is_one_of_lightningdits_networks() -> None:
    model = tiny()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs, released = to_lightningdit(model), to_reference(model)
    assert theirs.keys() == released.keys()
    assert all(torch.equal(theirs[name], value) for name, value in released.items())
