"""The sharding rule fits every model that can be configured."""

import re
from functools import partial

import pytest
import torch
from test_adm import ADMS, adm_of
from test_model import BLOCKS, SIZES

from model.attention import QKNormSelfAttention, RotaryQKRmsNormSelfAttention, SelfAttention
from model.blocks import AdaLNZeroBlock, Block
from model.dit import DiT, DiTConfig
from model.mlp import SwiGluMlp
from model.norms import rms_norm
from runtime.sharding import EXCEPTIONS, SHARDED, Axes, axes_of, sharding_of


def shape_only(block: type[Block], size: str, qk_norm: bool) -> DiT:
    depth, width, num_heads = SIZES[size]
    attention = QKNormSelfAttention if qk_norm else SelfAttention
    with torch.device("meta"):
        return DiT(DiTConfig(32, 4, 2, width, depth, num_heads, 1000, partial(block, attention=attention)))


def modern_shape(size: str, channels: int = 32) -> DiT:
    """Return a network of all modern parts, with patches of one value."""
    depth, width, num_heads = SIZES[size]
    block = partial(AdaLNZeroBlock, attention=RotaryQKRmsNormSelfAttention, norm=rms_norm, mlp=SwiGluMlp)
    with torch.device("meta"):
        config = DiTConfig(16, channels, 1, width, depth, num_heads, 1000, block, 1, position_table="learned")
        return DiT(config)


@pytest.mark.parametrize("size", SIZES)
def test_every_parameter_of_a_modern_dit_divides_by_128(size: str) -> None:
    model = modern_shape(size)
    found = sharding_of(model, 128)
    assert found.keys() == dict(model.named_parameters()).keys()
    whole = sum(p.numel() for name, p in model.named_parameters() if SHARDED not in found[name])
    assert whole / sum(p.numel() for p in model.parameters()) < 0.01
    of_swiglu = {axes for name, axes in found.items() if name.endswith("gate_and_value.weight")}
    assert of_swiglu == {(None, SHARDED) if size == "L" else (SHARDED, None)}  # L has 2 * 2730 rows


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_parameter_of_a_dit_divides_by_128(block: type[Block], size: str, qk_norm: bool) -> None:
    model = shape_only(block, size, qk_norm)
    found = sharding_of(model, 128)
    assert found.keys() == dict(model.named_parameters()).keys()
    spread = sum(p.numel() for name, p in model.named_parameters() if SHARDED in found[name])
    assert spread / sum(p.numel() for p in model.parameters()) > 0.99


# The axes of every parameter of an ADM.
OF_AN_ADM: tuple[tuple[str, Axes], ...] = (
    (r"unet\.time_embedding\.linear_[12]\.weight", (SHARDED, None)),
    (r"unet\.class_embedding\.weight", (None, SHARDED)),
    (r"unet\..+\.(time_emb_proj|to_[qkv]|to_out\.0)\.weight", (SHARDED, None)),
    (r"unet\.(conv_in|.+\.conv[12]|.+\.conv_shortcut)\.weight", (SHARDED, None, None, None)),
    (r"unet\.conv_out\.weight", (None, SHARDED, None, None)),  # [6, C, 3, 3]
    (r"unet\.(.+\.)?(norm[12]|group_norm|conv_norm_out)\.weight", (None,)),
    (r"unet\..+\.bias", (None,)),
)


@pytest.mark.parametrize("num_shards", [4, 8, 64])
@pytest.mark.parametrize("name", ADMS)
def test_every_parameter_of_an_adm_is_sharded_by_the_table(name: str, num_shards: int) -> None:
    model = adm_of(name)
    found = sharding_of(model, num_shards)
    assert found.keys() == dict(model.named_parameters()).keys()
    for parameter, axes in found.items():
        (expected,) = (axes for pattern, axes in OF_AN_ADM if re.fullmatch(pattern, parameter))
        assert axes == expected, parameter


# The axes of every parameter of a DiT, in one table: what the rule and its exceptions must come to.
_ATTENTION = r"attention\.(qkv|projection)|cross_attention\.(query|key_value|projection)"
OF_A_DIT: tuple[tuple[str, Axes], ...] = (
    (r"patch_embedding\.weight", (SHARDED, None)),
    (r"position_embedding", (None, SHARDED)),
    (r"timestep_embedding\.(input|output)\.weight", (SHARDED, None)),
    (r"label_embedding\.weight", (None, SHARDED)),
    (rf"blocks\.\d+\.({_ATTENTION}|mlp\.(hidden|gate_and_value|output)|modulation)\.weight", (SHARDED, None)),
    (r"(final_layer\.|shared_)modulation\.weight", (SHARDED, None)),
    (r"blocks\.\d+\.modulation_table", (None, SHARDED)),
    (r"final_layer\.decoder\.weight", (None, SHARDED)),
    (r"(blocks\.\d+|blocks\.\d+\.attention|final_layer)\.norm\w*\.weight", (None,)),
    (r".+\.bias", (None,)),
)


@pytest.mark.parametrize("num_shards", [1, 4, 8, 128])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_dit_is_sharded_by_the_table_whatever_else_divides(block: type[Block], num_shards: int) -> None:
    models = [shape_only(block, "S", True), *([modern_shape("S")] if block is AdaLNZeroBlock else [])]
    for name, axes in (pair for model in models for pair in sharding_of(model, num_shards).items()):
        (expected,) = (axes for pattern, axes in OF_A_DIT if re.fullmatch(pattern, name))
        assert axes == expected, name


def test_every_exception_is_needed() -> None:
    names = {name for block in BLOCKS for name, _ in shape_only(block, "S", True).named_parameters()}
    for model in (modern_shape("S"), adm_of("adm_digits")):
        names |= {name for name, _ in model.named_parameters()}
    for pattern, _ in EXCEPTIONS:
        assert any(re.fullmatch(pattern, name) for name in names), pattern


def test_matrices_of_any_network_are_sharded_along_the_first_dimension_that_divides() -> None:
    assert axes_of("down.0.1.convolution.weight", (64, 4, 3, 3), 8) == (SHARDED, None, None, None)
    assert axes_of("out.weight", (4, 64, 3, 3), 8) == (None, SHARDED, None, None)
    assert axes_of("first.weight", (4, 3, 3, 3), 8) == (None, None, None, None)  # a convolution is small or divides
    assert axes_of("first.weight", (4, 4, 3, 3), 3) == (None, None, None, None)  # no kernel is cut
    assert axes_of("scale", (64,), 8) == (None,)
    assert axes_of("temperature", (), 8) == ()


def test_a_matrix_that_does_not_divide_or_has_two_exceptions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router.weight has 2 rows to shard, which is not a multiple of 4 devices"):
        axes_of("router.weight", (2, 63), 4)
    with pytest.raises(ValueError, match="matches 2 exceptions"):
        axes_of("label_embedding.weight", (11, 64), 4, [*EXCEPTIONS, (r"label.*", (None, SHARDED))])


def test_a_width_that_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="has 384 rows to shard, which is not a multiple of 36 devices"):
        sharding_of(shape_only(BLOCKS[0], "S", False), 36)
