"""Attention is the same whichever function computes it, and a runtime chooses the one that is fastest on its device."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_model import BLOCKS, tiny
from torch import Tensor, nn

from model.attend import AttentionLayer, attend_by, fused, plain
from model.attention import SelfAttention, over_keys
from model.compiled import form_for_cpu
from model.dit import DiT
from model.gelu import compiled_hidden, fused_hidden, has_fused_hidden, hide_by, plain_hidden
from model.mlp import GeluMlp
from runtime.accelerate import AccelerateRuntime


@pytest.mark.parametrize("num_keys", [None, [3, 7], [0, 5]])
def test_plain_and_fused_attention_give_equal_values_and_gradients(num_keys: list[int] | None) -> None:
    """Include a row without any key, as of a condition without tokens."""
    parts = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = None if num_keys is None else over_keys(torch.arange(7) < torch.tensor(num_keys)[:, None])

    def of(attend: object) -> tuple[Tensor, Tensor]:
        given = parts.clone().requires_grad_()
        mixed = attend(*given, mask)  # type: ignore[operator]
        mixed.sin().sum().backward()
        assert given.grad is not None
        return mixed, given.grad

    for one, other in zip(of(plain), of(fused), strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_network_of_any_block_takes_either(block: type) -> None:
    model = tiny(block=block)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    inputs = (torch.randn(2, 4, 8, 8), torch.tensor([1, 500]), {"label": torch.tensor([0, 3])})
    whole = model(*inputs)
    attend_by(plain, model)
    assert torch.allclose(model(*inputs), whole, rtol=1e-4, atol=1e-5)


def attends(model: DiT) -> set[object]:
    return {part.attend for part in model.modules() if isinstance(part, AttentionLayer)}


@pytest.mark.skipif(not has_fused_hidden(), reason="this processor or build of PyTorch has no kernel for bf16")
def test_a_fused_hidden_layer_is_the_plain_one_where_nothing_is_trained() -> None:
    torch.manual_seed(0)
    mlp, tokens = GeluMlp(32, 4.0), torch.randn(2, 5, 32)
    exact = mlp(tokens).detach()
    hide_by(fused_hidden, mlp)
    assert torch.equal(mlp(tokens), exact)  # no autocast
    with torch.autocast("cpu", torch.bfloat16):
        trained = mlp(tokens)
        trained.sum().backward()
        with torch.no_grad():
            fused = mlp(tokens)
    assert mlp.hidden.weight.grad is not None
    assert not torch.equal(fused, trained)
    for found in (fused, trained):
        assert ((found.float() - exact).norm() / exact.norm()).item() < 1e-2


@pytest.mark.parametrize("layer", [partial(GeluMlp, 32, 4.0), partial(SelfAttention, 32, 2)], ids=["mlp", "attention"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_layers_of_a_network_that_a_cpu_compiles_compute_the_same_uncompiled_and_to_rounding_compiled(
    precision: str, layer: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    written, formed = layer(), layer()
    formed.load_state_dict(written.state_dict())
    form_for_cpu(formed)
    compiled = torch.compile(formed, backend="aot_eager")  # the steps of the graph, without kernels for them
    tokens = 3 * torch.randn(4, 7, 32)

    def of(module: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        given = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = module(given)
        output.float().sin().sum().backward()
        assert given.grad is not None
        return output, given.grad

    expected = of(written)
    rounding = 1e-2 if precision == "bf16" else 1e-6
    for one, other in zip(of(formed), expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(of(compiled), expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() / other.norm() < rounding
    if isinstance(formed, GeluMlp):
        assert not torch.equal(of(compiled)[0], expected[0])


def test_queries_keys_and_values_are_products_of_their_own_once_a_cpu_compiles_them() -> None:
    layer, tokens = SelfAttention(32, 2), torch.randn(4, 7, 32)
    form_for_cpu(layer)
    parts = torch.compile(layer.split, backend="aot_eager")(tokens)
    for part, expected in zip(parts, layer.split(tokens), strict=True):
        assert part.is_contiguous()
        assert not expected.is_contiguous()
        torch.testing.assert_close(part, expected)


def test_gelu_is_as_exact_by_its_sigmoid_as_by_its_tanh_and_finite_far_from_zero() -> None:
    identity = nn.Linear(1, 1, bias=False)
    nn.init.ones_(identity.weight)
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([-1e4, -1e2, 1e2, 1e4])]).unsqueeze(1)
    compiled = torch.compile(lambda: compiled_hidden(identity, x), backend="aot_eager")
    with torch.no_grad():
        exact = nn.functional.gelu(x.double(), approximate="tanh")
        errors = [(of().double() - exact).abs().max() for of in (compiled, lambda: plain_hidden(identity, x))]
    assert errors[0] < 2e-6
    assert errors[0] < 2 * errors[1]


def test_a_cpu_attends_plainly_in_bf16_and_as_before_in_fp32() -> None:
    for precision, attend in (("bf16", plain), ("fp32", fused)):
        trained, average, placed = (tiny(block=BLOCKS[1]) for _ in range(3))
        runtime = AccelerateRuntime(precision, device="cpu")  # type: ignore[arg-type]
        runtime.prepare(trained, [average], torch.optim.AdamW(trained.parameters()))
        runtime.place(placed)
        assert attends(trained) == attends(average) == attends(placed) == {attend}
