"""The settings of ``ditscale launch tpu``, parsed from words NAME=VALUE."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

from core.closest import closest

VERBS = ("start", "stop", "logs", "delete")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,60}[a-z0-9])?")
_PLACE = re.compile(r"[A-Za-z0-9._:-]+")
_YES, _NO = ("true", "yes", "1"), ("false", "no", "0")


@dataclass(frozen=True)
class TpuSettings:
    """The slice that ``gcloud`` is asked for. Raises ValueError for a text that it cannot take."""

    name: str  # of the slice
    zone: str  # such as us-central2-b
    type: str = ""  # such as v3-128; needed to start
    version: str = "tpu-ubuntu2204-base"  # of the software on the hosts
    project: str = ""  # empty: gcloud's own setting
    spot: bool = False  # cheaper, and preempted at any time
    queued: bool = False  # wait for the slice in Google's queue
    folder: str = "ditscale"  # of the code on each host, below the home folder
    install: str = (  # in that folder; uv brings Python 3.11, which the hosts' Ubuntu does not have
        "python3 -m pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --python 3.11 .venv && "
        "~/.local/bin/uv pip install --quiet --python .venv --constraint constraints.txt '.[tpu,remote]'"
    )
    program: str = ".venv/bin/ditscale"  # in that folder
    most_starts: int = 100  # after preemptions and requests to be started again
    poll_sec: float = 10.0  # between looks at a slice that does not exist yet
    dry_run: bool = False  # print the calls of gcloud instead

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(
                f"name is {self.name!r}, but a slice's name has 1 to 62 lower-case letters, digits and hyphens, and "
                "begins with a letter; choose another."
            )
        for each in ("zone", "type", "version", "project"):
            value = getattr(self, each)
            if value and not _PLACE.fullmatch(value):
                raise ValueError(f"{each} is {value!r}, but it has letters, digits, and . _ : - alone; correct it.")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._/-]*", self.folder):
            raise ValueError(f"folder is {self.folder!r}, but it is a path below the home folder; choose another.")


def parsed(verb: str, words: Sequence[str]) -> TpuSettings:
    """Return the settings of the words. Raises ValueError for an unknown, missing or repeated one, or a wrong type."""
    hints = get_type_hints(TpuSettings)
    given: dict[str, Any] = {}
    for word in words:
        key, mark, value = word.partition("=")
        if not mark:
            raise ValueError(f"{word!r} is not NAME=VALUE; put the command for the slice after --.")
        if key not in hints:
            raise ValueError(f"`ditscale launch tpu` has no setting {key!r}{closest(key, hints)}")
        if key in given:
            raise ValueError(f"{key} is given twice, as {given[key]!r} and {value!r}; leave one out.")
        given[key] = _typed(key, value, hints[key])
    needed = ["name", "zone", *(["type"] if verb == "start" else [])]
    missing = [key for key in needed if not given.get(key)]
    if missing:
        raise ValueError(f"{missing[0]} is missing; give it as {missing[0]}=VALUE.")
    return TpuSettings(**given)


def _typed(key: str, value: str, kind: Any) -> Any:
    if kind is bool:
        if value.lower() not in (*_YES, *_NO):
            raise ValueError(f"{key} is {value!r}, but it must be true or false.")
        return value.lower() in _YES
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{key} is {value!r}, but it must be a number.") from None


def shown() -> str:
    """Return a line of text for each setting, with its default."""
    rows = [(each.name, "" if each.default is MISSING else each.default) for each in fields(TpuSettings)]
    return "\n".join(f"  {name:11s} {default}".rstrip() for name, default in rows)
