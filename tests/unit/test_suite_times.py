"""`make test` runs all layers and ends with a table of times, also where a layer failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import suite_times
from by_processes import TOGETHER

from launch.command.app import CONF

LAYERS = ["lint", "unit", "runtime", "smoke"]
CONFTEST = """
import suite_times
pytest_addoption, pytest_configure = suite_times.add_option, suite_times.register
"""
# Without the plugins that take a second to import in each of its processes.
PYTEST = f'PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 exec {sys.executable} -m pytest -p xdist "$@"'
TESTS = """
import time
import pytest

@pytest.fixture(scope="module")
def slow():
    time.sleep({seconds})

@pytest.mark.parametrize("number", range(3))
def test_it(slow, number):
    assert number != {fails_at}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a Makefile with linters that do nothing and one test file per layer, of which smoke is slowest."""
    shutil.copy(CONF.parent / "Makefile", tmp_path)
    for name in ("setup.cfg", "constraints.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    (tmp_path / "bin").mkdir()
    for name, line in {"ruff": "true", "mypy": "true", "pytest": PYTEST}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin/python").symlink_to(sys.executable)
    for number, layer in enumerate(LAYERS[1:]):
        write_tests(tmp_path, layer, seconds=number / 5)
    (tmp_path / "tests/conftest.py").write_text(CONFTEST)
    shutil.copy(suite_times.__file__, tmp_path / "tests")
    return tmp_path


def write_tests(project: Path, layer: str, seconds: float = 0, fails_at: int | None = None) -> None:
    folder = project / "tests" / layer
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"test_of_{layer}.py").write_text(TESTS.format(seconds=seconds, fails_at=fails_at))


def make_test(project: Path) -> tuple[int, list[str]]:
    """Return the exit code of `make test`, and the lines of the table at its end."""
    words = ["make", "test", "BIN=bin", "STAMP=bin/ruff", "BROWSERS=sh"]
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MAKE", "MFLAGS"))}
    done = subprocess.run(words, cwd=project, env=env, capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert lines.count("layer         wall s   tests s   tests") == 1, done.stdout + done.stderr
    return done.returncode, lines[lines.index("layer         wall s   tests s   tests") + 1 :]


def rows_of(lines: list[str]) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in lines[: lines.index("")]}


def test_a_table_of_all_layers_and_the_slowest_files_ends_make_test(project: Path) -> None:
    code, lines = make_test(project)
    assert code == 0
    rows = rows_of(lines)
    assert rows.keys() == {*LAYERS, "all"}
    assert rows["lint"][1:] == ["-", "-"]
    assert [rows[layer][2] for layer in LAYERS[1:]] == ["3", "3", "3"]
    assert 0.4 <= float(rows["smoke"][1]) <= float(rows["smoke"][0]) + 0.1 < 60
    (wall,) = rows.pop("all")
    assert max(float(row[0]) for row in rows.values()) <= float(wall) < 60
    assert lines[5:7] == ["", "slowest files"]
    assert [line.split()[-1] for line in lines[7:]] == [
        f"tests/{layer}/test_of_{layer}.py" for layer in ("smoke", "runtime", "unit")
    ]


@pytest.mark.parametrize("layer", ["unit", "runtime"])
def test_the_table_is_shown_where_a_layer_failed_and_make_still_fails(project: Path, layer: str) -> None:
    write_tests(project, layer, fails_at=1)
    code, lines = make_test(project)
    assert code == 2
    rows = rows_of(lines)
    assert rows.keys() == {*LAYERS, "all"}
    assert [name for name, row in rows.items() if row[-1] == "failed"] == [layer]
    failed = lines[lines.index("failed tests") + 1 :]
    assert failed[0] == f"tests/{layer}/test_of_{layer}.py::test_it[1]"
    assert failed[1] == "    assert 1 != 1"


def test_a_lint_that_fails_is_a_failed_layer_too(project: Path) -> None:
    (project / "bin/mypy").write_text("#!/bin/sh\nfalse\n")
    code, lines = make_test(project)
    assert code == 2
    assert [line.split()[0] for line in lines if line.endswith("failed")] == ["lint"]
    assert rows_of(lines).keys() == {*LAYERS, "all"}


def test_the_ten_slowest_files_are_shown_and_no_more() -> None:
    files = {f"tests/unit/test_{number}.py": float(number) for number in range(15)}
    layer = {"layer": "unit", "started": 1.0, "ended": 10.0, "tests": 15, "files": files, "failed": False}
    shown = suite_times.table([layer]).splitlines()
    assert [line.split()[-1] for line in shown[-10:]] == [f"tests/unit/test_{n}.py" for n in range(14, 4, -1)]
    assert shown[-11] == "slowest files"


def test_files_that_are_scheduled_together_exist() -> None:
    named = {f"test_{name}.py" for names in TOGETHER.values() for name in names.split()}
    tests = CONF.parent / "tests"
    assert named <= {path.name for layer in ("unit", "runtime", "smoke") for path in (tests / layer).iterdir()}
