"""Define the XLA runtime of a step that is compiled elsewhere: state takes no memory, and nothing is executed."""

from collections.abc import Iterable

import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.distributed.spmd as xs
from torch import Tensor

from runtime.sharding import Axes
from runtime.xla import XlaRuntime


class TracingRuntime(XlaRuntime):
    """Turns state on the meta device into placeholders, which are sharded like weights but take no memory."""

    def _put(self, value: Tensor, axes: Axes | None = None) -> Tensor:
        if not value.is_meta:
            return super()._put(value, axes)
        placeholder: Tensor = xb.create_placeholder_tensor(tuple(value.shape), value.dtype)
        xs.annotate_custom_sharding(placeholder, self._state_mesh, axes or (None,) * value.dim())
        return placeholder

    def hlo(self, results: Iterable[Tensor]) -> str:
        """Return the program that computes these results, as text, before partitioning; each result occurs once."""
        once = {id(value): value for value in results}
        text: str = torch_xla._XLAC._get_xla_tensors_hlo(list(once.values()))
        return text
