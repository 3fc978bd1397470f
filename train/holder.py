"""The process that holds a lock behind a URL, told from all others: by its machine, the machine's boot, and its start.

A host name is no identity: containers share them, and a process id means nothing outside of its namespace.
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
_DEAD = ("Z", "X")  # states of a process that runs no more
_Word = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]  # it is shown to people


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, and how often they have renewed it.

    Nothing else says that a process is the same one: ``boot`` is drawn anew at each start of a machine,
    ``pid_namespace`` is where ``pid`` means something, and ``started`` tells a process from a later one of its number.
    None: this machine does not say.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    owner: _Word  # of this try to hold it
    host: _Word  # for people
    pid: Annotated[int, Field(ge=1)]
    beat: Annotated[int, Field(ge=0)] = 0
    boot: _Word | None = None
    pid_namespace: _Word | None = None
    started: Annotated[int, Field(ge=0)] | None = None  # clock ticks after the boot

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}"

    def to_json(self) -> bytes:
        """Return the fields that `read_holder` reads."""
        return json.dumps(seal(asdict(self))).encode()

    def is_gone(self) -> bool:
        """Return whether the holder was a process of this boot of this machine, in this namespace, and has ended.

        False where that cannot be known: then only signs of life tell.
        """
        here = this_process()
        mine = (here.host, here.boot, here.pid_namespace)  # the host, too: machines are cloned while they run
        if None in (self.started, *mine) or (self.host, self.boot, self.pid_namespace) != mine:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:  # it is another user's
            pass
        found = _state_and_start(str(self.pid))
        return found is not None and (found[0] in _DEAD or found[1] != self.started)


def this_process() -> Holder:
    """Return this process as a holder, with as much of its identity as this machine says."""
    host = socket.gethostname().encode("ascii", "replace").decode().replace(" ", "_") or "unknown"
    plain = Holder(owner=secrets.token_hex(8), host=host[:255], pid=os.getpid())
    try:
        if str((_PROC / "self").readlink()) != str(plain.pid):  # /proc is that of another namespace
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
    """Return the holder that a lock names, or None where it names none that we can trust.

    An earlier version of this program wrote host and process alone, without a hash: they are shown to people.
    """
    try:
        record = parse_object(content, name)
        holder = validate(Holder, unseal(record, name, required="boot" in record), name)
    except DamagedFileError:
        return None
    return holder


def _state_and_start(pid: str) -> tuple[str, int] | None:
    """State and start of a process out of /proc/PID/stat, or None where they cannot be read."""
    try:
        text = (_PROC / pid / "stat").read_text(encoding="ascii", errors="replace")
        fields = text.rpartition(")")[2].split()  # after its name, which may hold anything
        return fields[0], int(fields[19])
    except (OSError, ValueError, IndexError):
        return None
