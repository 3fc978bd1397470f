"""Learn from a cloud that this machine is about to be preempted, and ask the run to stop."""

import os
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from train.signals import ask_to_stop

_HOST = "metadata.google.internal"
_PATH = "/computeMetadata/v1/instance/preempted"
_WAIT_SEC = 60  # that the server may hold an answer back until the value changes


class Notice(Protocol):
    """Watches for a notice of preemption."""

    def watched(self) -> AbstractContextManager[None]:
        """Return a context in which a notice asks the run to stop."""
        ...


class NoNotice:
    """Learns nothing: schedulers send signals."""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Do nothing."""
        yield


class GceNotice:
    """Asks Google Compute Engine's metadata server, which holds its answer back until there is news.

    ``retry_sec`` is the time after a question without an answer. GCE_METADATA_HOST names another server, as for
    Google's own libraries. On a machine without a metadata server one line says so, and no notice comes. Source:
    https://cloud.google.com/compute/docs/instances/create-use-spot (detect preemption).
    """

    def __init__(self, retry_sec: float = 5.0) -> None:
        if retry_sec <= 0:
            raise ValueError(f"notice.retry_sec is {retry_sec}, but it must be positive; 5 is the default.")
        self._url = f"http://{os.environ.get('GCE_METADATA_HOST', _HOST)}{_PATH}"
        self._retry_sec = retry_sec

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Ask the run to stop, once, if the notice comes within the block."""
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), name="notice of preemption", daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _watch(self, ended: threading.Event) -> None:
        waits = False  # the first answer comes at once
        while not ended.is_set():
            try:
                preempted = self._ask(waits)
            except (OSError, ValueError) as error:
                if not waits:
                    said = f"{self._url} does not answer: {error}"
                    print(f"note: no notice of preemption will come: {said}.", file=sys.stderr)
                    return
                time.sleep(self._retry_sec)
                continue
            if preempted and not ended.is_set():
                print("\nThe machine is preempted.", file=sys.stderr)
                ask_to_stop()
                return
            waits = True

    def _ask(self, waits: bool) -> bool:
        """Return whether the machine is preempted; with ``waits``, once that changes or a minute has passed.

        Raises OSError without an answer, and ValueError for one that is neither TRUE nor FALSE.
        """
        query = f"?wait_for_change=true&timeout_sec={_WAIT_SEC}" if waits else ""
        request = urllib.request.Request(self._url + query, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=_WAIT_SEC + 10 if waits else 5) as answer:
            text = answer.read(100).decode("ascii", "replace").strip()
        if text not in ("TRUE", "FALSE"):
            raise ValueError(f"it says {text!r}, not TRUE or FALSE")
        return bool(text == "TRUE")
