"""List the files below a local folder, following links, and report entries that are not files."""

import errno
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from core.reading import kind_of_node
from data.unread import image_suffixes, is_litter

MAX_WAYS = 1000  # paths to one folder; links to folders of links could otherwise multiply without end

_ABSENT = (errno.ENOENT, errno.ENOTDIR)
_Identity = tuple[int, int]


class Tree(NamedTuple):
    """The entries below a folder by their relative paths."""

    sizes: dict[str, int]  # bytes of each file
    folders: list[str]  # at the first level
    odd: dict[str, str]  # every other entry, and why it cannot be read


class _Folder(NamedTuple):
    path: str
    prefix: str  # of the relative paths of its entries
    above: frozenset[_Identity]  # itself and its parents


def local_tree(root: str, recursive: bool = True) -> Tree:
    """List a folder and, with ``recursive``, all folders below it except hidden ones.

    Links to a parent folder, broken links, pipes, devices, sockets and empty folders with the name of an image are
    reported as odd and never opened. Raises OSError where ``root`` is not a folder, and ValueError for a folder that
    may not be listed.
    """
    tree = Tree({}, [], {})
    todo = [_Folder(root, "", frozenset([_identity(Path(root).stat())]))]
    ways: Counter[_Identity] = Counter()
    while todo:
        folder = todo.pop()
        entries = _entries(folder, root)
        if not entries and folder.prefix[:-1].lower().endswith(image_suffixes()):
            tree.odd[folder.prefix[:-1]] = "is an empty folder"
        for entry in entries:
            name = folder.prefix + entry.name
            status = _status(entry, name, tree)
            if status is None or (is_litter(entry.name) and not stat.S_ISREG(status.st_mode)):
                continue
            if stat.S_ISREG(status.st_mode):
                tree.sizes[name] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                tree.odd[name] = f"is {kind_of_node(status.st_mode)}"
            elif (identity := _identity(status)) in folder.above:
                tree.odd[name] = "is a link to a folder that contains it"
            else:
                ways[identity] += 1
                if ways[identity] > MAX_WAYS:
                    raise ValueError(
                        f"{entry.path} is reached by more than {MAX_WAYS} paths through links; remove some."
                    )
                if not folder.prefix:
                    tree.folders.append(name)
                if recursive:
                    todo.append(_Folder(entry.path, f"{name}/", folder.above | {identity}))
    return Tree(dict(sorted(tree.sizes.items())), sorted(tree.folders), dict(sorted(tree.odd.items())))


def _entries(folder: _Folder, root: str) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder.path) as entries:
            return list(entries)
    except OSError as error:
        if error.errno in _ABSENT and folder.prefix:  # deleted in the meantime
            return []
        if folder.prefix or isinstance(error, PermissionError):
            raise ValueError(
                f"The folder {folder.path} cannot be listed ({error.strerror}); grant the permission to read it, or "
                f"move it out of {root}."
            ) from error
        raise


def _status(entry: "os.DirEntry[str]", name: str, tree: Tree) -> os.stat_result | None:
    """Return the status of an entry or of a link's target; where there is none, report the entry as odd."""
    try:
        return entry.stat()
    except OSError as error:
        if is_litter(entry.name):
            return None
        if not entry.is_symlink():
            if error.errno not in _ABSENT:
                tree.odd[name] = f"cannot be examined ({error.strerror})"
        elif error.errno in _ABSENT:
            tree.odd[name] = f"is a link to nothing ({_target(entry)})"
        else:
            tree.odd[name] = f"is a link that cannot be followed ({error.strerror})"
        return None


def _target(entry: "os.DirEntry[str]") -> str:
    try:
        return str(Path(entry.path).readlink())
    except OSError:
        return "deleted in the meantime"


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino
