"""Functions are compiled by numba, from its cache where that can be used."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FUNCTION = """
from core.numba_functions import compiled

@compiled("int64(int64)")
def successor(x):
    return x + 1
"""


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_file_of_numbas_cache_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    name = f"cached_by_{suffix}"
    (tmp_path / f"{name}.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(tmp_path)
    assert imported(name).successor(1) == 2
    (file,) = tmp_path.rglob(f"*.{suffix}")
    for damaged in (b"", b"junk", file.read_bytes()[:-20]):
        file.write_bytes(damaged)
        assert imported(name).successor(1) == 2


def imported(name: str) -> Any:
    """Import a module as a new process would."""
    sys.modules.pop(name, None)
    return importlib.import_module(name)
