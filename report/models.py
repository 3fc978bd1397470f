"""Name the models of evaluation records, and sort them by size, patch size, and kind (family and block type)."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from report.paper import PAPERS_FAMILY, SIZES


class Kind(NamedTuple):
    """The family and block type that all models of one scaling curve share."""

    family: str
    block: str | None  # None where networks of the family have no block types

    @property
    def name(self) -> str:
        """Return a short name: that of the paper's blocks, or else of the family, with its blocks where it has any."""
        if self.block and self.family != PAPERS_FAMILY:
            return f"{self.family}, {self.block}"
        return self.block or self.family

    @property
    def models(self) -> str:
        """Return the words for several models of this kind, such as "models with adaLN-Zero blocks"."""
        of_family = "" if self.family == PAPERS_FAMILY else f" of the family {self.family}"
        return f"models{of_family} with {self.block} blocks" if self.block else f"models{of_family}"


def kind_of(record: Mapping[str, Any]) -> Kind:
    """Return the kind of a record's model."""
    return Kind(record["family"], record.get("block"))


def size_name(record: Mapping[str, Any]) -> str:
    """Return the record's size, or else the paper's S, B, L or XL, or width and depth, or the family."""
    width, depth = record.get("width"), record.get("depth")
    if record.get("size"):
        return str(record["size"])
    return SIZES.get((width, depth), f"d{width} n{depth}") if width and depth else str(record["family"])


def size_order(record: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return a key that sorts sizes: by depth and width, and then by parameters where a network does not have them."""
    width, depth = record.get("width"), record.get("depth")
    return (depth, width, 0) if width and depth else (0, 0, record["parameters"])


def patch_name(record: Mapping[str, Any]) -> str:
    """Return "patch size 2", or "no patches" for a network without them."""
    return f"patch size {record['patch_size']}" if record.get("patch_size") else "no patches"


def patch_order(record: Mapping[str, Any]) -> int:
    """Return a key that sorts patch sizes: from large to small, and networks without patches last."""
    return -(record.get("patch_size") or 0)


def patch_names(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the patch sizes of records, from large to small."""
    return list(dict.fromkeys(patch_name(record) for record in sorted(records, key=patch_order)))


def model_name(record: Mapping[str, Any]) -> str:
    """Return "XL/2", "d64 n4 p2" for sizes that are not the paper's, or the size alone if there are no patches."""
    size, patch_size = size_name(record), record.get("patch_size")
    if patch_size is None:
        return size
    return f"{size}/{patch_size}" if size in SIZES.values() else f"{size} p{patch_size}"
