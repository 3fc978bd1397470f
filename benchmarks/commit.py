"""Which version a result line is of."""

import shutil
import subprocess
from pathlib import Path


def current_commit() -> str:
    """The commit of this checkout, with ``-dirty`` where files differ from it; empty where there is no git."""
    if shutil.which("git") is None:
        return ""
    words = ("git", "describe", "--always", "--dirty", "--exclude=*")
    return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
