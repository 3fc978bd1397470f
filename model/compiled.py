"""Give a network's layers the forms from which PyTorch's compiler makes the fastest kernels for a CPU."""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from model.attention import SelfAttention
from model.gelu import compiled_hidden, hide_by


def form_for_cpu(module: nn.Module) -> None:
    """Let the linear maps and GELUs inside a module that will be compiled for a CPU compute the same by other steps.

    Results are equal but for float rounding (docs/speed.md has what it gains).
    """
    hide_by(compiled_hidden, module)
    for part in module.modules():
        if type(part) is nn.Linear:
            part.forward = MethodType(_linear, part)  # type: ignore[method-assign]
        if isinstance(part, SelfAttention) and type(part).split is SelfAttention.split:
            part.split = MethodType(_split, part)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    """Multiply, then add the bias, which the compiler does within the next kernel; uncompiled, apply the layer.

    As one operation, PyTorch first copies the bias into each row of the result, then adds the product to that.
    """
    if not torch.compiler.is_compiling():
        return nn.functional.linear(inputs, layer.weight, layer.bias)
    return _affine(inputs, layer.weight, layer.bias)


def _split(layer: SelfAttention, tokens: Tensor) -> tuple[Tensor, ...]:
    """Compute queries, keys and values by a product each; uncompiled, by the layer's one.

    Attention returns their gradients as three tensors, which one product would first need as one.
    """
    if not torch.compiler.is_compiling():
        return SelfAttention.split(layer, tokens)
    biases = (None,) * 3 if layer.qkv.bias is None else layer.qkv.bias.chunk(3)
    return tuple(_affine(tokens, *part) for part in zip(layer.qkv.weight.chunk(3), biases, strict=True))


def _affine(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = inputs @ weight.t()
    if bias is None:
        return product
    added: Tensor = _BiasAdded.apply(product, bias.to(product.dtype))
    return added


class _BiasAdded(torch.autograd.Function):
    """Adds a bias to each row; its gradient, a sum over rows, is a product with ones.

    The kernels that PyTorch's compiler makes for a CPU read a matrix column by column to sum its rows, and compute it
    again for that: 6% of a step of S/2 (docs/speed.md).
    """

    @staticmethod
    def forward(context: FunctionCtx, product: Tensor, bias: Tensor) -> Tensor:
        return product + bias

    @staticmethod
    def backward(context: FunctionCtx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        rows = gradient.flatten(0, -2)
        return gradient, (rows.new_ones(1, len(rows)) @ rows).squeeze(0)
