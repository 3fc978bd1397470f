"""Find the commit that a result line belongs to."""

import shutil
import subprocess
from pathlib import Path


def current_commit() -> str:
    """Return the commit of this checkout, with ``-dirty`` if files differ from it; empty if git is not installed."""
    if shutil.which("git") is None:
        return ""
    words = ("git", "describe", "--always", "--dirty", "--exclude=*")
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
