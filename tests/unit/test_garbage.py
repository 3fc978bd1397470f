"""Work that imports runs without garbage collection, which goes on afterwards as it was."""

import gc
import subprocess
import sys
import weakref

import pytest

from core.garbage import uncollected


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_inside_and_everything_afterwards() -> None:
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(KeyError), uncollected():
        raise KeyError
    assert gc.isenabled()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    cycle = Cycle()
    gone = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert gone() is None


def test_only_what_a_process_imports_first_is_exempt() -> None:
    script = "import gc, core.garbage as garbage\nfor _ in range(2):\n  with garbage.uncollected(): kept = [{}]\n"
    script += "  print(gc.get_freeze_count())\n  more = [{} for _ in range(1000)]"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, second = map(int, shown.split())
    assert 0 < second <= first
