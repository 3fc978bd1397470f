"""List the files of a source that it does not read; ignore files that are not data."""

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

_ODD = Kind("broken links, pipes or devices", "repair or remove", ())


def left_out_images(listing: Listing, read: Collection[str]) -> list[LeftOut]:
    """Return the files that lie among the images in ``read`` and are left out.

    Images in an unsupported format, broken links and the like are listed and count as unreadable images. Archives and
    videos are listed. Text files, tables and litter are ignored. A file with any other suffix counts as an image where
    its first bytes are those of one; in a remote store it is listed without being opened.
    """
    found = [_of_file(listing, name) for name in listing.sizes if name not in read]
    return [entry for entry in found if entry is not None] + odd_entries(listing)


def odd_entries(listing: Listing) -> list[LeftOut]:
    """Return the entries that are not files (a broken link, a pipe); those with an image's name count as images.

    A broken link without a suffix counts as images too: it may have led to a folder of them.
    """
    return [LeftOut(name, f"it {reason}", _may_be_images(name, reason)) for name, reason in listing.odd.items()]


def _may_be_images(name: str, reason: str) -> bool:
    if name.lower().endswith(image_suffixes()):
        return True
    return reason.startswith("is a link to nothing") and "." not in name.rpartition("/")[2]


def _of_file(listing: Listing, name: str) -> LeftOut | None:
    if is_litter(name) and not is_placeholder(name):
        return None
    if kind := kind_of(name):
        return LeftOut(name, kind.reason, kind.is_image) if kind.reason else None
    if is_companion(name):
        return None
    if not listing.is_near:
        return LeftOut(name, "its name does not end like an image's", False)
    try:
        title = image_format(listing.read(name, 0, HEAD_BYTES))
    except (OSError, ValueError, UnreadableImageError) as error:
        return LeftOut(name, f"it cannot be opened ({error})", False)
    return LeftOut(name, f"it is a {title} image, but its suffix is another; rename it", True) if title else None


def instead(listing: Listing) -> str:
    """Return the end of a sentence on files that another source reads or that can be converted.

    An example is ``", but 3 tar files, the first is a.tar; read with ..."``. It is empty where there are no such files.
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
