"""Exchange objects between hosts over their network, by a gloo group."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

from torch import distributed

BEAT_SEC = 2.0
RUNNING, DONE = "running", "done"  # any other state of a process is the text of its error


class Hosts:
    """A group of ``count`` processes, of which this is number ``index``; a single process needs no network.

    ``address`` is an ``init_method`` of torch.distributed. A process that waits for another longer than
    ``timeout_sec`` stops.
    """

    def __init__(self, index: int, count: int, address: str, timeout_sec: float) -> None:
        self.index = index
        self.count = count
        self._timeout = timedelta(seconds=timeout_sec)
        if count > 1 and not distributed.is_initialized():
            distributed.init_process_group(
                "gloo", init_method=address, rank=index, world_size=count, timeout=self._timeout
            )

    def exchange(self, mine: Any, group: Any = None) -> list[Any]:
        """Return the objects of all processes, in rank order."""
        if self.count == 1:
            return [mine]
        everyone: list[Any] = [None] * self.count
        distributed.all_gather_object(everyone, mine, group=group)
        return everyone

    def wait(self) -> None:
        """Wait until every process has arrived."""
        if self.count > 1:
            distributed.barrier()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Stop all processes when one fails or dies inside the block, even while they wait in a collective.

        Processes leave the block together.
        """
        if self.count == 1:
            yield
            return
        state = [RUNNING]
        group = distributed.new_group(backend="gloo", timeout=self._timeout)
        watch = threading.Thread(target=self._watch, args=(state, group), name="watch", daemon=True)
        watch.start()
        try:
            yield
            state[0] = DONE
        except BaseException as error:
            state[0] = f"{type(error).__name__}: {error}"
            raise
        finally:
            watch.join()

    def _watch(self, state: list[str], group: Any) -> None:
        """Exchange states until all are done or one has failed."""
        while True:
            try:
                states = self.exchange(state[0], group)
            except RuntimeError as error:  # a connection was closed or timed out
                _stop(f"another process of this job died ({str(error).splitlines()[0]})")
            failed = [index for index, said in enumerate(states) if said not in (RUNNING, DONE)]
            if self.index in failed or all(said == DONE for said in states):
                return
            if failed:
                _stop(f"process {failed[0]} of this job stopped with {states[failed[0]]}")
            time.sleep(BEAT_SEC)


def _stop(sentence: str) -> NoReturn:
    """End this process from its watching thread: the main thread may wait forever for the dead process."""
    print(f"error: {sentence}; this process stops too.", file=sys.stderr, flush=True)
    os._exit(1)
