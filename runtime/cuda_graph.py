"""Replay a training step on a GPU as one CUDA graph: the host launches it once instead of kernel by kernel."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.batch import Batch, mapped
from runtime.protocol import AT_LOG_STEPS, Metrics

WARM_UP_STEPS = 3  # that compile kernels and load libraries, which a capture must not


class GraphedStep:
    """A step that is captured as a CUDA graph after `WARM_UP_STEPS`, and replayed from then on.

    The first steps are executed eagerly. A replay reads its batch from fixed buffers, into which each batch is copied.
    Steps with and without the norm of the update are two graphs, which share their memory. A batch of another shape,
    or a changed learning rate, is captured anew. Where a step cannot be captured, all are executed eagerly, and one
    line says why.
    """

    def __init__(
        self, function: Callable[..., Metrics], model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self._function, self._model, self._optimizer = function, model, optimizer
        self._stream = torch.cuda.Stream(device)
        self._eager_steps = 0
        self._captures = True
        self._captured: dict[tuple[Any, ...], _Captured] = {}
        for group in optimizer.param_groups:
            group["capturable"] = True  # its step count is on the device, as the fused kernel has it

    def __call__(self, micro_batches: Sequence[Batch], at_log_step: bool = True) -> Metrics:
        """Take the step; return scalars [] float32 on the device, which later steps do not change."""
        if self._eager_steps < WARM_UP_STEPS or not self._captures:
            self._eager_steps += 1
            return self._eager(micro_batches, at_log_step)
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in tree_leaves(list(micro_batches)))
        rates = tuple(group["lr"] for group in self._optimizer.param_groups)
        key = (at_log_step, shapes, rates)
        if key not in self._captured:
            try:
                self._captured[key] = self._capture(micro_batches, at_log_step)
            except RuntimeError as error:  # nothing was computed
                self._leave(error)
                return self._function(micro_batches, at_log_step)
        return self._captured[key].replay(micro_batches)

    def _eager(self, micro_batches: Sequence[Batch], at_log_step: bool) -> Metrics:
        if not self._captures:
            return self._function(micro_batches, at_log_step)
        # With all kernels of both graphs, on a stream that is not the default one, as a capture needs it.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            metrics = self._function(micro_batches)
        torch.cuda.current_stream().wait_stream(self._stream)
        return metrics if at_log_step else {key: value for key, value in metrics.items() if key not in AT_LOG_STEPS}

    def _capture(self, micro_batches: Sequence[Batch], at_log_step: bool) -> "_Captured":
        inputs = [mapped(batch, torch.clone) for batch in micro_batches]
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._captured.values())).graph.pool() if self._captured else None
        with torch.cuda.graph(graph, pool=pool, stream=self._stream):
            metrics = self._function(inputs, at_log_step)
            values = torch.stack([value.float() for value in metrics.values()])
        return _Captured(graph, inputs, list(metrics), values)

    def _leave(self, error: RuntimeError) -> None:
        """Return to eager steps, with gradients as before the capture."""
        self._captures = False
        self._captured.clear()
        self._model.zero_grad(set_to_none=True)
        reason = str(error).strip().split("\n")[0]
        print(f"note: steps are not replayed as a CUDA graph, and small models are slower: {reason}", file=sys.stderr)


class _Captured:
    """A captured step: its graph, the buffers that it reads, and the metrics [n] that it writes."""

    def __init__(self, graph: torch.cuda.CUDAGraph, inputs: list[Batch], names: list[str], values: Tensor) -> None:
        self.graph = graph
        self._inputs: list[Tensor] = tree_leaves(inputs)
        self._names, self._values = names, values

    def replay(self, micro_batches: Sequence[Batch]) -> Metrics:
        """Copy the micro-batches into the buffers, replay the graph, and return a copy of its metrics."""
        torch._foreach_copy_(self._inputs, tree_leaves(list(micro_batches)))
        self.graph.replay()
        return dict(zip(self._names, self._values.clone().unbind(), strict=True))
