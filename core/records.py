"""Read and write JSON records that carry a hash of their own content, and check them against a schema.

`seal` adds the hash as the field ``record_sha256``; `read_record` detects a flipped bit, a truncation or a missing
field, and names the file and the fault. Untrusted JSON is parsed in this file only.
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
_adapters: dict[type, TypeAdapter[Any]] = {}
_LONGEST_PLACE = 100  # characters of a field's name in an error: keys are untrusted too


def printable(text: str) -> str:
    """Return a text from a file that will be shown. Raises ValueError where it has control characters."""
    if not text.isprintable():
        raise ValueError("it must be printable")
    return text


def canonical_hash(content: Any, *, spaced: bool = False, then: Iterable[bytes] = ()) -> str:
    """Return the SHA-256 (64 hexadecimal digits) of JSON values and of the bytes in ``then``; key order is ignored.

    ``spaced`` puts a space after each comma and colon. Identities of plans, sources and kept results are hashes of the
    spaced text and must not change; seals are hashes of the compact text.
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
    """Return the record without its hash; errors call the record ``name``.

    Raises DamagedFileError where the hash does not match the content, or is missing although ``required``. Earlier
    versions of this program wrote some records without a hash.
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
    """Return the JSON values of a text; errors call the text ``name``.

    Raises DamagedFileError for invalid JSON, and for NaN, Infinity, numbers of thousands of digits and nesting that is
    too deep to parse.
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError:
        raise DamagedFileError(f"{name} is damaged: its brackets are nested too deeply.") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DamagedFileError(f"{name} is damaged: it is not JSON ({' '.join(str(error).split())[:200]}).") from None


def parse_object(text: bytes | str, name: str) -> dict[str, Any]:
    """Return the JSON object that a text consists of. Raises DamagedFileError for anything else."""
    content = parse_json(text, name)
    if not isinstance(content, dict):
        raise DamagedFileError(f"{name} is damaged: it holds {_kind(content)} where a JSON object should be.")
    return content


def _adapter_of(kind: type[T]) -> TypeAdapter[T]:
    """Return pydantic's checker of a type, which takes milliseconds to make."""
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def validate(kind: type[T], content: Any, name: str) -> T:
    """Return an instance of a typed class (a dataclass or a pydantic model) made from JSON values.

    Types are strict: a number in quotes is not a number. Raises DamagedFileError that names the first invalid field.
    """
    try:
        adapter: TypeAdapter[T] = _adapter_of(kind)
        return adapter.validate_json(json.dumps(content), strict=True)  # from JSON a list may become a tuple
    except (ValidationError, RecursionError) as error:
        raise DamagedFileError(f"{name} is damaged: {_first_fault(error)}.") from None


def check(kind: type[Any], content: Any, name: str) -> None:
    """Raise as `validate` does, without converting the JSON values.

    Use it for values that must stay exactly as they were read: 1 does not become 1.0, and text may contain surrogates
    from a file name that is not UTF-8.
    """
    try:
        text = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        _adapter_of(kind).validate_json(text, strict=True)
    except (ValidationError, RecursionError) as error:
        raise DamagedFileError(f"{name} is damaged: {_first_fault(error)}.") from None


def read_record(path: Path, kind: type[T], required_seal: bool = True) -> T:
    """Read one sealed JSON record as ``kind``.

    Raises OSError as `open` does, and DamagedFileError where the file is not a regular file, is too large, is not
    JSON, does not match its hash, or has fields that ``kind`` does not allow.
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
    raise ValueError(f"{name} is not a JSON number")
