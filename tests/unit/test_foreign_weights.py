"""Weights of other programs are read in every container format, or refused in one sentence of ours."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign_files import (
    assert_same_weights,
    prefixed,
    released_weights,
    saved,
    zeros_like,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from launch.builders.foreign import ForeignNetwork, read_foreign
from model.family import Facts
from model.released import from_reference, to_reference

GOLDEN = released_weights()
OTHER = zeros_like(GOLDEN)
ARGS = argparse.Namespace(lr=1e-4, model="DiT-XL/2", num_classes=10)
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4)}}, "param_groups": [{"lr": 1e-4}]}


def read(path: Path, weights: str = "ema", **facts: Any) -> ForeignNetwork:
    return read_foreign(str(path), weights, Facts(num_heads=4, **facts))


def refusal(path: Path, weights: str = "ema", **facts: Any) -> str:
    """Return the one sentence that refuses a file; it names the file and quotes none of PyTorch's advice."""
    with pytest.raises(ValueError, match=path.name) as caught:
        read(path, weights, **facts)
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert not {"weights_only", "safe_globals", "WeightsUnpickler", "PytorchStreamReader"} & set(sentence.split("."))
    for words in ("weights_only", "safe_globals", "Unpickl", "StreamReader", "trust the source"):
        assert words not in sentence
    return sentence


WRAPPINGS: dict[str, tuple[Any, str]] = {
    "as the reference trainer writes": ({"model": OTHER, "ema": GOLDEN, "opt": OPTIMIZER, "args": ARGS}, "ema"),
    "without an average": ({"model": GOLDEN, "opt": OPTIMIZER, "args": ARGS}, "model"),
    "published": (GOLDEN, ""),
    "state_dict": ({"state_dict": GOLDEN, "epoch": 3}, "state_dict"),
    "data parallel": (prefixed("module.", GOLDEN), ""),
    "compiled": (prefixed("_orig_mod.", GOLDEN), ""),
    "compiled, then data parallel": ({"ema": prefixed("module._orig_mod.", GOLDEN)}, "ema"),
    "data parallel, then compiled": ({"model": prefixed("_orig_mod.module.", GOLDEN)}, "model"),
    "each block compiled": ({name.replace(".attn.", "._orig_mod.attn."): GOLDEN[name] for name in GOLDEN}, ""),
    "torch's average": ({**prefixed("module.", GOLDEN), "n_averaged": torch.tensor(7)}, ""),
    "a module with parts": (
        {"state_dict": {**prefixed("ema.", GOLDEN), **prefixed("net.", OTHER), "vae.w": torch.ones(2)}},
        "state_dict/ema",
    ),
    "an average by another name": (
        {"model": OTHER, "model_ema": {"module": GOLDEN, "decay": 0.9999}},
        "model_ema/module",
    ),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_wrapping_of_the_same_tensors_is_read_and_named(tmp_path: Path, wrapping: str, legacy: bool) -> None:
    content, name = WRAPPINGS[wrapping]
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    network = read(tmp_path / "a.pt")
    assert_same_weights(network.model, from_reference(GOLDEN, num_heads=4))
    said = " ".join(network.notes)
    assert (f"its table {name!r} is used" in said) == bool(name)
    assert ("may not be averaged weights" in said) == (bool(name) and "ema" not in name)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "ema."])
def test_one_safetensors_file_is_read(tmp_path: Path, prefix: str) -> None:
    save_file(prefixed(prefix, GOLDEN), tmp_path / "a.safetensors")
    assert_same_weights(read(tmp_path / "a.safetensors").model, from_reference(GOLDEN, num_heads=4))
    (tmp_path / "a.safetensors").rename(tmp_path / "a.bin")  # known by its content
    assert_same_weights(read(tmp_path / "a.bin").model, from_reference(GOLDEN, num_heads=4))


def test_torchs_own_average_of_a_module_is_read(tmp_path: Path) -> None:
    """Read what AveragedModel itself saves, not only its names."""
    module = torch.nn.Module()
    for name, value in GOLDEN.items():
        place = module
        *path, leaf = name.split(".")
        for part in path:
            place = place.get_submodule(part) if part in dict(place.named_children()) else _added(place, part)
        place.register_parameter(leaf, torch.nn.Parameter(value.clone()))
    network = read(saved(tmp_path / "a.pt", AveragedModel(module).state_dict()))
    assert_same_weights(network.model, from_reference(GOLDEN, num_heads=4))


def _added(place: torch.nn.Module, part: str) -> torch.nn.Module:
    place.add_module(part, torch.nn.Module())
    return place.get_submodule(part)


