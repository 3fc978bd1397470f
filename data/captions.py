"""Give captions to the images of any source: from a file that names the images, or made from their labels."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

from core.reading import DamagedFileError, is_absent, read_regular
from core.records import canonical_hash, parse_json, parse_object
from core.remote import is_remote, read_bytes
from data.sources import Example, Source, require_label, required_captions

MAX_CAPTION_FILE_BYTES = 2**30
_LINE_KEYS = ("captions", "caption", "text")  # of a line, the first that it has
_FIELD = re.compile(r"\{([^{}]*)\}")

CaptionsOf = Callable[[Example], Iterable[str]]


class Captions(Protocol):
    """Captions of images, from anywhere but their source."""

    fingerprint: str  # changes where a caption changes

    def match(self, source: Source) -> CaptionsOf:
        """Return a function that gives the captions of each example of a source; none where an image has none.

        Raises ValueError where the captions cannot be those of the source.
        """
        ...


@runtime_checkable
class _HasPaths(Protocol):
    """A source whose images are files, named by their paths."""

    paths: Sequence[str]  # below its root, the ``source_id`` of each example


class Captioned:
    """A `Source` with the images of another and with captions for them. Images without a caption are unreadable.

    Raises ValueError where the captions cannot be those of the source.
    """

    def __init__(self, source: Source, captions: Captions) -> None:
        self._source, self._captions_of = source, captions.match(source)
        self.name, self.class_names, self.block_sizes = source.name, source.class_names, source.block_sizes
        self.left_out, self.notes = source.left_out, source.notes
        self.fingerprint = canonical_hash([source.fingerprint, captions.fingerprint])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        require_label(self, example.source_id, example.label)
        return example._replace(captions=required_captions(self._captions_of(example), example.source_id))


class Templates:
    """Captions made from labels: each template gives one, with {name} of the class or {word} of ``words`` filled in.

    ``words`` has one for each class, in their order. Raises ValueError for a template with another field.
    """

    def __init__(self, templates: list[str], words: list[str] | None = None) -> None:
        if not templates:
            raise ValueError("captions.templates has 0 templates, but needs at least 1; add one, such as 'a {name}'.")
        known = ("name",) if words is None else ("name", "word")
        for template in templates:
            if other := [field for field in _FIELD.findall(template) if field not in known]:
                more = "; give captions.words, one for each class" if other[0] == "word" else ""
                allowed = " or ".join(f"{{{field}}}" for field in known)
                raise ValueError(f"A template is {template!r}, but {{{other[0]}}} must be {allowed}{more}.")
        self._templates, self._words = templates, words
        self.fingerprint = canonical_hash([templates, words])

    def match(self, source: Source) -> CaptionsOf:
        """Return a function that fills in the templates. Raises ValueError where words are missing or left over."""
        names = source.class_names
        words = names if self._words is None else self._words
        if len(words) != len(names):
            raise ValueError(
                f"captions.words has {len(words)} words, but {source.name} has {len(names)} classes; give one for each."
            )
        return lambda example: self._filled(names[example.label], words[example.label])

    def _filled(self, name: str, word: str) -> list[str]:
        texts = {"name": name, "word": word}
        return [_FIELD.sub(lambda field: texts[field[1]], template) for template in self._templates]


class CaptionLines:
    """Captions of a ``captions.jsonl``, or of the ``metadata.jsonl`` of Hugging Face's image folders.

    Each line is an object with ``file_name`` and ``text``, ``caption`` or a list ``captions``; several lines may be of
    one image. ``file`` is a path or URL. Raises ValueError that names the file and the line where it is damaged.
    """

    def __init__(self, file: str | None) -> None:
        self._file, content = _content(file)
        self._captions: dict[str, list[str]] = defaultdict(list)
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                name = f"{self._file} line {number}"
                fields = parse_object(line, name)
                self._captions[_image_path(fields.get("file_name"), name)] += _texts(fields, name)
        self.fingerprint = canonical_hash(["lines"], then=[content])

    def match(self, source: Source) -> CaptionsOf:
        """Return a function that looks an image up by its path below the source's root, else by its file name."""
        return _matched(self._captions, source, self._file)


class CocoCaptions:
    """Captions of COCO's ``captions_train2017.json`` and the like, several for each image.

    ``images`` have an ``id`` and a ``file_name``, ``annotations`` an ``image_id`` and a ``caption``. ``file`` is a path
    or URL. Raises ValueError that names the file and the entry where it is damaged.
    """

    def __init__(self, file: str | None) -> None:
        self._file, content = _content(file)
        self._captions: dict[str, list[str]] = {}
        fields = parse_object(content, self._file)
        paths: dict[int, str] = {}
        for place, entry in _entries(fields, "images", self._file):
            paths[_id(entry, "id", place)] = path = _image_path(entry.get("file_name"), place)
            self._captions.setdefault(path, [])
        for place, entry in _entries(fields, "annotations", self._file):
            if (image := _id(entry, "image_id", place)) not in paths:
                raise DamagedFileError(f"{place} is damaged: there is no image with the id {image}.")
            self._captions[paths[image]] += [_text(entry.get("caption"), place)]
        self.fingerprint = canonical_hash(["coco"], then=[content])

    def match(self, source: Source) -> CaptionsOf:
        """Return a function that looks an image up by its path below the source's root, else by its file name."""
        return _matched(self._captions, source, self._file)


