"""Write checkpoints asynchronously, by all processes; the training loop waits for the copy to CPU memory only."""

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import IO, Any, TypeVar

from pydantic import ConfigDict
from torch import Tensor

from core.reading import DamagedFileError
from core.records import parse_object, seal, unseal, validate
from core.urls import redacted
from runtime.protocol import Runtime
from train.checkpoint import FORMAT_VERSION, file_names, index_name
from train.checksums import Checksums, Hash32, Hash64
from train.state import TrainState, optimizer_tensors
from train.stores import CheckpointStore
from train.tensor_files import write_tensors

Record = TypeVar("Record")

POLL_SEC = 0.02  # between two checks for files of other processes
PATIENCE_SEC = 900.0  # the longest wait for another process's files
SPLIT_BYTES = 512 * 2**20  # a part of up to this size is one file, written by one process
_FAILURE = "failed-by-{rank:05d}.json"  # why a process could not write its files
_RECEIPT = "written-by-{rank:05d}.json"  # written when all files of a process are on disk


@dataclass
class Receipt:
    """The hashes of each file that a process wrote for a checkpoint."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    blake3: dict[str, Hash64]
    xxh3_128: dict[str, Hash32]


@dataclass
class Failure:
    """The reason why a process could not write its files."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    error: str


@dataclass
class Timing:
    """The durations of the last save: ``stall_sec`` blocked the loop, ``write_sec`` ran asynchronously."""

    stall_sec: float = 0.0
    write_sec: float = 0.0
    bytes_written: int = 0  # by this process