def test_weights_chooses_among_the_tables_and_two_averages_are_not_guessed_between(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", {"model": GOLDEN, "ema": OTHER})
    assert_same_weights(read(path, "model").model, from_reference(GOLDEN, num_heads=4))
    assert_same_weights(read(path).model, from_reference(OTHER, num_heads=4))
    assert "has 2 tables of weights ('model', 'ema'), but 'raw' does not identify one" in refusal(path, "raw")
    several = saved(tmp_path / "b.pt", {"ema_0.99": GOLDEN, "ema_0.9999": OTHER})
    assert "('ema_0.99', 'ema_0.9999'), but 'ema' does not identify one of them; choose one" in refusal(several)
    assert_same_weights(read(several, "ema_0.99").model, from_reference(GOLDEN, num_heads=4))
    unnamed = saved(tmp_path / "c.pt", GOLDEN)
    assert "has 1 table of weights (one without a name), but 'model' does not identify one" in refusal(unnamed, "model")
    twice = saved(tmp_path / "d.pt", {**GOLDEN, **prefixed("module.", OTHER)})
    assert "d.pt: a table of it has pos_embed twice, once as module.pos_embed; save only the one" in refusal(twice)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    rounded = {name: value.to(dtype) for name, value in GOLDEN.items()}
    model = read(saved(tmp_path / "a.pt", rounded)).model
    for name, value in to_reference(model).items():
        assert value.dtype == torch.float32
        assert torch.equal(value, rounded[name].float()), name


class _Exploit:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.marker,)


