"""Damage files in every way that a reader must detect; fail if a reader waits forever."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


def flip(path: Path, bit: int | None = None) -> None:
    """Flip one bit: the given one, else one in the middle."""
    content = bytearray(path.read_bytes())
    place = 8 * (len(content) // 2) + 3 if bit is None else bit
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        remove(path)
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped bit": flip,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "junk": lambda path: path.write_bytes(b"\x80junk" * 50),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": remove,
    "a folder": _replaced(Path.mkdir),
    "a pipe": _replaced(os.mkfifo),
    "a device": _replaced(lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": _replaced(lambda path: path.symlink_to(path.name)),
}
REPLACEABLE = {kind: damage for kind, damage in DAMAGES.items() if kind != "a folder"}  # a new file takes its place


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it takes longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
