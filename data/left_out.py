"""Name the files of a source that it does not read; pass over in silence what is no data."""

from collections import defaultdict
from collections.abc import Collection, Iterator

from data.files import Listing
from data.images import UnreadableImageError
from data.unread import (
    HEAD_BYTES,
    Kind,
    LeftOut,
    image_format,
    image_suffixes,
    is_companion,
    is_litter,
    is_placeholder,
    kind_of,
)

_ODD = Kind("links to nothing, pipes or devices", "mend or remove", ())


def left_out_images(listing: Listing, read: Collection[str]) -> list[LeftOut]:
    """Return what lies among the images that are ``read`` and is left out.

    An image in a format that is not read, a link to nothing and the like are named and count as images that cannot be
    read. Archives and videos are named. Nothing is said of texts, tables and litter. Files with other names are images
    where they begin like one; those of a store are not looked into, but named.
    """
    found = [_of_file(listing, name) for name in listing.sizes if name not in read]
    return [entry for entry in found if entry is not None] + odd_entries(listing)


def odd_entries(listing: Listing) -> list[LeftOut]:
    """Return what is no file: a link to nothing, a pipe. It counts as an image where its name may be one's."""
    return [LeftOut(name, f"it {reason}", _may_be_images(name, reason)) for name, reason in listing.odd.items()]


def _may_be_images(name: str, reason: str) -> bool:
    if name.lower().endswith(image_suffixes()):
        return True
    return reason.startswith("is a link to nothing") and "." not in name.rpartition("/")[2]  # it may be a folder


def _of_file(listing: Listing, name: str) -> LeftOut | None:
    if is_litter(name) and not is_placeholder(name):
        return None
    if kind := kind_of(name):
        return LeftOut(name, kind.reason, kind.is_image) if kind.reason else None
    if is_companion(name):
        return None
    if not listing.is_near:
        return LeftOut(name, "its name does not end as an image's", False)
    try:
        title = image_format(listing.read(name, 0, HEAD_BYTES))
    except (OSError, ValueError, UnreadableImageError) as error:
        return LeftOut(name, f"it cannot be looked into ({error})", False)
    return LeftOut(name, f"it is a {title} image, but its name does not end so; rename it", True) if title else None


def instead(listing: Listing) -> str:
    """Return what a place holds that another source reads, or that can be made readable: the end of a sentence.

    It is ``", but N tar files, the first is a.tar; read them with ..."``, or empty where there is nothing such.
    """
    names: dict[Kind, list[str]] = defaultdict(list)
    for kind, name in _kinds_in(listing):
        names[kind].append(name)
    if not names:
        return ""
    kind = max(names, key=lambda kind: len(names[kind]))
    why = f", which {listing.odd[names[kind][0]]}" if kind is _ODD else ""
    first = f"{listing.place}/{names[kind][0]}"
    way_out = kind.way_out.format(place=listing.place, folder=listing.place, first=first)
    return f", but {len(names[kind])} {kind.plural}, the first is {names[kind][0]}{why}; {way_out}"


def _kinds_in(listing: Listing) -> Iterator[tuple[Kind, str]]:
    images = Kind("images", "read with data/source=image_folder data.source.root={place}", image_suffixes())
    for name in listing.sizes:
        if name.lower().endswith(images.suffixes) and not is_litter(name):
            yield images, name
        elif (kind := kind_of(name)) and (not is_litter(name) or is_placeholder(name)):
            yield kind, name
    for name in listing.odd:
        yield _ODD, name