def _matched(captions: Mapping[str, list[str]], source: Source, file: str) -> CaptionsOf:
    """Return a function that looks images up by their paths in ``file``; a path must not match two images.

    Raises ValueError where it does, where no image matches, and where the source's images have no paths.
    """
    if not isinstance(source, _HasPaths):
        raise ValueError(
            f"{file} names images by their paths, but those of {source.name} have none; use it with "
            "data/source=image_folder, or choose data/captions=none."
        )
    whole = captions.keys() & set(source.paths)
    ours, theirs = _by_file_name(source.paths, whole), _by_file_name(captions, whole)
    found = {path: path for path in whole}
    for name in ours.keys() & theirs.keys():
        if len(ours[name]) > 1 or len(theirs[name]) > 1:
            several, where = (ours[name], source.name) if len(ours[name]) > 1 else (theirs[name], file)
            raise ValueError(
                f"{file} has captions of {theirs[name][0]}, but {several[0]} and {several[1]} of {where} have the same "
                "file name; write the paths below data.source.root into it."
            )
        found[ours[name][0]] = theirs[name][0]
    if not found:
        raise ValueError(
            f"None of the {len(source.paths)} images of {source.name}, the first of which is {source.paths[0]}, is "
            f"among the {len(captions)} in {file}; name the file that belongs to them."
        )
    return lambda example: captions[found[example.source_id]] if example.source_id in found else ()


def _by_file_name(paths: Iterable[str], but: set[str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = defaultdict(list)
    for path in paths:
        if path not in but:
            names[PurePosixPath(path).name].append(path)
    return names


def _content(file: str | None) -> tuple[str, bytes]:
    """Return the name and the content of a file of captions. Raises ValueError where there is none."""
    if not file:
        raise ValueError("captions.file is missing; give it as captions.file=PATH.")
    if is_remote(file):
        return file, read_bytes(file, limit_bytes=MAX_CAPTION_FILE_BYTES)
    try:
        return file, read_regular(Path(file).expanduser(), MAX_CAPTION_FILE_BYTES)
    except OSError as error:
        if is_absent(error):
            raise ValueError(f"There is no {file}; give the file of captions as captions.file=PATH.") from None
        raise ValueError(f"{file} cannot be read ({error.strerror}); grant the permission.") from error


def _entries(fields: Mapping[str, Any], key: str, file: str) -> Iterable[tuple[str, dict[str, Any]]]:
    """Yield each object of a list, with its place for errors."""
    entries = fields.get(key)
    if not isinstance(entries, list):
        raise DamagedFileError(f"{file} is damaged: it has no list {key!r}, as COCO's captions have.")
    for number, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DamagedFileError(f"{file} is damaged: {key}[{number}] is not an object.")
        yield f"{file} {key}[{number}]", entry


def _id(entry: Mapping[str, Any], key: str, place: str) -> int:
    value = entry.get(key)
    if type(value) is not int:
        raise DamagedFileError(f"{place} is damaged: its {key} is {_shown(value)}, not a whole number.")
    return value


def _image_path(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value:
        raise DamagedFileError(f"{place} is damaged: its file_name is {_shown(value)}, not the name of an image.")
    return value.replace("\\", "/").removeprefix("./")


def _texts(fields: Mapping[str, Any], place: str) -> list[str]:
    key = next((key for key in _LINE_KEYS if key in fields), None)
    if key is None:
        raise DamagedFileError(f"{place} is damaged: it has none of {', '.join(map(repr, _LINE_KEYS))}.")
    return caption_texts(fields[key], place)


def caption_texts(value: Any, place: str) -> list[str]:
    """Return the captions of a JSON value: a text, a list of texts, or none for null. Errors call it ``place``.

    Raises DamagedFileError for anything else.
    """
    if value is None:
        return []
    return [_text(each, place) for each in value] if isinstance(value, list) else [_text(value, place)]


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise DamagedFileError(f"{place} is damaged: its caption is {_shown(value)}, not a text.")
    return value


def captions_in(content: bytes, suffix: str, place: str) -> list[str]:
    """Return the captions of a member of a tar: the text of a ``.txt``, or ``"caption"`` of a ``.json``.

    Raises DamagedFileError where it is neither.
    """
    if suffix == ".json":
        fields = parse_json(content, place)
        return caption_texts(fields.get("caption") if isinstance(fields, dict) else None, place)
    try:
        return [content.decode("utf-8-sig")]
    except UnicodeDecodeError as error:
        raise DamagedFileError(f"{place} is not text in UTF-8: byte {error.start} is wrong.") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
