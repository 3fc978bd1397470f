"""Read and rewrite HLO text: the shardings of tensors, and the collectives of a partitioned program."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s32": 32, "u32": 32, "f32": 32, "s64": 64, "f64": 64}
_COLLECTIVE = re.compile(rf"%(\S+) = (\(.*?\)|\S+) ({KINDS})(?:-done)?\(")


def spread(text: str, traced: int, cores: int) -> str:
    """Rewrite shardings over a mesh of ``traced`` devices for ``cores`` devices: its first axis, data, grows."""

    def widen(match: re.Match[str]) -> str:
        tiles, devices = ([int(number) for number in group.split(",")] for group in match.groups())
        if devices == list(range(traced)):  # sharded over all devices, or over the last axis where data has one device
            assert tiles.count(traced) == 1, match.group(0)
            order, tiles = f"<=[{cores}]", [cores if tile == traced else tile for tile in tiles]
        else:  # sharded over the last axis; the last tile counts the copies along the data axis
            shards = traced // tiles[-1]
            tiles[-1] = cores // shards
            order = f"<=[{tiles[-1]},{shards}]T(1,0)"
        return f"devices=[{','.join(map(str, tiles))}]{order}"

    return text if cores == traced else re.sub(r"devices=\[([\d,]+)\]([\d,]+)", widen, text)


class Collective(NamedTuple):
    """An operation by which devices exchange data; shapes and bytes are those of its result on one device."""

    name: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


def collectives(hlo: str) -> list[Collective]:
    """Return all collectives of a partitioned program.

    An asynchronous pair counts once, at its end. libtpu writes a reduce-scatter as a fusion whose computation is named
    all-reduce-scatter and contains an all-reduce; shapes and bytes are then those of the unscattered result.
    """
    found = []
    computation = ""
    for line in hlo.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line
        if match := _COLLECTIVE.search(line):
            name, shape, written = match.groups()
            kind = "reduce-scatter" if computation.startswith("%all-reduce-scatter") else written
            found.append(Collective(name, kind, tuple(dims for _, dims in _arrays(shape)), shape_bytes(shape)))
    return found


def totals(found: Sequence[Collective]) -> dict[str, dict[str, int]]:
    """Return, for each kind, the number of operations and the bytes of their results."""
    kinds = sorted({one.kind for one in found})
    sizes = {kind: [one.bytes for one in found if one.kind == kind] for kind in kinds}
    return {kind: {"count": len(sizes[kind]), "bytes": sum(sizes[kind])} for kind in kinds}


def slices_of(hlo: str, name: str) -> list[tuple[int, ...]]:
    """Return the shapes of the slices that devices take of the value ``name``."""
    cuts = re.findall(rf"= (\S+) dynamic-slice\(%{re.escape(name)},", hlo)
    return [dims for cut in cuts for _, dims in _arrays(cut)]


def shape_bytes(shape: str) -> int:
    """Return the bytes of an HLO shape or tuple of shapes, such as ``(f32[8,4]{1,0}, bf16[])``, without padding."""
    return sum(BITS[kind] // 8 * math.prod(dims) for kind, dims in _arrays(shape))


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return element type and dimensions of each array of a shape."""
    written = re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    return [(kind, tuple(int(n) for n in dims.split(",") if n)) for kind, dims in written]
