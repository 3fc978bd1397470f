"""Report how long each part of `make test` took: each layer writes a record, and one table shows all of them.

``pytest --times FILE`` writes the records of its layers. ``python suite_times.py FOLDER NAME COMMAND...`` runs a
command and writes its record, ``python suite_times.py FOLDER`` prints the table of the records in a folder.
"""

import json
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

SLOWEST = 10
REASON_CHARACTERS = 600


class Times:
    """A pytest plugin that records the times of each layer (a folder of tests) and of each file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._layers: dict[str, dict[str, Any]] = {}
        self._failed: dict[str, dict[str, str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test's times to its layer and file. With xdist, the writing process gets the reports of all workers."""
        name = report.nodeid.split("::")[0]
        found = {"files": {}, "tests": 0, "started": report.start, "ended": report.stop}
        layer = self._layers.setdefault(str(Path(name).parent), found)
        layer["files"][name] = layer["files"].get(name, 0.0) + report.duration
        layer["tests"] += report.when == "call"
        layer["started"], layer["ended"] = min(layer["started"], report.start), max(layer["ended"], report.stop)
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = str(getattr(crash, "message", report.longrepr)).strip()
            self._failed.setdefault(str(Path(name).parent), {})[report.nodeid] = reason[:REASON_CHARACTERS]

    def pytest_sessionfinish(self) -> None:
        """Write the record, even if tests failed or were interrupted."""
        write_record(
            self._file,
            [
                {
                    "layer": Path(folder).name,
                    "started": layer["started"],
                    "ended": layer["ended"],
                    "tests": layer["tests"],
                    "files": layer["files"],
                    "failed": folder in self._failed,
                    "reasons": self._failed.get(folder, {}),
                }
                for folder, layer in self._layers.items()
            ],
        )


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--times", type=Path, metavar="FILE", help="write how long each layer and file took")


def register(config: pytest.Config) -> None:
    """Register the plugin in the process that was started, not in xdist's workers."""
    file = config.getoption("--times")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Times(file))


def write_record(file: Path, layers: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(layers))


def timed(file: Path, name: str, command: list[str]) -> int:
    """Run a command as a layer without tests, show its output when it has ended, and return its exit code."""
    started = time.time()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    times = {"started": started, "ended": time.time()}
    write_record(file, [{"layer": name, **times, "tests": 0, "files": {}, "failed": done.returncode != 0}])
    print(f"\n{name}\n{textwrap.indent(done.stdout, '    ')}", flush=True)  # at once: other layers run beside it
    return done.returncode


def table(layers: Sequence[dict[str, Any]]) -> str:
    """Return a line for each layer and one for all, which overlap, then the slowest files and the failed tests."""
    lines = [f"{'layer':10}{'wall s':>10}{'tests s':>10}{'tests':>8}"]
    files: dict[str, float] = defaultdict(float)
    for layer in layers:
        files |= layer["files"]
        of_tests = f"{sum(layer['files'].values()):10.1f}{layer['tests']:8}" if layer["files"] else f"{'-':>10}{'-':>8}"
        failed = "  failed" if layer["failed"] else ""
        lines.append(f"{layer['layer']:10}{layer['ended'] - layer['started']:10.1f}{of_tests}{failed}")
    wall = max((layer["ended"] for layer in layers), default=0) - min((layer["started"] for layer in layers), default=0)
    lines.append(f"{'all':10}{wall:10.1f}")
    slowest = sorted(files.items(), key=lambda file: -file[1])[:SLOWEST]
    if slowest:
        lines += ["", "slowest files", *(f"{seconds:10.1f} s  {name}" for name, seconds in slowest)]
    reasons = {name: reason for layer in layers for name, reason in layer.get("reasons", {}).items()}
    if reasons:
        lines += ["", "failed tests"]
        lines += [f"{name}\n{textwrap.indent(reason, '    ')}" for name, reason in reasons.items()]
    return "\n".join(lines)


def main(folder: Path, *words: str) -> int:
    if words:
        return timed(folder / f"{words[0]}.json", words[0], list(words[1:]))
    records = sorted(folder.glob("*.json"), key=lambda file: file.stat().st_mtime_ns)
    print(table([layer for record in records for layer in json.loads(record.read_text())]))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
