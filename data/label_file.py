"""Read labels from a ``dataset.json`` next to the images, as NVlabs' ``dataset_tool.py`` writes it (StyleGAN, EDM).

It is ``{"labels": [["00000/img00000000.png", 6], ...]}``, or ``{"labels": null}`` without labels. The folders in these
paths number the images and are not classes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from core.reading import MAX_RECORD_BYTES
from core.records import parse_json
from data.files import Listing
from data.images import UnreadableImageError
from data.tar_members import MAX_LABEL
from data.unread import LeftOut

LABEL_FILE = "dataset.json"


class Labelled(NamedTuple):
    """The classes of a source and the labels of its images."""

    class_names: list[str]
    labels: list[int]  # of the paths, in their order
    left_out: list[LeftOut]
    notes: list[str]
    identity: list[int] | None  # the labels, where they do not follow from the paths


def labels_of_file(listing: Listing, paths: Sequence[str]) -> Labelled | None:
    """Return the labels of ``dataset.json``, or None where there is none in this format.

    Raises ValueError where it is damaged, an image has no label in it, or a label is not a whole number.
    """
    if LABEL_FILE not in listing.sizes:
        return None
    where = f"{listing.place}/{LABEL_FILE}"
    if listing.sizes[LABEL_FILE] > MAX_RECORD_BYTES:
        raise ValueError(
            f"{where} has {listing.sizes[LABEL_FILE]} bytes, but at most {MAX_RECORD_BYTES} are read of it; remove it."
        )
    try:
        content = parse_json(listing.read(LABEL_FILE), where)
    except UnreadableImageError as error:  # raised by a zip file
        raise ValueError(f"{where} cannot be read: {error.reason}.") from error
    if not isinstance(content, dict) or "labels" not in content:
        return None
    if content["labels"] is None:
        return Labelled(["images"], [0] * len(paths), [], [], None)
    given = _pairs(content["labels"])
    if given is None or not given.keys() & set(paths):
        return None
    if missing := [path for path in paths if path not in given]:
        raise ValueError(
            f"{len(missing)} of {len(paths)} images in {listing.place} have no label in {LABEL_FILE}, the first is "
            f"{missing[0]}; add them, or remove {LABEL_FILE}."
        )
    labels = [_label(given[path], path, where) for path in paths]
    absent = sorted(given.keys() - set(paths))
    left_out = [LeftOut(path, f"{LABEL_FILE} has a label for it, but it does not exist", True) for path in absent]
    return Labelled([str(number) for number in range(max(labels) + 1)], labels, left_out, [], labels)


def _pairs(entries: Any) -> dict[str, Any] | None:
    """Return the labels by path, or None where the entries are not pairs of path and label."""
    if not isinstance(entries, list):
        return None
    pairs = [entry for entry in entries if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)]
    if len(pairs) != len(entries):
        return None
    return {path.replace("\\", "/"): label for path, label in pairs}


def _label(label: Any, path: str, where: str) -> int:
    if type(label) is not int or not 0 <= label <= MAX_LABEL:
        shown = repr(label)[:40]
        raise ValueError(
            f"{where} gives {path} the label {shown}, but a label is a whole number from 0 to {MAX_LABEL}."
        )
    return label
