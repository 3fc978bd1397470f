"""Import without garbage collection, which takes a fifth of the time of large imports and finds nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False  # in this process or the one that forked it; gc.get_freeze_count() would visit every object


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect no garbage inside; exempt what a process imports first from later collections too.

    Use it around work that imports much or makes objects that stay, and that is short.
    """
    global _frozen
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not _frozen:
            gc.freeze()  # else the next collection would visit everything imported
            _frozen = True
        if was_enabled:
            gc.enable()
