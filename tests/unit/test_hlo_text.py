"""`benchmarks/tpu_aot.py` reads and rewrites the text of a program correctly."""

import re

import numpy as np
import pytest

from benchmarks.hlo_text import collectives, shape_bytes, slices_of, spread, totals

PROGRAM = """\
HloModule step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.9 = bf16[8,4]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, to_apply=%add
  ROOT %slice = bf16[2,4]{1,0} dynamic-slice(%all-reduce.9, %offset), dynamic_slice_sizes={2,4}
}

ENTRY %main (p: f32[4,4]) -> f32[] {
  %all-reduce.1 = (f32[]{:T(256)}, /*index=1*/bf16[3,5]{1,0}) all-reduce(%a, %b), channel_id=2, to_apply=%add
  %fusion.2 = bf16[2,4]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.1
  %all-gather-start.3 = (f32[1,4]{1,0}, f32[4,4]{1,0}) all-gather-start(%p), channel_id=3, dimensions={0}
  %all-gather-done.3 = f32[4,4]{1,0} all-gather-done(%all-gather-start.3)
  ROOT %sum = f32[] get-tuple-element(%all-reduce.1), index=0
}
"""


def devices_of(sharding: str) -> np.ndarray:
    """Return the device of each tile, for both forms of a sharding (explicit list; iota, reshaped and transposed)."""
    found = re.match(r"devices=\[([\d,]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))", sharding)
    assert found is not None, sharding
    tiles, iota, order, explicit = ([int(n) for n in group.split(",")] if group else [] for group in found.groups())
    ids = np.array(explicit) if explicit else np.arange(np.prod(iota)).reshape(iota).transpose(order or None)
    return ids.reshape(tiles)


def written(tiles: np.ndarray) -> str:
    return f"devices=[{','.join(map(str, tiles.shape))}]{','.join(map(str, tiles.flatten()))}"


def test_each_collective_is_counted_once_with_the_bytes_of_its_result() -> None:
    assert totals(collectives(PROGRAM)) == {
        "all-gather": {"count": 1, "bytes": 4 * 4 * 4},
        "all-reduce": {"count": 1, "bytes": 4 + 3 * 5 * 2},
        "reduce-scatter": {"count": 1, "bytes": 8 * 4 * 2},
    }


def test_a_sum_that_each_device_keeps_a_piece_of_is_told_from_one_that_it_keeps_whole() -> None:
    whole = {one.name: one.shapes for one in collectives(PROGRAM)}
    assert whole["all-reduce.9"] == ((8, 4),)
    assert slices_of(PROGRAM, "all-reduce.9") == [(2, 4)]
    assert whole["all-reduce.1"] == ((), (3, 5))
    assert slices_of(PROGRAM, "all-reduce.1") == []


@pytest.mark.parametrize(
    ("shape", "size"), [("f32[]", 4), ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12), ("(pred[5], s64[2]{0})", 5 + 16)]
)
def test_bytes_of_a_shape_are_those_of_its_elements(shape: str, size: int) -> None:
    assert shape_bytes(shape) == size


def test_a_sharding_over_all_devices_grows_with_them() -> None:
    np.testing.assert_array_equal(
        devices_of(spread(written(np.arange(8).reshape(1, 8, 1)), 8, 32)), np.arange(32).reshape(1, 32, 1)
    )


def test_a_sharding_over_the_last_mesh_axis_keeps_its_parts_and_gets_more_copies() -> None:
    few, many = np.arange(4 * 2).reshape(4, 2), np.arange(16 * 2).reshape(16, 2)  # data x fsdp
    sharding = written(few.T.reshape(2, 1, 4)) + " last_tile_dim_replicate"
    wide = spread(sharding, 8, 32)
    assert wide.endswith(" last_tile_dim_replicate")
    np.testing.assert_array_equal(devices_of(wide), many.T.reshape(2, 1, 16))


def test_as_many_devices_change_nothing() -> None:
    assert spread("devices=[8]0,1,2,3,4,5,6,7", 8, 8) == "devices=[8]0,1,2,3,4,5,6,7"
