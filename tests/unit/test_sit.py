"""SiT's weights come in and go out bit for bit, and compute what SiT's program computes."""

import pytest
import torch
from sit import sit_golden, sit_network
from test_model import tiny
from torch import Tensor

from data.conditions import ClassLabels
from diffusion.guidance import ClassifierFreeGuidance
from model.convert import from_sit, to_sit

HEADS, CLASSES = 4, 7  # of the network


def sit_weights() -> dict[str, Tensor]:
    """Return the network's weights under SiT's names: 4 latent channels, side 8."""
    golden = sit_golden()
    return {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}


def test_sits_weights_come_in_and_go_out_bit_for_bit() -> None:
    weights = sit_weights()
    back = to_sit(from_sit(weights, num_heads=HEADS))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match=r"final_layer.linear.bias is missing"):
        from_sit({name: value for name, value in weights.items() if name != "final_layer.linear.bias"}, HEADS)
    with pytest.raises(ValueError, match="frequency_shift 1, but SiT's code has 0 only"):
        to_sit(tiny(frequency_shift=1))


def test_the_network_computes_what_sits_program_computes() -> None:
    golden = sit_golden()
    output = sit_network()(golden["forward/x"], golden["forward/t"], {"label": golden["forward/y"]})
    torch.testing.assert_close(output[:, :4], golden["forward/out"], rtol=1e-5, atol=1e-5)


def test_guidance_of_three_channels_equals_sits() -> None:
    golden = sit_golden()
    half = len(golden["cfg/x"]) // 2
    null = ClassLabels(CLASSES).null
    guided = ClassifierFreeGuidance(sit_network(), null, 4, scale=float(golden["cfg/scale"]), channels=3)
    output = guided(golden["cfg/x"][:half], golden["cfg/t"][:half], {"label": golden["cfg/y"][:half]})
    torch.testing.assert_close(output[:, :4], golden["cfg/out_three_channels"][:half], rtol=1e-5, atol=1e-5)
