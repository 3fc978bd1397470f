"""Read and write JSON Lines files, one record of a step a line: ``metrics``, ``timing`` and ``evaluations.jsonl``.

Lines of the last two carry a hash over themselves. ``metrics.jsonl`` is plain JSON for other programs. Checkpoints have
a copy of the lines of ``metrics.jsonl`` and ``evaluations.jsonl``.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from core.atomic import append_line
from core.reading import DamagedFileError, read_regular
from core.records import SEAL, parse_object, seal, unseal

MAX_BYTES = 2**32
_HASH_DIGITS = 64


class Line(NamedTuple):
    """One record and the bytes that it was read from, without the newline."""

    record: dict[str, Any]
    text: bytes


def append_record(file: Path, record: Mapping[str, Any], sealed: bool) -> None:
    """Append one record, with a hash over it if ``sealed``. Raises the errors of `append_line`."""
    append_line(file, json.dumps(seal(record) if sealed else dict(record)))


def read_lines(file: Path, whole: bool = False) -> list[dict[str, Any]]:
    """Return the records of a file, without their hashes; see `lines_of`."""
    return [line.record for line in lines_of(file, whole)]


def lines_of(file: Path, whole: bool = False) -> list[Line]:
    """Return the lines of a file; none where it does not exist.

    A last line that a crash cut short is skipped, or refused where the file must be ``whole``. Raises ValueError that
    names the file and the line where another line is damaged: not a JSON object, without a step, or with a wrong hash.
    """
    try:
        content = read_regular(file, MAX_BYTES)
    except FileNotFoundError:
        return []
    return parse_lines(content, str(file), whole)


def parse_lines(content: bytes, name: str, whole: bool = False) -> list[Line]:
    """Return the lines of a file's content; errors mention ``name``. Raises the errors of `lines_of`."""
    *texts, last = content.split(b"\n")
    lines = [_line(text, f"Line {number} of {name}") for number, text in enumerate(texts, start=1)]
    if last:
        try:
            lines.append(_line(last, f"Line {len(lines) + 1} of {name}"))
        except ValueError:  # cut by a crash; an editor may also leave a whole line without its newline
            if whole:
                raise ValueError(
                    f"{name} ends in the middle of line {len(lines) + 1}; remove the rest of that line, and "
                    "repeat its measurement."
                ) from None
    return lines


def is_cut(file: Path) -> bool:
    """Return whether the last line of a file was cut: by a crash, or otherwise."""
    last = read_regular(file, MAX_BYTES).rpartition(b"\n")[2]
    try:
        parse_lines(last, str(file), whole=True)
    except ValueError:
        return True
    return False


def _line(text: bytes, name: str) -> Line:
    try:
        record = parse_object(text, name)
        last = next(reversed(record.items()), ("", None))
        # A line whose hash has a damaged name must not pass for a line of an earlier version, which had no hashes.
        sealed = SEAL in record or (isinstance(last[1], str) and len(last[1]) == _HASH_DIGITS)
        record = unseal(record, name, required=sealed)
        if type(record.get("step")) is not int or record["step"] < 0:
            raise DamagedFileError(f"{name} is damaged: its step is {record.get('step')!r}.")
    except DamagedFileError as error:
        raise ValueError(f"{str(error).rstrip('.')}; remove that line.") from None
    return Line(record, text)
