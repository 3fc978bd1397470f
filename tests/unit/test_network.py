"""A network is used by its interface only; norms, attention, MLPs and conditions of a DiT can be replaced."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from test_model import BLOCKS, inputs, tiny
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

from launch.builders.components import build
from model.attention import CrossAttention, RotaryQKNormSelfAttention, RotaryQKRmsNormSelfAttention, RotarySelfAttention
from model.blocks import (
    AdaLNZeroBlock,
    AdaLNZeroSharedBlock,
    Block,
    ConditionFirst,
    CrossAttentionBlock,
    InContextBlock,
)
from model.embeddings import ConditionEmbedding, Embedded, grid_positions
from model.flops import multiply_adds, num_parameters, weightless
from model.mlp import GeluMlp, SwiGluMlp
from model.network import checkpoint_units
from model.norms import rms_norm
from model.released import to_reference


def randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def modern(block: type[Block], **changes: Any) -> Any:
    made = partial(block, norm=rms_norm, mlp=SwiGluMlp, attention=RotarySelfAttention)
    return randomized(tiny(block=made, **changes))


def test_each_block_has_a_name_of_its_own_in_records() -> None:
    assert len({block.__dict__["name"] for block in BLOCKS}) == len(BLOCKS)


@pytest.mark.parametrize("block", BLOCKS)
def test_rms_norm_swiglu_and_rotary_embeddings_are_variants_and_no_new_blocks(block: type[Block]) -> None:
    model, (x_t, t, condition) = modern(block), inputs()
    assert not any(isinstance(part, nn.LayerNorm | GeluMlp) for part in model.modules())
    assert {type(part) for name, part in model.named_modules() if "norm" in name.rsplit(".", 1)[-1]} == {nn.RMSNorm}
    output = model(x_t, t, condition)
    output.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    shifted = model.positions
    model.positions = torch.zeros_like(shifted)
    assert (model(x_t, t, condition) - output).abs().max() > 1e-4  # the tokens' positions reach the attention
    model.positions = shifted + 3
    far = (model(x_t, t, condition) - output).abs().max()
    at_origin = block.assembly is ConditionFirst  # the condition is; other scores are of differences alone
    assert (far > 1e-4) == at_origin


@pytest.mark.parametrize("block", BLOCKS)
def test_recomputation_takes_blocks_that_see_positions(block: type[Block]) -> None:
    plain, recomputing = modern(block), modern(block)
    checkpoint_units(recomputing, partial(checkpoint, use_reentrant=False))
    for model in (plain, recomputing):
        model(*inputs()).square().mean().backward()
    for one, two in zip(plain.parameters(), recomputing.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=1e-6)


def test_rotated_scores_depend_on_the_difference_of_positions_alone() -> None:
    attention, positions = RotarySelfAttention(16, 2), grid_positions(4)
    query, key = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    scores = [
        attention.rotate(query, where) @ attention.rotate(key, where).transpose(2, 3)
        for where in (positions, positions + 5)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    assert positions.tolist()[:5] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


@pytest.mark.parametrize("attention", [RotarySelfAttention, RotaryQKNormSelfAttention])
def test_rotary_positions_refuse_heads_that_do_not_divide_with_both_numbers(attention: Any) -> None:
    for width, head in ((40, 10), (36, 9)):
        with pytest.raises(ValueError, match=rf"of 4, but model.width {width} with model.num_heads 4 gives {head}; "):
            tiny(width=width, block=partial(AdaLNZeroBlock, attention=attention))


def test_queries_and_keys_are_normalized_before_they_are_rotated() -> None:
    attention, tokens = RotaryQKRmsNormSelfAttention(16, 2), torch.randn(2, 16, 16)
    assert {type(part) for part in (attention.norm_query, attention.norm_key)} == {nn.RMSNorm}
    query, key = attention.normalize(torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8))
    torch.testing.assert_close(query.square().mean(dim=-1), torch.ones(2, 2, 16), rtol=1e-4, atol=1e-4)
    turned = attention.rotate(key, grid_positions(4))
    torch.testing.assert_close(turned.norm(dim=-1), key.norm(dim=-1))  # a rotation keeps what the norm made
    mixed = attention(tokens, grid_positions(4))
    nn.init.constant_(attention.qkv.weight[:32], 0)  # same queries and keys for all tokens: positions alone decide
    assert (attention(tokens, grid_positions(4)) - mixed).abs().max() > 1e-4


def test_swiglus_hidden_width_is_two_thirds_and_it_has_a_gelu_mlps_weights() -> None:
    hidden = {width: SwiGluMlp(width, 4.0).output.in_features for width in (48, 1024, 1152)}
    assert hidden == {48: 128, 1024: 2730, 1152: 3072}
    weights = [sum(p.numel() for p in mlp(1152, 4.0).parameters() if p.ndim == 2) for mlp in (GeluMlp, SwiGluMlp)]
    assert weights[0] == weights[1]


def test_shared_modulation_is_one_regression_for_all_blocks_and_a_table_a_block() -> None:
    shared, x, width = randomized(tiny(block=AdaLNZeroSharedBlock)), inputs(), 48
    apart = tiny(block=AdaLNZeroBlock)
    weights = {name: value for name, value in shared.state_dict().items() if "modulation_table" not in name}
    weight, bias = (weights.pop(f"shared_modulation.{leaf}") for leaf in ("weight", "bias"))
    for number, block in enumerate(shared.blocks):
        weights[f"blocks.{number}.modulation.weight"] = weight
        weights[f"blocks.{number}.modulation.bias"] = bias + block.modulation_table.flatten()
    apart.load_state_dict(weights)
    torch.testing.assert_close(shared(*x), apart(*x), rtol=1e-5, atol=1e-5)
    regression = 6 * width**2 + 6 * width
    assert num_parameters(apart) - num_parameters(shared) == regression - 2 * 6 * width
    assert multiply_adds(apart) - multiply_adds(shared) == 6 * width**2


def test_blocks_that_share_a_modulation_share_a_compilation_without_breaks() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    model, plain = (randomized(tiny(block=AdaLNZeroSharedBlock)) for _ in range(2))
    for unit in model.units():
        unit.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(model(*inputs()), plain(*inputs()), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_the_position_table_may_be_learned_or_left_out() -> None:
    x_t, t, condition = inputs()
    learned = randomized(tiny(position_table="learned"))
    learned(x_t, t, condition).square().mean().backward()
    assert learned.position_embedding.grad.abs().sum() > 0
    assert learned.state_dict()["position_embedding"].shape == (16, 48)
    for parts, blind in (({}, True), ({"attention": RotarySelfAttention}, False)):
        model = randomized(tiny(position_table="none", block=partial(AdaLNZeroBlock, **parts)))
        assert "position_embedding" not in model.state_dict()
        rolled = model(x_t.roll(4, dims=3), t, condition)
        same = torch.allclose(rolled, model(x_t, t, condition).roll(4, dims=3), atol=1e-4)
        assert same == blind  # without any positions, tokens are a set
    assert num_parameters(tiny(position_table="none")) == num_parameters(tiny()) - 16 * 48
    assert num_parameters(tiny(position_table="learned")) == num_parameters(tiny())
    for table in ("learned", "none"):
        with pytest.raises(ValueError, match=f"model.position_table {table}; keep it in our format"):
            to_reference(tiny(position_table=table))
    with pytest.raises(ValueError, match="is 'rotary', but it must be one of fixed, learned, none"):
        tiny(position_table="rotary")


def between_blocks(model: Any, seen: list[torch.dtype]) -> None:
    for block in model.blocks:
        block.register_forward_hook(lambda _, tokens, output: seen.extend([tokens[0].dtype, output.dtype]))


@pytest.mark.parametrize("table", ["fixed", "learned", "none"])
def test_tokens_between_blocks_are_float32_under_autocast_whatever_the_position_table(table: str) -> None:
    model, seen = modern(AdaLNZeroBlock, position_table=table), list[torch.dtype]()
    between_blocks(model, seen)
    with torch.autocast("cpu", torch.bfloat16):
        model(*inputs())
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("block", BLOCKS)
def test_a_residual_stream_in_bf16_is_of_bf16_under_autocast_alone(block: type[Block]) -> None:
    """It changes the output by rounding: of 8 bits of a mantissa, in each addition of a block."""
    seen = list[torch.dtype]()
    plain, rounded = randomized(tiny(block=block)), tiny(block=block, residual="bf16")
    rounded.load_state_dict(plain.state_dict())
    between_blocks(rounded, seen)
    exact = plain(*inputs())
    assert torch.equal(rounded(*inputs()), exact)
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        found, usual = rounded(*inputs()), plain(*inputs())
    assert set(seen) == {torch.bfloat16}
    error, usual_error = ((output.float() - exact).norm() / exact.norm() for output in (found, usual))
    assert 0 < error < 4 * usual_error < 0.2
    with pytest.raises(ValueError, match=r"model\.residual is 'fp16', but it must be one of fp32, bf16"):
        tiny(residual="fp16")


class Words(ConditionEmbedding):
    """Embeds another kind of condition: up to M words of a text, some of which are missing."""

    name = "word_embedding"

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(20, width)

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        words, there = self.table(condition["words"]), condition["there"]
        tokens = torch.cat([timestep.unsqueeze(1), words], dim=1)
        vector = timestep + (words * there.unsqueeze(2)).sum(dim=1)
        return Embedded(vector, tokens, nn.functional.pad(there, (1, 0), value=True))

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        return {
            "words": torch.zeros(batch, 6, dtype=torch.int64, device=device),
            "there": torch.ones(batch, 6, dtype=torch.bool, device=device),
        }


@pytest.mark.parametrize("block", BLOCKS)
def test_a_condition_of_words_is_one_class_whose_missing_words_do_not_matter(block: type[Block]) -> None:
    model = randomized(tiny(block=block, num_classes=0, embedding=Words))
    assert "word_embedding.table.weight" in model.state_dict()
    x_t, t, _ = inputs()
    words, there = torch.arange(18).view(3, 6), torch.arange(6).expand(3, 6) < 4
    output = model(x_t, t, {"words": words, "there": there})
    others = torch.where(there, words, 19)
    torch.testing.assert_close(model(x_t, t, {"words": others, "there": there}), output)
    assert (model(x_t, t, {"words": (words + 1) % 20, "there": there}) - output).abs().max() > 1e-4
    assert multiply_adds(model) > 0


@pytest.mark.parametrize("block", [CrossAttentionBlock, InContextBlock])
def test_masked_tokens_of_a_condition_are_attended_by_nobody(block: type[Block]) -> None:
    made, tokens = randomized(block(48, 4)), torch.randn(2, 16, 48)  # type: ignore[call-arg]
    condition, mask = torch.randn(2, 3, 48), torch.tensor([[True, True, False]] * 2)
    changed = torch.where(mask.unsqueeze(2), condition, 100.0)
    results = []
    for rows in (condition, changed):
        embedded = Embedded(rows.sum(dim=1), rows, mask)
        assembly = made.assembly()
        results.append(assembly.leave(made(assembly.enter(tokens, embedded), embedded), embedded))
    torch.testing.assert_close(*results)
    attention = CrossAttention(48, 4)
    torch.testing.assert_close(attention(tokens, changed, mask), attention(tokens, condition[:, :2]))


def test_a_section_builds_a_network_of_one_config_and_names_what_is_missing() -> None:
    section = {"_target_": "model.dit.DiT", "latent_size": 8, "channels": 4, "patch_size": 2, "width": 16, "depth": 2}
    section |= {"num_heads": 2, "block": {"_target_": "model.blocks.AdaLNZeroBlock", "_partial_": True}}
    model = build(section, num_classes=10)
    assert (model.latent_shape, model.out_channels, len(model.units())) == ((4, 8, 8), 8, 2)
    assert model.facts() == {"family": "DiT", "patch_size": 2, "width": 16, "depth": 2, "block": "adaLN-Zero"}
    with pytest.raises(ValueError, match="needs the setting 'num_classes'"):
        build(section)


def test_a_network_without_memory_has_the_cost_of_one_with_weights() -> None:
    model = tiny(block=AdaLNZeroBlock)
    meta = weightless(model.twin)
    assert all(parameter.is_meta for parameter in meta.parameters())
    assert (multiply_adds(meta), num_parameters(meta)) == (multiply_adds(model), num_parameters(model))
    assert all(tensor.is_meta for tensor in (*meta.example_inputs(2)[:2], *meta.example_inputs(2)[2].values()))
