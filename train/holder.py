"""Identify the process that holds a lock behind a URL: by its machine, the machine's boot, and its start time.

A host name does not identify a machine, since containers share names; a process id means nothing outside its namespace.
"""

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field

from core.reading import DamagedFileError
from core.records import parse_object, seal, unseal, validate

_PROC = Path("/proc")
_DEAD = ("Z", "X")  # /proc states of a process that has ended
_Word = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]  # printable, since messages show it


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock, and how often it has renewed the lock.

    These fields identify a process: ``boot`` is drawn at each start of a machine, ``pid`` is valid in
    ``pid_namespace``, and ``started`` distinguishes a process from a later one with the same id. A field is None where
    the machine does not provide it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    owner: _Word  # drawn at each attempt to take the lock
    host: _Word  # shown in messages
    pid: Annotated[int, Field(ge=1)]
    beat: Annotated[int, Field(ge=0)] = 0
    boot: _Word | None = None
    pid_namespace: _Word | None = None
    started: Annotated[int, Field(ge=0)] | None = None  # clock ticks since boot

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"

    def to_json(self) -> bytes:
        """Return the content of a lock, which `read_holder` reads."""
        return json.dumps(seal(asdict(self))).encode()

    def is_gone(self) -> bool:
        """Return whether the holder ran in this boot of this machine, in this process namespace, and has ended.

        False where that cannot be known: then only a missing renewal shows that the holder has ended.
        """
        here = this_process()
        mine = (here.host, here.boot, here.pid_namespace)  # the host too: running machines can be cloned
        if None in (self.started, *mine) or (self.host, self.boot, self.pid_namespace) != mine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # the process belongs to another user
            pass
        found = _state_and_start(str(self.pid))
        return found is not None and (found[0] in _DEAD or found[1] != self.started)


def this_process() -> Holder:
    """Return this process as a holder, with as much of its identity as this machine provides."""
    host = socket.gethostname().encode("ascii", "replace").decode().replace(" ", "_") or "unknown"
    plain = Holder(owner=secrets.token_hex(8), host=host[:255], pid=os.getpid())
    try:
        if str((_PROC / "self").readlink()) != str(plain.pid):  # /proc belongs to another namespace
            return plain
        boot = (_PROC / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = str((_PROC / "self/ns/pid").readlink())
    except (OSError, ValueError):
        return plain
    found = _state_and_start("self")
    if found is None:
        return plain
    return Holder(plain.owner, plain.host, plain.pid, boot=boot, pid_namespace=namespace, started=found[1])


def read_holder(content: bytes, name: str) -> Holder | None:
    """Return the holder that a lock names, or None where its content is not valid.

    Earlier versions of this program wrote only host and process id, without a hash; messages show these.
    """
    try:
        record = parse_object(content, name)
        holder = validate(Holder, unseal(record, name, required="boot" in record), name)
    except DamagedFileError:
        return None
    return holder


def _state_and_start(pid: str) -> tuple[str, int] | None:
    """Return state and start time of a process from /proc/PID/stat, or None where they cannot be read."""
    try:
        text = (_PROC / pid / "stat").read_text(encoding="ascii", errors="replace")
        fields = text.rpartition(")")[2].split()  # after the process name, which may contain spaces and parentheses
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
