"""Read, decode, crop and encode images concurrently; the result does not depend on timing."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from core.prefetch import prefetch
from data.encodings import Encoding
from data.images import UnreadableImageError
from data.plan import Plan
from data.sources import Prepared, Source


class Encoded(NamedTuple):
    """A batch of encoded images, all of the same shard."""

    shard: int
    is_last: bool  # whether it is the last batch of its shard
    rows: list[int]
    examples: list[Prepared]
    skipped: list[UnreadableImageError]  # since the previous batch
    moments: NDArray[np.float32]  # [len(rows), orientations, 2c, h, w]
    features: NDArray[np.float16] | None  # [len(rows), orientations, T, D]; None without a teacher


class _Batch(NamedTuple):
    shard: int
    is_last: bool
    rows: list[int]
    examples: list[Prepared]
    skipped: list[UnreadableImageError]
    stacked: NDArray[Any] | None  # None where no image is left


def encoded_batches(
    source: Source, encoding: Encoding, plan: Plan, shards: Iterable[int], batch_size: int, threads: int
) -> Iterator[Encoded]:
    """Yield every batch of the given shards, in order.

    ``threads`` threads read and crop a few batches ahead, another one stacks them, and on CUDA the encoder computes one
    batch while the previous one is copied to the host. Raises ValueError as the source and the encoding do.
    """
    in_flight: deque[tuple[_Batch, list[Callable[[], Tensor]]]] = deque()
    for batch in prefetch(_batches(source, encoding, plan, shards, batch_size, threads)):
        copies: list[Callable[[], Tensor]] = []
        if batch.stacked is not None:
            copies.append(_to_host(encoding.moments(batch.stacked)))
            if encoding.teacher is not None:
                copies.append(_to_host(encoding.features(batch.stacked)))
        in_flight.append((batch, copies))
        if len(in_flight) > 1:
            yield _on_host(*in_flight.popleft(), plan)
    if in_flight:
        yield _on_host(*in_flight.popleft(), plan)


def _to_host(values: Tensor) -> Callable[[], Tensor]:
    """Start an asynchronous copy to the host; return a function that waits for this copy, but not for later work."""
    if values.device.type != "cuda":
        return values.cpu
    copy = values.to("cpu", non_blocking=True)  # pinned
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))

    def wait() -> Tensor:
        arrived.synchronize()
        return copy

    return wait


def _on_host(batch: _Batch, copies: list[Callable[[], Tensor]], plan: Plan) -> Encoded:
    empty = np.empty((0, *plan.spec.sample_shape), dtype=np.float32)
    values, *others = [copy().numpy() for copy in copies] or [empty]
    if not np.isfinite(values).all():
        bad = int(np.flatnonzero(~np.isfinite(values).all(axis=(1, 2, 3, 4)))[0])
        way_out = "leave that image out" if plan.spec.precision == "fp32" else "try data.autoencoder.precision=fp32"
        raise ValueError(
            f"The autoencoder gives values that are not finite for {batch.examples[bad].source_id}; {way_out}."
        )
    for features in others:
        if not np.isfinite(features).all():
            bad = int(np.flatnonzero(~np.isfinite(features).all(axis=(1, 2, 3)))[0])
            raise ValueError(
                f"The teacher gives values that float16 cannot hold for {batch.examples[bad].source_id}, but features "
                "must be finite and at most 65504; leave that image out."
            )
    return Encoded(
        batch.shard, batch.is_last, batch.rows, batch.examples, batch.skipped, values, others[0] if others else None
    )


def _batches(
    source: Source, encoding: Encoding, plan: Plan, shards: Iterable[int], batch_size: int, threads: int
) -> Iterator[_Batch]:
    rows: list[int] = []
    examples: list[Prepared] = []
    skipped: list[UnreadableImageError] = []
    for shard, row, result in _prepared_rows(source, encoding, plan, shards, ahead=3 * batch_size, threads=threads):
        if isinstance(result, UnreadableImageError):
            skipped.append(result)
        else:
            rows.append(row)
            examples.append(result)
        is_last = row == plan.rows(shard)[-1]
        if len(rows) == batch_size or is_last:
            stacked = np.stack([example.values for example in examples]) if examples else None
            yield _Batch(shard, is_last, rows, examples, skipped, stacked)
            rows, examples, skipped = [], [], []


def _prepared_rows(
    source: Source, encoding: Encoding, plan: Plan, shards: Iterable[int], ahead: int, threads: int
) -> Iterator[tuple[int, int, Prepared | UnreadableImageError]]:
    """Yield (shard, row, prepared image or its error), in order, while threads work on up to ``ahead`` rows."""

    def prepare(row: int) -> Prepared | UnreadableImageError:
        try:
            return encoding.prepare(source, int(plan.order[row]))
        except UnreadableImageError as error:
            return error

    pending: deque[tuple[int, int, Future[Prepared | UnreadableImageError]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            for shard in shards:
                for row in plan.rows(shard):
                    pending.append((shard, row, pool.submit(prepare, row)))
                    if len(pending) > ahead:
                        shard_, row_, future = pending.popleft()
                        yield shard_, row_, future.result()
            while pending:
                shard_, row_, future = pending.popleft()
                yield shard_, row_, future.result()
        finally:
            for _, _, future in pending:
                future.cancel()
