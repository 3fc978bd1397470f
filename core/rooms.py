"""List the rooms and what each may import. Packaging, tests and hashes of the source use this list."""

import hashlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A room may import the rooms in its set, and itself.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "core": frozenset(),
    "model": frozenset({"core"}),
    "diffusion": frozenset({"core"}),
    "data": frozenset({"core", "model", "diffusion"}),
    "runtime": frozenset({"core", "model", "diffusion"}),
    "train": frozenset({"core", "model", "diffusion", "data", "runtime"}),
    "evaluation": frozenset({"core", "model", "diffusion", "data", "runtime", "train"}),
    "report": frozenset({"core", "train", "evaluation"}),
    "launch": frozenset({"core", "model", "diffusion", "data", "runtime", "train", "evaluation", "report"}),
}


def source_files(*rooms: str, root: Path = ROOT) -> list[Path]:
    """Return the Python files of rooms, or of folders such as ``evaluation/features``, in the order of their paths."""
    return [path for room in rooms for path in sorted((root / room).rglob("*.py"))]


def source_hash(*rooms: str, root: Path = ROOT) -> str:
    """Return the SHA-256 of the Python files of rooms and of their paths."""
    digest = hashlib.sha256()
    for path in source_files(*rooms, root=root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes())
    return digest.hexdigest()
