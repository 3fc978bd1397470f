"""Read the prompts that a user asks for: a text, several, or a file of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.reading import DamagedFileError, is_absent, read_regular
from core.records import parse_json
from data.conditions import Prompts
from data.text_conditions import checked_prompts

_SUFFIXES = (".txt", ".jsonl", ".json")
_MOST_BYTES = 2**30


def read_prompts(asked: str | Sequence[Any] | None) -> Prompts | None:
    """Return the prompts of a setting ``prompts``: a text, a list of texts, or the path of a file; None for None.

    A ``.txt`` has a prompt in each line. Each line of a ``.jsonl`` is {"prompt": text}, with "class" where a classifier
    should recognize the image as that number. A ``.json`` has COCO's captions. Raises ValueError where the file is
    missing, damaged or without prompts.
    """
    if asked is None:
        return None
    if not isinstance(asked, str):
        if not isinstance(asked, Sequence):
            raise ValueError(f"prompts is {asked!r}, which is not a text; put it into quotation marks: '\"{asked}\"'.")
        found = checked_prompts(asked, None, "prompts")
    elif asked.endswith(_SUFFIXES):
        found = _of_file(Path(asked).expanduser())
    else:
        found = checked_prompts([asked], None, "prompts")
    if not any(text.strip() for text in found.texts):
        raise ValueError(f"prompts={asked!r} has no text; give at least one.")
    return found


def _of_file(path: Path) -> Prompts:
    try:
        content = read_regular(path, _MOST_BYTES)
    except OSError as error:
        if is_absent(error):
            raise ValueError(f"There is no file {path} of prompts; give another, or a text.") from None
        raise ValueError(f"{path} cannot be read ({error.strerror}); grant the permission.") from error
    if path.suffix == ".json":
        return checked_prompts(list(_of_coco(parse_json(content, str(path)), str(path))), None, str(path))
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{path} is not text in UTF-8: byte {error.start} is wrong.") from None
    numbered = [(f"{path} line {number}", line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if path.suffix == ".txt":
        return Prompts(tuple(line for _, line in numbered))
    entries = [_entry(parse_json(line.encode(), place), place) for place, line in numbered]
    classes = [number for _, number in entries if number is not None]
    return checked_prompts([text for text, _ in entries], classes or None, str(path))


def _entry(fields: Any, place: str) -> tuple[str, int | None]:
    text = fields.get("prompt") if isinstance(fields, Mapping) else None
    if not isinstance(text, str):
        raise DamagedFileError(f'{place} is damaged: it is not {{"prompt": text}}.')
    number = fields.get("class")
    if number is not None and type(number) is not int:
        raise DamagedFileError(f"{place} is damaged: its class is {str(number)[:80]!r}, not a whole number.")
    return text, number


def _of_coco(fields: Any, place: str) -> Sequence[str]:
    entries = fields.get("annotations") if isinstance(fields, Mapping) else None
    if not isinstance(entries, list):
        raise DamagedFileError(f"{place} is damaged: it has no list 'annotations', as COCO's captions have.")
    found = [entry.get("caption") if isinstance(entry, Mapping) else None for entry in entries]
    texts = [" ".join(text.split()) for text in found if isinstance(text, str)]
    if len(texts) != len(found):
        raise DamagedFileError(f"{place} is damaged: {len(found) - len(texts)} of its annotations have no caption.")
    return texts
