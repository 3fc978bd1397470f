"""Find the table of a network's tensors in a file, under whatever names a trainer or a wrapper added."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launch.builders.weight_files import WeightFile
from model.diffusers_weights import ANCHOR as DIFFUSERS_ANCHOR
from model.families import FAMILIES
from model.sd_diffusers import ANCHOR as UNET_ANCHOR

EMA = "ema"
# Parts of a tensor's name that a wrapper adds: DistributedDataParallel and AveragedModel, torch.compile, FSDP,
# activation checkpointing. No tensor of a network has such a part of its own.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTERS = {"n_averaged"}  # of torch's AveragedModel: the number of updates
_OURS = "patch_embedding.weight"
_ANCHORS = tuple(dict.fromkeys(family.anchor for family in FAMILIES))
_DEEPEST = 3  # levels of nested mappings that are searched
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Table(NamedTuple):
    """A table of tensors under the names of some program, without the prefixes of its wrappers."""

    name: str  # where it was found, such as "ema"; "" where the file itself is the table
    tensors: dict[str, Tensor]
    rest: tuple[str, ...] = ()  # names of other tensors in the same mapping


def choose_table(file: WeightFile, path: Path, wanted: str) -> tuple[Table, list[str]]:
    """Return the table to use, and sentences on which one it is.

    ``wanted`` names it; ``ema`` also matches a file's only table, since a file need not state that it has averages.
    Raises ValueError where it is absent, where several could be meant, and where the tensors are not weights.
    """
    try:
        tables = list(_tables(file.content, "", 0))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not tables:
        raise ValueError(_no_table(path, file.content))
    found = [table for table in tables if table.name == wanted] or _only(tables, wanted)
    names = ", ".join(repr(table.name) if table.name else "one without a name" for table in tables)
    if len(found) != 1:
        raise ValueError(
            f"{path} has {len(tables)} table{'s' * (len(tables) > 1)} of weights ({names}), but {wanted!r} does "
            "not identify one of them; choose one by weights=NAME, or save it in a file of its own."
        )
    table = found[0]
    require_numbers(table.tensors, path)
    notes = []
    if table.name:
        others = f" (of {names})" if len(tables) > 1 else ""
        averaged = "" if _is_average(table.name) else f"; there is no {EMA!r}, so these may not be averaged weights"
        notes.append(f"{path}: its table {table.name!r} is used{others}{averaged if wanted == EMA else ''}.")
    if table.rest:
        notes.append(f"{path}: {len(table.rest)} other tensors next to it are not used; the first is {table.rest[0]}.")
    return table, notes


def _only(tables: list[Table], wanted: str) -> list[Table]:
    """Return the tables that ``ema`` may mean where none has that very name."""
    if wanted != EMA:
        return []
    return tables if len(tables) == 1 else [table for table in tables if _is_average(table.name)]


def _is_average(name: str) -> bool:
    return EMA in name.lower()


def _tables(content: Mapping[Any, Any], place: str, depth: int) -> Iterator[Table]:
    """Yield every table at or below a mapping, named by its place."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    yield from _tables_of(_unwrapped(tensors, place), place)
    if depth < _DEEPEST:
        for name, value in content.items():
            if isinstance(value, Mapping):
                yield from _tables(value, f"{place}/{name}" if place else str(name), depth + 1)


def _tables_of(tensors: dict[str, Tensor], place: str) -> Iterator[Table]:
    """Split the tensors of one mapping by the prefixes before programs' names, such as ``ema.`` and ``model.``."""
    for family in FAMILIES:
        tensors = dict(family.restored(tensors))
    prefixes = [
        name.removesuffix(anchor)
        for name in tensors
        for anchor in _ANCHORS
        if name == anchor or name.endswith(f".{anchor}")
    ]
    prefixes.sort(key=len, reverse=True)  # a longer prefix takes its tensors first
    mine: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    rest = []
    for name, value in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is None:
            rest.append(name)
        else:
            mine[prefix][name.removeprefix(prefix)] = value
    for prefix, table in mine.items():
        yield Table("/".join(part for part in (place, prefix.rstrip(".")) if part), table, tuple(rest))


def _unwrapped(tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
    """Return the tensors, with the parts that wrappers added removed from their names."""
    found: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if bare in found:
            raise ValueError(
                f"a table of it{place and f' ({place})'} has {bare} twice, once as {name}; save only the one to use."
            )
        if bare not in _COUNTERS:
            found[bare] = value
    return found


def _no_table(path: Path, content: Mapping[Any, Any]) -> str:
    names = [str(name) for name in content]
    if _OURS in names:
        return f"{path} is part of a checkpoint of this program; give the folder that contains it."
    if DIFFUSERS_ANCHOR in names or UNET_ANCHOR in names:
        return f"{path} has diffusers' names, which need a config.json; give the folder that holds both."
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"{path} has no table of weights: nothing in it is named {_anchors()} (it has {shown or 'nothing'}); give a "
        ".pt file of one of these programs, or a diffusers folder."
    )


def _anchors() -> str:
    """Return the tensors by which tables are found, each with its families."""
    return " or ".join(
        f"{anchor} ({', '.join(family.name for family in FAMILIES if family.anchor == anchor)})" for anchor in _ANCHORS
    )


def require_numbers(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise ValueError for tensors that are not dense, finite floating-point numbers, or exceed their storage."""
    for name, value in tensors.items():
        if value.layout != torch.strided or value.dtype not in _DTYPES:
            raise ValueError(f"{path}: {name} is {value.dtype} ({value.layout}), but weights are dense float32.")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{path}: {name} is {tuple(value.shape)}, but fewer numbers than that are stored for it.")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite, as of a diverged run; give another file.")
