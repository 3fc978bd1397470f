"""Derive classes from a folder with one folder of images per class; reject folders that cannot be classes."""

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from data.files import Listing
from data.label_file import Labelled
from data.unread import LeftOut, is_litter
from data.zip_files import is_zip

_PARTS_OF_A_SET = ("train", "training", "val", "valid", "validation", "dev", "eval", "test", "testing")
_SHOWN = 3


def classes_of_folders(listing: Listing, paths: Sequence[str], left_out: Sequence[LeftOut]) -> Labelled:
    """Return the classes: the first folder of each path, in alphabetical order; one class if there are no folders.

    Raises ValueError where some images lie inside folders and some outside, where a folder has no readable image, and
    where the folders are the splits of a data set (train, val).
    """
    folders = [path.split("/")[0] if "/" in path else None for path in paths]
    loose = folders.count(None)
    if 0 < loose < len(folders):
        raise ValueError(
            f"{loose} of {len(folders)} images in {listing.place} lie outside the class folders, the first is "
            f"{paths[folders.index(None)]}; move them into one, or remove them."
        )
    if loose:
        return Labelled(["images"], [0] * len(paths), [], [], None)
    class_names = sorted({folder for folder in folders if folder})
    _require_classes(listing, class_names, left_out)
    _require_no_parts(listing.place, class_names, paths)
    numbers = {class_name: number for number, class_name in enumerate(class_names)}
    labels = [numbers[folder] for folder in folders if folder]
    return Labelled(class_names, labels, [], _notes(listing.place, class_names, paths), None)


def _require_classes(listing: Listing, class_names: Sequence[str], left_out: Sequence[LeftOut]) -> None:
    """Raise ValueError that names the folders which would be classes if their files could be read."""
    held: dict[str, list[str]] = {folder: [] for folder in listing.folders if folder not in class_names}
    for name in [*listing.sizes, *listing.odd]:
        folder = name.partition("/")[0]
        if folder in held and "/" in name and not is_litter(name):
            held[folder].append(name)
    reasons = {entry.source_id: entry.reason for entry in left_out}
    lost = {folder: _why_lost(names, reasons) for folder, names in held.items()}
    lost = {folder: why for folder, why in lost.items() if why}
    lost |= {
        name: reason
        for name, reason in listing.odd.items()
        if "/" not in name and "." not in name and reason.startswith("is a link to nothing")
    }
    if lost:
        shown = ", ".join(f"{folder} ({why})" for folder, why in list(lost.items())[:_SHOWN])
        raise ValueError(
            f"{len(lost)} of {len(lost) + len(class_names)} class folders in {listing.place} have no image that can "
            f"be read: {shown}{', ...' if len(lost) > _SHOWN else ''}; convert what is in them to JPEG or PNG, or "
            "remove them."
        )


def _why_lost(names: Sequence[str], reasons: Mapping[str, str]) -> str:
    """Return why a folder gives no class although it should; empty where it only holds text files and the like."""
    if not names:
        return "is empty"
    first = next((name for name in names if name in reasons), None)
    return "" if first is None else f"{PurePosixPath(first).name}: {reasons[first].partition(';')[0]}"


def _require_no_parts(place: str, class_names: Sequence[str], paths: Sequence[str]) -> None:
    are_parts = all(name.lower() in _PARTS_OF_A_SET for name in class_names)
    if are_parts and all(path.count("/") >= 2 for path in paths):
        one = (
            "unpack it and give one" if is_zip(place) else f"give one, data.source.root={_below(place, class_names[0])}"
        )
        raise ValueError(f"{place} holds {', '.join(class_names)}, which are parts of a data set, not classes; {one}.")


def _notes(place: str, class_names: Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return a note to the user that a single folder which holds folders of images is one class."""
    inner = {path.split("/")[1] for path in paths if path.count("/") >= 2}
    if len(class_names) > 1 or len(inner) < 2 or not all(path.count("/") >= 2 for path in paths):
        return []
    root = _below(place, class_names[0])
    return [
        f"All images lie in {len(inner)} folders of {root}, which is 1 class; if they are the classes, give "
        f"data.source.root={root}."
    ]


def _below(place: str, folder: str) -> str:
    return f"{place.rstrip('/')}/{folder}"
