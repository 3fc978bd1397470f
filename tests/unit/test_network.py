"""A network is used by its interface only; norms, attention, MLPs and conditions of a DiT can be replaced."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from test_model import BLOCKS, inputs, tiny
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from launch.builders.components import build
from model.attention import CrossAttention, SelfAttention
from model.blocks import AdaLNZeroBlock, Block, ConditionFirst, CrossAttentionBlock, InContextBlock
from model.embeddings import ConditionEmbedding, Embedded, grid_positions, sincos_frequencies
from model.flops import multiply_adds, num_parameters, weightless
from model.mlp import GeluMlp
from model.network import checkpoint_units


def rms_norm(width: int, affine: bool) -> nn.Module:
    return nn.RMSNorm(width, eps=1e-6, elementwise_affine=affine)


class SwiGlu(nn.Module):
    """The SwiGLU MLP (Shazeer 2020, equation 6), with as many parameters as a GELU MLP of this ratio."""

    def __init__(self, width: int, mlp_ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * mlp_ratio * width)
        self.gate_and_value, self.output = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.gate_and_value(tokens).chunk(2, dim=2)
        output: Tensor = self.output(nn.functional.silu(gate) * value)
        return output


class RotaryAttention(SelfAttention):
    """Rotates half of each head's channels by the row, half by the column (Su et al. 2021, equation 34)."""

    sees_positions = True

    def rotate(self, vectors: Tensor, positions: Tensor) -> Tensor:
        frequencies = sincos_frequencies(vectors.shape[-1] // 4, torch.float32).to(positions)
        angles = (positions.unsqueeze(2) * frequencies).flatten(1)  # [T, d / heads / 2]
        even, odd = vectors[..., ::2], vectors[..., 1::2]
        turned = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
        return torch.stack(turned, dim=-1).flatten(-2).to(vectors.dtype)


def randomized(model: nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model


def modern(block: type[Block]) -> Any:
    return randomized(tiny(block=partial(block, norm=rms_norm, mlp=SwiGlu, attention=RotaryAttention)))


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
    attention, positions = RotaryAttention(16, 2), grid_positions(4)
    query, key = torch.randn(1, 2, 16, 8), torch.randn(1, 2, 16, 8)
    scores = [
        attention.rotate(query, where) @ attention.rotate(key, where).transpose(2, 3)
        for where in (positions, positions + 5)
    ]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)
    assert positions.tolist()[:5] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


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
