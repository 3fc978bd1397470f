"""Compute attention in one of two ways: by PyTorch's fused kernels, or plainly, which is faster in bf16 on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Queries, keys, values [B, heads, T or M, d / heads] and a mask [B, 1, 1, M] or None -> [B, heads, T, d / heads].
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention by PyTorch's scaled_dot_product_attention, which chooses a kernel."""
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Compute attention by two matrix products and a softmax, which stores the scores.

    On a CPU in bfloat16 this takes 0.25 to 0.6 of the fused kernel's time at the head sizes and lengths of S to XL
    (docs/speed.md).
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is None:
        return torch.softmax(scores, dim=-1).to(value.dtype) @ value
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1).masked_fill(~mask, 0)  # where no key is left, the result is 0
    return weights.to(value.dtype) @ value


class AttentionLayer(nn.Module):
    """A layer that computes attention by ``attend``, which `attend_by` sets."""

    attend: Attend = staticmethod(fused)


def attend_by(attend: Attend, network: nn.Module) -> None:
    """Let all attention layers of a network compute attention by this function."""
    for part in network.modules():
        if isinstance(part, AttentionLayer):
            part.attend = attend
