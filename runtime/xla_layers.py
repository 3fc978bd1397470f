"""Layers as XLA's partitioner wants them: whole weights where they are used, and norms that it can partition."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from runtime.sharding import Axes
from runtime.xla_devices import DATA


def gather_where_used(model: nn.Module, axes: Mapping[str, Axes], state_mesh: xs.Mesh, batch_mesh: xs.Mesh) -> None:
    """Each layer sees whole weights, its gradients are spread again, and its outputs stay spread by rows.

    Without this the partitioner follows the weights' sharding into the activations.
    """
    for path, part in model.named_modules():
        full = {name: f"{path}.{name}".lstrip(".") for name in part._parameters}
        if specs := {name: axes[full[name]] for name in full if any(axes.get(full[name], ()))}:
            whole = partial(_forward_with_whole_weights, part, part.forward, specs, state_mesh)
            part.forward = partial(_forward_by_rows, whole, batch_mesh)


def _forward_with_whole_weights(
    layer: nn.Module, forward: Callable[..., Any], axes: Mapping[str, Axes], mesh: xs.Mesh, *inputs: Any
) -> Any:
    """``forward`` of a layer that owns the parameters of ``axes``, with gathered copies in their place."""
    kept = {name: layer._parameters[name] for name in axes}
    try:
        for name, parameter in kept.items():
            layer._parameters[name] = _Spread.apply(parameter, mesh, (None,) * len(axes[name]), axes[name])
        return forward(*inputs)
    finally:
        layer._parameters.update(kept)


def _forward_by_rows(forward: Callable[..., Any], mesh: xs.Mesh, *inputs: Any) -> Any:
    """``forward`` with its outputs, and their gradients, spread over their rows."""

    def by_rows(output: Tensor) -> Tensor:
        axes = (DATA,) + (None,) * (output.dim() - 1)
        spread: Tensor = _Spread.apply(output, mesh, axes, axes)
        return spread

    return tree_map_only(Tensor, by_rows, forward(*inputs))


class _Spread(torch.autograd.Function):
    """A copy that is spread by ``axes``, whose gradient is spread by ``gradient_axes``."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, mesh: xs.Mesh, axes: Axes, gradient_axes: Axes) -> Tensor:
        ctx.mesh, ctx.axes = mesh, gradient_axes
        copy = value.clone()
        xs.annotate_custom_sharding(copy, mesh, axes)
        return copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradients[0].clone()
        xs.annotate_custom_sharding(gradient, ctx.mesh, ctx.axes)
        return gradient, None, None, None


def trace_friendly(model: nn.Module) -> None:
    """Norms in elementary operations: the batch norm that they would become is not partitioned by every backend."""
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.forward = partial(_layer_norm, part)  # type: ignore[method-assign]


def _layer_norm(norm: nn.LayerNorm, vectors: Tensor) -> Tensor:
    """``norm(vectors)`` over the last dimension, in float32 as under autocast."""
    vectors = vectors.float()
    centred = vectors - vectors.mean(dim=-1, keepdim=True)
    normalized = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + norm.eps)
    return normalized if norm.weight is None else normalized * norm.weight + norm.bias
