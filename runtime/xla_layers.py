"""Adapt layers to XLA's partitioner: gather weights where they are used, and replace norms by ones it can partition."""

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
    """Let each layer use gathered weights, while its gradients are sharded and its outputs stay sharded by rows.

    Otherwise the partitioner would propagate the weights' sharding to the activations.
    """
    for path, part in model.named_modules():
        full = {name: f"{path}.{name}".lstrip(".") for name in part._parameters}
        if specs := {name: axes[full[name]] for name in full if any(axes.get(full[name], ()))}:
            whole = partial(_forward_with_whole_weights, part, part.forward, specs, state_mesh)
            part.forward = partial(_forward_by_rows, whole, batch_mesh)


def _forward_with_whole_weights(
    layer: nn.Module, forward: Callable[..., Any], axes: Mapping[str, Axes], mesh: xs.Mesh, *inputs: Any
) -> Any:
    """Call ``forward`` of a layer with gathered copies in place of its parameters named in ``axes``."""
    kept = {name: layer._parameters[name] for name in axes}
    try:
        for name, parameter in kept.items():
            layer._parameters[name] = _Spread.apply(parameter, mesh, (None,) * len(axes[name]), axes[name])
        return forward(*inputs)
    finally:
        layer._parameters.update(kept)


def _forward_by_rows(forward: Callable[..., Any], mesh: xs.Mesh, *inputs: Any) -> Any:
    """Call ``forward`` with its outputs, and their gradients, sharded by rows."""

    def by_rows(output: Tensor) -> Tensor:
        axes = (DATA,) + (None,) * (output.dim() - 1)
        spread: Tensor = _Spread.apply(output, mesh, axes, axes)
        return spread

    return tree_map_only(Tensor, by_rows, forward(*inputs))


class _Spread(torch.autograd.Function):
    """Copies a tensor, sharded by ``axes``; its gradient is sharded by ``gradient_axes``."""

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
    """Replace norms by elementary operations.

    XLA makes layer norms batch norms, which not all backends partition, and computes group norms on the host.
    """
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.forward = partial(_layer_norm, part)  # type: ignore[method-assign]
        if isinstance(part, nn.GroupNorm):
            part.forward = partial(_group_norm, part)  # type: ignore[method-assign]


def _layer_norm(norm: nn.LayerNorm, vectors: Tensor) -> Tensor:
    """Return ``norm(vectors)`` over the last dimension, in float32 as under autocast."""
    vectors = vectors.float()
    centered = vectors - vectors.mean(dim=-1, keepdim=True)
    normalized = centered * torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + norm.eps)
    return normalized if norm.weight is None else normalized * norm.weight + norm.bias


def _group_norm(norm: nn.GroupNorm, images: Tensor) -> Tensor:
    """Return ``norm(images)``, [B, C, ...], over groups of channels and all places, in float32 as under autocast."""
    groups = images.float().unflatten(1, (norm.num_groups, -1)).flatten(2)
    centered = groups - groups.mean(dim=2, keepdim=True)
    normalized = centered * torch.rsqrt(centered.square().mean(dim=2, keepdim=True) + norm.eps)
    shape = (1, -1, *(1,) * (images.dim() - 2))
    return normalized.view(images.shape) * norm.weight.view(shape) + norm.bias.view(shape)
