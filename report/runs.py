"""Read the evaluations of a sweep: of the folders of its runs, or of the one file that a report wrote of them."""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from core.reading import DamagedFileError
from core.records import seal
from report.records import Record, checked, read_records
from train.lines import read_lines
from train.runfolder import RunFolder

COLLECTED = "study.jsonl"  # in a report's folder
_LONGEST_NAME = 255


def read_runs(sweep: Path, only: Sequence[str] | None = None) -> dict[str, list[Record]]:
    """Return the evaluations of each run in a sweep, or of those named in ``only``.

    The sweep is the folder that holds the runs, or a file of `collected`. Raises ValueError where there is no run, or a
    file is damaged.
    """
    if sweep.is_file():
        return read_collected(_printable(sweep))
    if not sweep.is_dir():
        raise ValueError(
            f"There is no sweep {sweep}; give the folder that holds the runs, or the {COLLECTED} of a report."
        )
    _printable(sweep.resolve())
    folders = sorted({path.parent for name in ("config.yaml", "evaluations.jsonl") for path in _named(sweep, name)})
    if not folders:
        raise ValueError(_why_no_run(sweep))
    return {folder.name: _read_run(folder) for folder in folders if only is None or folder.name in only}


def collected(records: Mapping[str, Iterable[Record]]) -> bytes:
    """Return all evaluations of a sweep as JSON Lines, each with the name of its ``run`` and a hash over the line."""
    lines = [json.dumps(seal({"run": name, **record})) for name, of_run in records.items() for record in of_run]
    return "".join(f"{line}\n" for line in lines).encode()


def read_collected(file: Path) -> dict[str, list[Record]]:
    """Return the evaluations of each run in a file of `collected`.

    Raises ValueError where the file is empty or cut, or has a line that is damaged or names no run.
    """
    found: defaultdict[str, list[Record]] = defaultdict(list)
    for number, line in enumerate(read_lines(file, whole=True), start=1):
        name = line.pop("run", None)
        if not isinstance(name, str) or not 1 <= len(name) <= _LONGEST_NAME or not name.isprintable():
            raise DamagedFileError(
                f"Line {number} of {file} names no run (run: {str(name)[:40]!r}); only a report's {COLLECTED} can "
                "stand for a folder of runs."
            )
        found[name].append(checked(line, file))
    if not found:
        raise ValueError(f"{file} has 0 evaluations; write it again with `ditscale report sweep=FOLDER`.")
    return dict(found)


def _named(sweep: Path, name: str) -> list[Path]:
    """Return the paths with this name in the folders of a sweep, of any kind, dangling links included."""
    return [folder / name for folder in sweep.glob("[!.]*") if folder.is_dir() and os.path.lexists(folder / name)]


def _read_run(folder: Path) -> list[Record]:
    """Return a run's evaluations. Raises ValueError where its config, which the page shows, is missing or changed."""
    run = RunFolder(_printable(folder))
    if not os.path.lexists(run.config):
        raise ValueError(
            f"{folder} has evaluations, but no config.yaml; the same training command writes it again, or move the "
            "folder away."
        )
    run.read_config()
    return read_records(run)


def _why_no_run(sweep: Path) -> str:
    if (sweep / "config.yaml").exists():
        return f"{sweep} is one run; give the folder that holds it and those to compare it with: sweep={sweep.parent}."
    sweeps = sorted({str(path.parent.parent) for path in sweep.glob("*/*/config.yaml")})
    where = f"but in {', '.join(sweeps)}; give one of these" if sweeps else "give the folder that holds them"
    return f"There are 0 runs in {sweep}, {where}: sweep=FOLDER."


def _printable(folder: Path) -> Path:
    """Return a folder. Raises ValueError where its name has characters that a page or a terminal cannot show."""
    if not folder.name.isprintable():
        raise ValueError(f"The folder {str(folder)!r} has a name that cannot be shown; rename it.")
    return folder
