"""The XLA runtime for a step that is compiled elsewhere: state takes no memory, and nothing is executed."""

from collections.abc import Iterable

import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
from torch import Tensor

from runtime.sharding import Axes
from runtime.xla import XlaRuntime


class TracingRuntime(XlaRuntime):
    """State that is on the meta device becomes placeholders: sharded like weights, but without memory."""

    def _put(self, value: Tensor, axes: Axes | None = None) -> Tensor:
        if not value.is_meta:
            return super()._put(value, axes)
        placeholder: Tensor = xb.create_placeholder_tensor(tuple(value.shape), value.dtype)
        xs.annotate_custom_sharding(placeholder, self._state_mesh, axes or (None,) * value.dim())
        return placeholder

    def hlo(self, results: Iterable[Tensor]) -> str:
        """The program that computes these, as text, before it is partitioned; it names each once."""
        once = {id(value): value for value in results}
        text: str = torch_xla._XLAC._get_xla_tensors_hlo(list(once.values()))
        return text
