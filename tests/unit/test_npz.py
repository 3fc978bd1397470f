"""The bytes of npz files never change, since hashes and caches depend on them."""

import hashlib
from pathlib import Path

import numpy as np

from core.npz import Blocks, read_npz, write_npz

ARRAYS = {
    "label": np.arange(50, dtype=np.int32),
    "source_id": np.array(["a", "bc"] * 25),
    "layout": np.array([(512, 2560)] * 3, dtype=np.int64),
    "about": np.array("{}"),
    "empty": np.zeros((0, 3)),
}


def test_an_index_has_the_bytes_of_the_versions_before(tmp_path: Path) -> None:
    write_npz(tmp_path / "x.npz", ARRAYS)
    found = hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()
    assert found == "cb701fde920eb27329540d50067c388e5f89cc3c051d63c563a10e70b1bb9a4d"


def test_a_reference_and_images_have_the_bytes_that_numpy_writes(tmp_path: Path) -> None:
    """Write it in one piece or in blocks."""
    np.savez(tmp_path / "numpy.npz", **ARRAYS)  # type: ignore[arg-type]
    label = ARRAYS["label"]
    blocks = Blocks(label.shape, label.dtype, iter([label[:20], label[20:]]))
    for arrays in (ARRAYS, {**ARRAYS, "label": blocks}):
        write_npz(tmp_path / "ours.npz", arrays, zip64=True)
        assert (tmp_path / "ours.npz").read_bytes() == (tmp_path / "numpy.npz").read_bytes()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    for zip64 in (False, True):
        write_npz(tmp_path / "x.npz", ARRAYS, zip64)
        found = read_npz((tmp_path / "x.npz").read_bytes(), "x.npz", list(ARRAYS))
        assert list(found) == list(ARRAYS)
        for name, array in ARRAYS.items():
            assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
            assert found[name].tobytes() == array.tobytes()