class _Innocent:
    pass


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_more_than_tensors_is_named_and_not_run(tmp_path: Path, legacy: bool) -> None:
    """Name the refused type, and advise something that does not run the file's content here."""
    path = tmp_path / "bad.pt"
    for name, value in {
        f"{os.mkdir.__module__}.mkdir": _Exploit(str(tmp_path / "ran")),
        f"{__name__}._Innocent": _Innocent(),
        "numpy._core.multiarray.scalar": np.float64(1.0),
        "pathlib.PosixPath": Path("/x"),
    }.items():
        torch.save({"ema": GOLDEN, "args": value}, path, _use_new_zipfile_serialization=not legacy)
        sentence = refusal(path)
        assert f"besides tensors and plain values it has {name}, and loading that would run code" in sentence
        assert "save the tensors alone, as torch.save({'ema': checkpoint['ema']}, 'weights.pt')" in sentence
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["new.pt", "old.pt", "a.safetensors"])
def test_a_cut_file_is_cut_short_wherever_it_was_cut(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save({"ema": GOLDEN}, path, _use_new_zipfile_serialization=name == "new.pt")
    else:
        save_file(GOLDEN, path)
    whole = path.read_bytes()
    for length in (3, 7, 100, len(whole) // 3, len(whole) // 2, len(whole) - 1000, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert f"{path} is cut short: it has {length} bytes" in refusal(path), length
    path.write_bytes(b"")
    assert f"{path} is empty (0 bytes)" in refusal(path)


def test_a_flipped_bit_in_a_released_file_is_found_anywhere(tmp_path: Path) -> None:
    """Flip bits, since PyTorch verifies no checksum and would silently load a weight with a changed exponent."""
    path = saved(tmp_path / "a.pt", {"ema": GOLDEN, "args": ARGS})
    whole = path.read_bytes()
    good = from_reference(GOLDEN, num_heads=4)
    for place in np.random.default_rng(0).integers(0, len(whole), 60):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << (int(place) % 8)
        path.write_bytes(damaged)
        try:
            assert_same_weights(read(path).model, good)  # in the padding of the archive a bit says nothing
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017  either outcome is right


def test_a_file_saved_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        saved(tmp_path / "a.pt", GOLDEN)
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same_weights(read(tmp_path / "a.pt").model, from_reference(GOLDEN, num_heads=4))


def test_what_is_no_file_of_weights_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    assert f"There is no file {path}" in refusal(path)
    os.mkfifo(path)
    assert f"{path} is a named pipe, but it must be a file" in refusal(path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert f"{path} is a device, but it must be a file" in refusal(path)
    path.unlink()
    path.symlink_to(path)
    assert f"{path} is a link that leads back to itself, but it must be a file" in refusal(path)
    path.unlink()
    path.mkdir()
    assert f"{path} is not the folder of a diffusers DiT or U-Net: it has no config.json" in refusal(path)
    path.rmdir()
    assert "cannot be read: File name too long" in refusal(tmp_path / f"{'x' * 300}.pt")


def test_files_of_other_kinds_are_named_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(b"<!DOCTYPE html><html>Not found</html>")
    assert "neither a PyTorch nor a safetensors file: it begins with b'<!DOCTYPE html><'" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n")
    assert f"{path} is a pointer of Git LFS, not the weights; fetch them with `git lfs pull`" in refusal(path)
    path.write_bytes(pickle.dumps(GOLDEN, protocol=4))
    assert f"{path} is a pickle that torch.save did not write, so it is not loaded" in refusal(path)
    with path.open("wb") as file:
        np.savez(file, a=np.ones(3))
    assert f"{path} is an archive, but not one that torch.save wrote: it has no data.pkl" in refusal(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)
    assert f"{path} is a TorchScript program, which is never run" in refusal(path)
    saved(path, [GOLDEN])
    assert f"{path} has no table of weights, but a list" in refusal(path)
    saved(path, {"model": {"conv.weight": torch.ones(3)}, "step": 1})
    found = refusal(path)
    assert f"{path} has no table of weights: nothing in it is named x_embedder.proj.weight (DiT, SiT, Light" in found
    saved(path, from_reference(GOLDEN, num_heads=4).state_dict())
    assert f"{path} is part of a checkpoint of this program; give the folder that contains it" in refusal(path)


def test_an_archive_that_was_packed_again_is_refused(tmp_path: Path) -> None:
    """Refuse compressed records: mapped into memory, they would be taken for values."""
    with (
        zipfile.ZipFile(saved(tmp_path / "a.pt", GOLDEN)) as source,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in source.infolist():
            packed.writestr(record.filename, source.read(record))
    assert "was repacked by another program; unpack it and save it by torch.save" in refusal(tmp_path / "b.pt")


def test_tensors_that_are_no_plain_finite_numbers_are_refused_by_name(tmp_path: Path) -> None:
    name = "blocks.0.attn.qkv.weight"
    value = GOLDEN[name]
    nan = value.clone()
    nan[3, 4] = float("nan")
    cases: dict[str, Tensor] = {
        f"{name} has values that are not finite": nan,
        f"{name} is torch.int8": value.to(torch.int8),
        f"{name} is torch.float32 (torch.sparse_coo)": value.to_sparse(),
        f"{name} is (144, 48), but fewer numbers than that are stored for it": torch.zeros(1).expand(value.shape),
        f"{name} is (7, 48), not (144, 48)": value[:7].clone(),
    }
    for words, bad in cases.items():
        assert words in refusal(saved(tmp_path / "a.pt", {"ema": {**GOLDEN, name: bad}}))


@pytest.mark.parametrize(("rows", "default"), [(11, 10), (10, 9), (1, 1)])
def test_both_readings_of_a_label_table_are_said_and_one_is_chosen(tmp_path: Path, rows: int, default: int) -> None:
    table = GOLDEN["y_embedder.embedding_table.weight"][:rows].clone()
    path = saved(tmp_path / "a.pt", {**GOLDEN, "y_embedder.embedding_table.weight": table})
    network = read(path)
    assert network.model.config.num_classes == default
    assert network.model.has_null_class == (rows > 1)
    if rows == 1:
        assert network.notes == (f"{path}: its label table has 1 row: one class, and no null class.",)
        return
    (note,) = network.notes
    assert f"has {rows} rows: {rows - 1} classes and the null class, or {rows} classes of a trainer without" in note
    assert f"foreign.num_classes={rows} takes the second" in note
    without = read(path, num_classes=rows)
    assert (without.model.config.num_classes, without.model.has_null_class, without.notes) == (rows, False, ())
    assert read(path, num_classes=rows - 1).notes == ()
    assert f"foreign.num_classes is 3, but its label table has {rows} rows" in refusal(path, num_classes=3)


@pytest.mark.parametrize(("trained", "has_null_class"), [(11, False), (10, True)])
def test_what_the_trainer_said_of_its_classes_decides(tmp_path: Path, trained: int, has_null_class: bool) -> None:
    arguments = argparse.Namespace(num_classes=trained)
    network = read(saved(tmp_path / "a.pt", {"ema": GOLDEN, "args": arguments}))
    assert (network.model.config.num_classes, network.model.has_null_class) == (trained, has_null_class)
    assert not any("label table" in note for note in network.notes)


def test_heads_that_do_not_fit_are_refused_by_the_setting_that_there_is(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.pt", GOLDEN)
    for heads in (0, 5, -4):
        with pytest.raises(ValueError, match=rf"foreign.num_heads is {heads}, which does not divide the width 48"):
            read_foreign(str(path), "ema", Facts(num_heads=heads))
    with pytest.raises(ValueError, match=r"width 48 do not contain its number of heads; give foreign.num_heads"):
        read_foreign(str(path), "ema", Facts())
