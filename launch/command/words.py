"""Prepare the words of a command line for Hydra's grammar, so that they are read as the user meant them.

Hydra's grammar gives a meaning to ``( ) = , # ! & ~ { }`` and more, which a path may contain. So a value that Hydra
cannot parse is quoted, a leading ``~`` becomes the home folder, and ``-m`` may stand anywhere.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

MULTIRUN = ("-m", "--multirun")
_STRUCTURED = re.compile(
    r"\s*(?:[\[{'\"]|\$\{|(?:choice|range|interval|glob|sort|shuffle|tag|int|float|str|bool|json_str)\()"
)
_WORD = re.compile(r"(?P<key>[+~]{0,2}[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)


def prepared(words: Sequence[str]) -> list[str]:
    """Return the words for Hydra: ``-m`` first, then each ``NAME=VALUE``, quoted where Hydra cannot parse the value."""
    is_sweep = any(word in MULTIRUN for word in words)
    others = [_readable(word, is_sweep) for word in words if word not in MULTIRUN]
    return [*(["-m"] if is_sweep else []), *others]


def key_of(word: str) -> str:
    """Return the key of an override: ``data.name`` of ``+data.name=mine``."""
    return word.lstrip("+~").split("=", 1)[0]


def quoted(key: str, value: str) -> str:
    """Return an override whose value is exactly this text, with special characters escaped."""
    escaped = re.sub(r"(\\*)('|$)", lambda found: found.group(1) * 2 + ("\\'" if found.group(2) else ""), value)
    return f"{key}='{escaped}'"


def _readable(word: str, is_sweep: bool) -> str:
    found = _WORD.fullmatch(word)
    if found is None or word.startswith("-"):
        return word
    key, value = found["key"], found["value"]
    if value == "~" or value.startswith("~/"):
        return quoted(key, str(Path(value).expanduser()))
    if _STRUCTURED.match(value):
        return word
    if value != value.strip() or not _is_read(word):
        return quoted(key, value)
    if "," in value and (_exists(value) or ("/" in value and not is_sweep)):
        return quoted(key, value)  # else it would be several values
    return word


def _is_read(word: str) -> bool:
    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _exists(value: str) -> bool:
    try:
        return Path(value).exists()
    except (OSError, ValueError):
        return False