class CheckpointWriter:
    """Saves one state at a time. Every process must make the same calls.

    Each process copies its share of the tensors to CPU memory, which is reused by the next save, and a thread writes
    them. The main process's thread completes the checkpoint when it has read the receipts of all processes. Processes
    communicate through the store only, so that these threads call no collectives. ``before_commit`` is called on the
    main process when the tensors are written, ``after_commit`` when the checkpoint is complete.
    """

    def __init__(
        self,
        store: CheckpointStore,
        runtime: Runtime,
        before_commit: Callable[[], None] = lambda: None,
        after_commit: Callable[[], None] = lambda: None,
        patience_sec: float = PATIENCE_SEC,
        split_bytes: int = SPLIT_BYTES,
    ) -> None:
        self.timing = Timing()
        self._store, self._runtime = store, runtime
        self._before_commit, self._after_commit = before_commit, after_commit
        self._patience_sec, self._split_bytes = patience_sec, split_bytes
        self._host: dict[str, dict[str, Tensor]] = {}  # this process's share of each part
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, state: TrainState, facts: Mapping[str, Any], lines: Mapping[str, bytes] | None = None) -> None:
        """Start writing the state, after an earlier save is finished. Raises any error of that save.

        ``facts`` are JSON values that identify the run: seed, config, data manifest hash, code version. ``lines`` are
        the contents of the run's JSON Lines files, by name, which the main process writes.
        """
        self.wait()
        started = time.perf_counter()
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": state.model.state_dict(),
            **{name: module.state_dict() for name, module in state.ema.modules.items()},
            "optimizer": optimizer_tensors(state.model, state.optimizer),
        }
        owners = shares(parts, self._runtime.data_world, self._split_bytes)
        for part, tensors in parts.items():
            mine = frozenset(owners[part][self._runtime.data_rank])
            self._runtime.copy_to_host(tensors, mine, self._host.setdefault(part, {}))
        content: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": state.step, **facts}
        content |= {"interval": state.interval, "recent_grad_norms": state.recent_grad_norms}
        frozen = json.loads(json.dumps(content))  # a copy, since training continues to change the lists
        self.timing = Timing(stall_sec=time.perf_counter() - started)
        self._thread = threading.Thread(
            target=self._write, args=(state.step, frozen, owners, dict(lines or {})), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete. Raises any error of its writing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the error of the writing, if it failed."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self, step: int, content: dict[str, Any], owners: dict[str, list[list[str]]], lines: dict[str, bytes]
    ) -> None:
        started = time.perf_counter()
        try:
            self._write_share(step, owners)
            if self._runtime.is_main:
                self._complete(step, content, owners, lines)
        except BaseException as error:
            self._error = error
            self._give_up(step, error)
        self.timing.write_sec = time.perf_counter() - started

    def _give_up(self, step: int, error: BaseException) -> None:
        """Delete the files on the main process; on another one, try to report the error to it through the store."""
        if self._runtime.is_main:
            self._store.abandon(step)
            return
        with suppress(OSError, ValueError):
            reason = redacted(f"{type(error).__name__}: {error}")
            self._put(step, _FAILURE.format(rank=self._runtime.data_rank), seal({"error": reason}))

    def _write_share(self, step: int, owners: dict[str, list[list[str]]]) -> None:
        rank, hashes = self._runtime.data_rank, dict[str, Checksums]()
        for part, by_rank in owners.items():
            mine = {name: self._host[part][name] for name in by_rank[rank]}
            file_name = file_names(part, by_rank)[rank]
            if file_name is not None:
                hashes[file_name] = self._store.write(step, file_name, partial(write_tensors, tensors=mine))
                self.timing.bytes_written += sum(value.nbytes for value in mine.values())
        by_algorithm = {
            "blake3": {name: found.blake3 for name, found in hashes.items()},
            "xxh3_128": {name: found.xxh3_128 for name, found in hashes.items()},
        }
        self._put(step, _RECEIPT.format(rank=rank), seal(by_algorithm))

    def _complete(
        self, step: int, content: dict[str, Any], owners: dict[str, list[list[str]]], lines: dict[str, bytes]
    ) -> None:
        receipts = {_RECEIPT.format(rank=rank): rank for rank in range(self._runtime.data_world)}
        self._await(step, set(receipts))
        blake3, xxh3_128 = dict[str, str](), dict[str, str]()
        for receipt, rank in receipts.items():
            names_of_rank = (file_names(part, by_rank)[rank] for part, by_rank in owners.items())
            received = self._received(step, receipt, {name for name in names_of_rank if name is not None})
            blake3 |= received.blake3
            xxh3_128 |= received.xxh3_128
        for part, by_rank in owners.items():
            names = file_names(part, by_rank)
            if len(set(names) - {None}) > 1:
                places = {tensor: names[rank] for rank, mine in enumerate(by_rank) for tensor in mine}
                self._put(step, index_name(part), {"metadata": {}, "weight_map": dict(sorted(places.items()))})
        for name, text in lines.items():
            self._store.write(step, name, partial(_write_bytes, text=text))
        self._before_commit()
        sha256 = {name: hashlib.sha256(text).hexdigest() for name, text in lines.items()}
        for algorithm, hashes in (("sha256", sha256), ("blake3", blake3), ("xxh3_128", xxh3_128)):
            content[algorithm] = dict(sorted(hashes.items()))
        state = json.dumps(seal(content), indent=1).encode()
        self._store.commit(step, state, set(receipts))
        self._after_commit()

    def _await(self, step: int, receipts: set[str]) -> None:
        until = time.monotonic() + self._patience_sec
        while missing := receipts - (written := self._store.written(step)):
            for name in sorted(written):
                if name.startswith(_FAILURE.partition("{")[0]):
                    reason = self._record(step, name, Failure).error
                    raise ValueError(f"Another process could not write its part of {self._store.place(step)}: {reason}")
            if time.monotonic() > until:
                raise ValueError(
                    f"{len(missing)} of {len(receipts)} processes have not written their part of "
                    f"{self._store.place(step)} after {self._patience_sec:.0f} seconds; all must see the same folder, "
                    "and finish writing in that time."
                )
            time.sleep(POLL_SEC)

    def _received(self, step: int, name: str, expected: set[str]) -> Receipt:
        """Return the hashes in a receipt. Raises DamagedFileError unless they are those of the ``expected`` files."""
        receipt = self._record(step, name, Receipt)
        for files in (receipt.blake3, receipt.xxh3_128):
            if odd := sorted(files.keys() ^ expected):
                raise DamagedFileError(
                    f"{self._store.place(step)}/{name} is damaged: it has {len(files)} files, but its process wrote "
                    f"{len(expected)}; the first that differs is {odd[0]!r}."
                )
        return receipt

    def _record(self, step: int, name: str, kind: type[Record]) -> Record:
        place = f"{self._store.place(step)}/{name}"
        return validate(kind, unseal(parse_object(self._store.read(step, name), place), place), place)

    def _put(self, step: int, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=1).encode()
        self._store.write(step, name, lambda file: file.write(text))


def _write_bytes(file: IO[bytes], text: bytes) -> None:
    file.write(text)


def shares(
    parts: Mapping[str, Mapping[str, Tensor]], num_processes: int, split_bytes: int
) -> dict[str, list[list[str]]]:
    """Return, for each part, the names of the tensors that each process writes.

    One process writes a part of at most ``split_bytes``, so that it is one file; a larger part is divided by whole
    tensors. The largest is assigned first, and each to the process that has the fewest bytes.
    """
    loads = [0] * num_processes
    owners: dict[str, list[list[str]]] = {part: [[] for _ in loads] for part in parts}
    for part, tensors in sorted(parts.items(), key=lambda item: -_bytes_of(item[1].values())):
        names = sorted(tensors, key=lambda name: (-tensors[name].numel(), name))
        groups = [names] if _bytes_of(tensors.values()) <= split_bytes else [[name] for name in names]
        for group in groups:
            rank = loads.index(min(loads))
            owners[part][rank] += group
            loads[rank] += _bytes_of(tensors[name] for name in group)
    return owners


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
