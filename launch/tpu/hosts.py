"""Write the shell commands for the hosts of a slice, in which every value is quoted, and pack the code for them."""

import shlex
import tarfile
from collections.abc import Sequence
from pathlib import Path

from core.rooms import MAY_IMPORT, ROOT

ARCHIVE = "ditscale.tar.gz"  # in the home folder
LOG, PID, EXIT = "run.log", "run.pid", "run.exit"  # in the code's folder
_FILES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")


def pack(into: Path) -> Path:
    """Write the code, without tests, data or runs, as an archive in a folder, and return its path.

    Raises ValueError where this program was not installed from a checkout, which `pip install` on a host needs.
    """
    if not (ROOT / "setup.cfg").exists():
        raise ValueError(f"{ROOT} has no setup.cfg to install from; start from a checkout of ditscale.")
    path = into / ARCHIVE
    with tarfile.open(path, "w:gz") as archive:
        for name in (*MAY_IMPORT, "conf", *_FILES):
            if (ROOT / name).exists():
                archive.add(ROOT / name, name, filter=_source)
    return path


def _source(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return None if "__pycache__" in Path(member.name).parts else member


def installing(folder: str, install: str) -> str:
    """Return the command that unpacks the code and installs it; ``install`` is the user's own line of shell."""
    place = shlex.quote(folder)
    return f"mkdir -p {place} && tar -xzf {ARCHIVE} -C {place} && cd {place} && {{ {install}; }}"


def starting(folder: str, program: str, words: Sequence[str]) -> str:
    """Return the command that starts the program so that it outlives the connection, unless it runs already.

    Its output is appended to a log, its process id and later its exit code are written to files.
    """
    inner = f"{shlex.join([program, *words])} & echo $! > {PID}; wait $!; echo $? > {EXIT}"
    detached = f"setsid nohup sh -c {shlex.quote(inner)} >> {LOG} 2>&1 < /dev/null &"
    running = f"[ -f {PID} ] && [ ! -f {EXIT} ] && kill -0 $(cat {PID}) 2> /dev/null"
    return f"cd {shlex.quote(folder)} && if {running}; then :; else rm -f {PID} {EXIT}; {detached} fi"


def following(folder: str, first_line: int) -> str:
    """Return the command that shows the log from a line on until the program ends."""
    ended = f"while [ ! -f {EXIT} ]; do sleep 1; done; sleep 1; kill $tail"
    return f"cd {shlex.quote(folder)} && touch {LOG} && {{ tail -n +{first_line} -f {LOG} & tail=$!; {ended}; }}"


def lines_of_log(folder: str) -> str:
    """Return the command that prints the number of lines of the log."""
    return f"cd {shlex.quote(folder)} && wc -l < {LOG}"


def exit_code(folder: str) -> str:
    """Return the command that prints the program's exit code."""
    return f"cat {shlex.quote(folder)}/{EXIT}"


def stopping(folder: str) -> str:
    """Return the command that asks the program to save and stop."""
    return f"cd {shlex.quote(folder)} && kill -TERM $(cat {PID})"
