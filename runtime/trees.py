"""Convert calls on trees to calls on their leaves, for functions that accept only tensors."""

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


def flattened(
    method: Callable[..., Any], owner: nn.Module, arguments: tuple[Any, ...]
) -> tuple[MethodType, list[Any], Callable[[Any], Any]]:
    """Return ``method`` of ``owner`` as a bound method of leaves, the leaves, and a function from its result to a tree.

    The result of the bound method is one tensor, or a tuple of leaves.
    """
    leaves, inputs = tree_flatten(arguments)
    outputs: list[TreeSpec] = []

    def of_leaves(owner: nn.Module, *leaves: Any) -> Any:
        results, spec = tree_flatten(method(owner, *tree_unflatten(leaves, inputs)))
        outputs[:] = [spec]
        return results[0] if len(results) == 1 else tuple(results)

    def as_tree(results: Any) -> Any:
        return tree_unflatten(list(results) if isinstance(results, tuple) else [results], outputs[0])

    return MethodType(of_leaves, owner), leaves, as_tree
