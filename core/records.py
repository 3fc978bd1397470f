"""JSON records that carry a hash over all of themselves, checked against a schema when they are read back.

`seal` adds the hash as the field ``record_sha256``; `read_record` finds a flipped bit, a cut or a missing field, and
says which file and what. Anything that a stranger may have written is parsed here and nowhere else.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from core.reading import DamagedFileError, read_regular

T = TypeVar("T")

SEAL = "record_sha256"
_LONGEST_PLACE = 100  # letters of a field's name in an error: keys are a stranger's too


def canonical_hash(content: Any, *, spaced: bool = False, then: Iterable[bytes] = ()) -> str:
    """Return the SHA-256 of JSON values, whatever the order of keys, and of bytes that come after: 64 digits.

    ``spaced`` puts a space after each comma and colon: identities of plans, sources and kept results are hashes of
    such a text, and stay what they are; seals are hashes of the other.
    """
    text = json.dumps(content, sort_keys=True, separators=(", ", ": ") if spaced else (",", ":"))
    digest = hashlib.sha256(text.encode())
    for more in then:
        digest.update(more)
    return digest.hexdigest()


def seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON values with their hash as the last field."""
    assert SEAL not in content, "a record is sealed once"
    return {**content, SEAL: canonical_hash(content)}


def unseal(content: dict[str, Any], name: str, required: bool = True) -> dict[str, Any]:
    """Return the record without its hash; ``name`` stands in errors.

    Raises DamagedFileError where the hash is not that of the content, or is missing though ``required``: earlier
    versions of this program wrote some records without one.
    """
    if SEAL not in content:
        if required:
            raise DamagedFileError(f"{name} is damaged: it has no {SEAL}.")
        return content
    body = {key: value for key, value in content.items() if key != SEAL}
    if (found := canonical_hash(body)) != content[SEAL]:
        raise DamagedFileError(f"{name} is damaged: its content has sha256 {found}, but it says {content[SEAL]!r}.")
    return body


def parse_json(text: bytes | str, name: str) -> Any:
    """Return the JSON values of a text; ``name`` stands in errors. Raises DamagedFileError for anything else.

    Numbers that JSON does not know (NaN, Infinity), numbers of thousands of digits and bottomless nesting are damage.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise DamagedFileError(f"{name} is damaged: its brackets are nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedFileError(f"{name} is damaged: it is not JSON ({' '.join(str(error).split())[:200]}).") from None


def parse_object(text: bytes | str, name: str) -> dict[str, Any]:
    """Return the one JSON object of a text. Raises DamagedFileError for anything else."""
    content = parse_json(text, name)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{name} is damaged: it holds {_kind(content)} where a JSON object should be.")
    return content


def validate(kind: type[T], content: Any, name: str) -> T:
    """Return an instance of a typed class (a dataclass, a pydantic model) made of JSON values.

    Types are strict: a number in quotes is no number. Raises DamagedFileError that names the first field at fault.
    """
    try:
        adapter: TypeAdapter[T] = TypeAdapter(kind)
        return adapter.validate_json(json.dumps(content), strict=True)  # from JSON a list may become a tuple
    except (ValidationError, RecursionError) as error:
        raise DamagedFileError(f"{name} is damaged: {_first_fault(error)}.") from None


def check(kind: type[Any], content: Any, name: str) -> None:
    """Raise as `validate` does, and leave the JSON values as they are.

    For values that must come out as they were read: a number that was written as 1 becomes no 1.0, and text may hold
    what is left of a file's name that is not UTF-8.
    """
    try:
        text = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        TypeAdapter(kind).validate_json(text, strict=True)
    except (ValidationError, RecursionError) as error:
        raise DamagedFileError(f"{name} is damaged: {_first_fault(error)}.") from None


def read_record(path: Path, kind: type[T], required_seal: bool = True) -> T:
    """Read one sealed JSON record as ``kind``.

    Raises OSError as `open` does, and DamagedFileError where the file is no regular one, too large, not JSON, has
    another hash than it says, or fields of other types than ``kind`` has.
    """
    content = unseal(parse_object(read_regular(path), str(path)), str(path), required_seal)
    return validate(kind, content, str(path))


def _first_fault(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "its brackets are nested too deeply"
    found = error.errors(include_url=False)[0]
    place = ".".join(map(str, found["loc"]))[:_LONGEST_PLACE] or "it"
    given = repr(found.get("input"))
    shown = given if len(given) <= 80 else f"{given[:80]}..."
    message = found["msg"][:1].lower() + found["msg"][1:]
    if found["type"] == "missing":
        return f"it has no {place}"
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"it has a field {place}, which this program does not know"
    return f"{place} is {shown}, but {message}"


def _kind(content: Any) -> str:
    return "null" if content is None else f"a {type(content).__name__}"


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse_constant(text)


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
