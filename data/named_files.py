"""Find the tar, parquet or Arrow files of a source: all in a folder, a single one, or those that match a pattern."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from braceexpand import braceexpand

from core.remote import is_remote
from data.files import Files, IsFileError
from data.left_out import instead, odd_entries
from data.unread import COMPRESSED_TARS, LeftOut, is_litter


class NamedFiles(NamedTuple):
    """The files of a source to read, and those left out."""

    files: Files
    names: list[str]  # to read
    left_out: list[LeftOut]


def named_files(place: str, suffix: str) -> NamedFiles:
    """Return the files of a place, and the names of those to read.

    ``place`` is a folder, where every file with the suffix is read; one file; or a pattern with braces or ``*``
    (``s3://bucket/train-{0000..1023}.tar``). Raises ValueError where there are no such files, one is missing, or one
    cannot be read: a broken link, a pipe, a compressed tar file or a Git LFS pointer.
    """
    if "{" in place or "*" in place or _is_one_file(place, suffix):
        found = _of_pattern(place, suffix)
    else:
        files = Files(place)
        names = files.with_suffix(suffix)
        if not names:
            others = instead(files)
            raise ValueError(
                f"There are no {suffix} files in {place}{f'{others}.' if others else '; is it the right folder?'}"
            )
        found = NamedFiles(files, names, _left_out(files, names, suffix))
    for name in found.names:
        found.files.refuse_pointer(name)
    return found


def _is_one_file(place: str, suffix: str) -> bool:
    """Return whether a place is a file; a folder may have the suffix too, as those that Spark writes."""
    if not place.lower().endswith(suffix):
        return False
    if not is_remote(place):
        return not Path(place).expanduser().is_dir()
    if place.startswith(("http://", "https://")):
        return True
    try:
        Files(place)
    except IsFileError:
        return True
    return False


def _of_pattern(place: str, suffix: str) -> NamedFiles:
    paths = list(braceexpand(place))
    folders = {path.rpartition("/")[0] or ("/" if path.startswith("/") else ".") for path in paths}
    if len(folders) != 1 or any("*" in folder for folder in folders):
        raise ValueError(
            f"{place} names {max(2, len(folders))} folders, but the {suffix} files of a source lie in 1; put the "
            "pattern into the file names only."
        )
    folder = folders.pop()
    files = Files(folder, recursive=False)
    names = [name for path in paths for name in _matching(files, path.rpartition("/")[2])]
    if not names:
        raise ValueError(f"No file in {folder} has a name like {place.rpartition('/')[2]}{instead(files)}.")
    if missing := [name for name in names if name not in files.sizes]:
        noun = "tars" if suffix == ".tar" else "files"
        raise ValueError(
            f"{len(missing)} of {len(names)} {noun} are missing in {folder}, the first is {missing[0]}"
            f"{_why_missing(files, missing[0])}."
        )
    if compressed := [name for name in names if name.lower().endswith(COMPRESSED_TARS.suffixes)]:
        raise _compressed(files, compressed)
    return NamedFiles(files, names, [])


def _why_missing(files: Files, name: str) -> str:
    if name in files.odd:
        return f", which {files.odd[name]}"
    similar = next((other for other in files.sizes if other.startswith(name)), None)
    return f", but there is {similar}; unpack or rename it" if similar else ""


def _matching(files: Files, pattern: str) -> Sequence[str]:
    """Return the names of a pattern with ``*``, or the name itself."""
    if "*" not in pattern:
        return [pattern]
    expression = re.compile(".*".join(map(re.escape, pattern.split("*"))))
    names = sorted([*files.sizes, *files.odd])
    return [name for name in names if "/" not in name and not is_litter(name) and expression.fullmatch(name)]


def _left_out(files: Files, names: Sequence[str], suffix: str) -> list[LeftOut]:
    """Return the files of a folder that are left out.

    Raises ValueError for an entry that should be read but cannot be: a broken link with the suffix, or a compressed
    tar that belongs to the same series.
    """
    for name, reason in files.odd.items():
        if name.lower().endswith(suffix):
            raise ValueError(f"{files.place}/{name} {reason}; repair it, or remove it.")
    compressed = [
        name for name in files.sizes if name.lower().endswith(COMPRESSED_TARS.suffixes) and not is_litter(name)
    ]
    series = {_series(name) for name in names}
    if of_series := [name for name in compressed if _series(name) in series]:
        raise _compressed(files, of_series)
    return [*odd_entries(files), *(LeftOut(name, COMPRESSED_TARS.reason, False) for name in compressed)]


def _series(name: str) -> str:
    """Return the common part of the names of a series: the path up to the suffix, without digits."""
    folder, _, base = name.rpartition("/")
    return f"{folder}/{re.sub(r'[0-9]+', '', base.partition('.')[0])}"


def _compressed(files: Files, names: Sequence[str]) -> ValueError:
    return ValueError(
        f"{files.place}/{names[0]} is compressed, as are {len(names)} of the tars there, and a compressed tar cannot "
        "be read at random; unpack it to .tar (gunzip, unxz, unzstd)."
    )
