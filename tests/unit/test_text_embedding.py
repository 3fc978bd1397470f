"""Text conditions any kind of block, and what an encoder padded changes nothing."""

from functools import partial
from typing import Any

import pytest
import torch
from test_model import BLOCKS, tiny
from torch import Tensor

from model.blocks import AdaLNZeroSharedCrossBlock, Block
from model.dit import DiT
from model.text_embedding import PooledTextEmbedding, TextEmbedding
from runtime.sharding import SHARDED, sharding_of

LENGTH, DIM, POOLED = 5, 12, 8
READERS = [block for block in BLOCKS if block.reads_tokens]


def trained(block: type[Block], timestep_token: bool = True, **changes: Any) -> DiT:
    """Return a network of text whose zero weights have been moved away from zero."""
    embedding: Any = partial(PooledTextEmbedding, pooled_dim=POOLED)
    if block.reads_tokens:
        settings = {"length": LENGTH, "dim": DIM, "pooled_dim": POOLED, "timestep_token": timestep_token, **changes}
        embedding = partial(TextEmbedding, **settings)
    model = tiny(block=block, num_classes=0, embedding=embedding)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return three latents with captions of 5, 3 and 1 tokens."""
    generator = torch.Generator().manual_seed(3)
    condition = {
        "text": torch.randn(3, LENGTH, DIM, generator=generator),
        "text_mask": torch.arange(LENGTH) < torch.tensor([[5], [3], [1]]),
        "text_pooled": torch.randn(3, POOLED, generator=generator),
    }
    return torch.randn(3, 4, 8, 8, generator=generator), torch.tensor([5, 300, 900]), condition


def test_the_blocks_that_read_tokens_are_those_that_put_them_into_attention() -> None:
    assert [block.__name__ for block in READERS] == [
        "InContextBlock",
        "CrossAttentionBlock",
        "AdaLNZeroCrossBlock",
        "AdaLNZeroSharedCrossBlock",
    ]
    with pytest.raises(
        ValueError, match="but adaLN-Zero blocks read its vector alone; set model/embedding=pooled_text"
    ):
        tiny(num_classes=0, embedding=partial(TextEmbedding, length=LENGTH, dim=DIM))


@pytest.mark.parametrize("pooled_dim", [POOLED, 0])
@pytest.mark.parametrize("block", BLOCKS)
def test_every_weight_gets_a_gradient_as_distributed_training_needs(block: type[Block], pooled_dim: int) -> None:
    model = trained(block, pooled_dim=pooled_dim)
    model(*inputs()).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("timestep_token", [True, False])
@pytest.mark.parametrize("block", READERS)
def test_padding_beyond_the_mask_changes_no_output_and_no_gradient(block: type[Block], timestep_token: bool) -> None:
    x_t, t, condition = inputs()
    other = torch.where(condition["text_mask"].unsqueeze(2), condition["text"], 100.0)
    outputs, gradients = [], []
    for text in (condition["text"], other):
        model = trained(block, timestep_token)
        output = model(x_t, t, {**condition, "text": text})
        output.square().mean().backward()
        outputs.append(output)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert torch.equal(*outputs)
    assert outputs[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_sees_the_text_in_the_way_that_is_its_own(block: type[Block]) -> None:
    model, (x_t, t, condition) = trained(block), inputs()
    output = model(x_t, t, condition)
    of_tokens = model(x_t, t, {**condition, "text": condition["text"] + 1}) - output
    of_pooled = model(x_t, t, {**condition, "text_pooled": condition["text_pooled"] + 1}) - output
    assert (of_tokens.abs().max() > 1e-4) == block.reads_tokens
    assert of_pooled.abs().max() > 1e-4
    assert (model(x_t, t + 50, condition) - output).abs().max() > 1e-4


def test_a_caption_of_any_length_up_to_the_encoders_is_taken_and_a_shorter_tensor_is_the_masked_one() -> None:
    model, (x_t, t, condition) = trained(AdaLNZeroSharedCrossBlock), inputs()
    cut = {**condition, "text": condition["text"][1:, :3], "text_mask": condition["text_mask"][1:, :3]}
    cut["text_pooled"] = condition["text_pooled"][1:]
    torch.testing.assert_close(model(x_t[1:], t[1:], cut), model(x_t, t, condition)[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
def test_stored_halves_give_the_output_of_the_same_numbers_in_single_precision(block: type[Block]) -> None:
    model, (x_t, t, condition) = trained(block), inputs()
    halves = {name: value.half() if value.is_floating_point() else value for name, value in condition.items()}
    singles = {name: value.float() if value.is_floating_point() else value for name, value in halves.items()}
    assert torch.equal(model(x_t, t, halves), model(x_t, t, singles))
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x_t, t, halves).isfinite().all()


def test_the_example_has_the_shapes_that_are_embedded_and_its_cost_counts_the_text() -> None:
    model = trained(AdaLNZeroSharedCrossBlock)
    x_t, t, condition = model.example_inputs(2)
    assert {name: tuple(value.shape) for name, value in condition.items()} == {
        "text": (2, LENGTH, DIM),
        "text_mask": (2, LENGTH),
        "text_pooled": (2, POOLED),
    }
    assert model(x_t, t, condition).shape == (2, 8, 8, 8)
    assert model.has_null_class
    without_pooled = trained(AdaLNZeroSharedCrossBlock, timestep_token=False, pooled_dim=0)
    assert without_pooled.example_inputs(2)[2].keys() == {"text", "text_mask"}


def test_an_untrained_network_of_pixarts_blocks_outputs_zero_and_new_weights_follow_from_the_seed() -> None:
    embedding = partial(TextEmbedding, length=LENGTH, dim=DIM, pooled_dim=POOLED)
    one, other = (tiny(block=AdaLNZeroSharedCrossBlock, num_classes=0, embedding=embedding) for _ in range(2))
    other.initialize(1)
    assert (one(*inputs()) == 0).all()
    assert not torch.equal(one.embedding.tokens.hidden.weight, other.embedding.tokens.hidden.weight)  # type: ignore[union-attr]
    other.initialize(0)
    for (name, value), again in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


@pytest.mark.parametrize("num_shards", [4, 8, 128])
def test_every_matrix_of_a_network_of_clips_tokens_is_sharded(num_shards: int) -> None:
    embedding = partial(TextEmbedding, length=77, dim=768, pooled_dim=768)
    with torch.device("meta"):
        model = tiny(
            block=AdaLNZeroSharedCrossBlock,
            num_classes=0,
            embedding=embedding,
            width=1152,
            num_heads=16,
            latent_size=32,
        )
    found = sharding_of(model, num_shards)
    assert all(SHARDED in axes for name, axes in found.items() if len(axes) > 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dim": 0}, "model.embedding.dim is 0, but it must be from 1 to 65536; give that of the text encoder."),
        ({"length": 2**13}, "model.embedding.length is 8192, but it must be from 1 to 4096; give that"),
        ({"num_classes": 10}, "model.num_classes is 10, but a network of text embeds no classes; leave it out."),
    ],
)
def test_sizes_that_no_encoder_has_and_classes_are_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextEmbedding(**{"num_classes": 0, "width": 8, "length": 5, "dim": 12, "pooled_dim": 8, **changes})
