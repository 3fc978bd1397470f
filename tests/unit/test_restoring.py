"""A run's state is restored in one pass over each file, whose hash is checked over what the state got."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from test_saving import assert_equal_states, flip, save_by, trained
from test_training import everything, new_state

from core.records import SEAL, seal
from train import checkpoint
from train.checkpoint import load_checkpoint
from train.stores import FolderStore

STEP = "step_00000002"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a checkpoint whose parts have two files each."""
    save_by(2, FolderStore(tmp_path), trained())
    return tmp_path / STEP


@pytest.fixture(params=[1, 3])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def change_state(path: Path, change: Callable[[dict], None]) -> None:
    """Change the fields of ``state.json``, and seal it again."""
    content = json.loads((path / "state.json").read_text())
    del content[SEAL]
    change(content)
    (path / "state.json").write_text(json.dumps(seal(content)))


@pytest.mark.usefixtures("_threads")
def test_one_pass_over_each_file_restores_the_whole_state(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "read_tensors", None)  # the other reader
    restored = new_state()
    before = [value.data_ptr() for value in restored.model.parameters()]
    load_checkpoint(saved, restored)
    assert_equal_states(restored, trained())
    assert [value.data_ptr() for value in restored.model.parameters()] == before


def test_a_system_that_does_not_say_what_is_in_memory_restores_it_too(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "RWF_NOWAIT")
    restored = new_state()
    load_checkpoint(saved, restored)
    assert_equal_states(restored, trained())


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_a_flipped_bit_anywhere_in_a_file_is_found_and_the_file_named(saved: Path, part: str) -> None:
    name = f"{part}-00002-of-00002.safetensors"
    size = (saved / name).stat().st_size
    for at in (0, 7, 8, 40, size // 2, size - 1):
        flip(saved / name, at)
        with pytest.raises(ValueError, match=rf"{STEP} is damaged: {name} should have (xxh3_128|blake3) "):
            load_checkpoint(saved, new_state())
        flip(saved / name, at)
    load_checkpoint(saved, new_state())


def test_a_file_that_is_cut_or_replaced_by_another_kind_is_named(saved: Path) -> None:
    file = saved / "optimizer-00001-of-00002.safetensors"
    content = file.read_bytes()
    for size in (0, 7, 8, 100, len(content) - 1):
        file.write_bytes(content[:size])
        with pytest.raises(ValueError, match=rf"{STEP} is damaged: .*{file.name}"):
            load_checkpoint(saved, new_state())
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=rf"{STEP} is damaged: .*{file.name} is a named pipe"):
        load_checkpoint(saved, new_state())
    file.unlink()
    with pytest.raises(ValueError, match=rf"{STEP} has no {file.name}"):
        load_checkpoint(saved, new_state())


@pytest.mark.parametrize(
    "entry",
    [
        '{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}',
        '{"dtype":"F32","shape":[4611686018427387904,8],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}',
        '{"dtype":"F32","shape":"x","data_offsets":[0,4]}',
        '{"dtype":[],"shape":[],"data_offsets":[0,4]}',
        '{"dtype":"X","shape":[],"data_offsets":[0,4]}',
        "null",
        "{}",
    ],
)
def test_a_header_of_junk_allocates_nothing_and_its_file_is_named(saved: Path, entry: str) -> None:
    header = f'{{"\\ud800":{entry}}}'.encode()
    for length in (len(header), 2**62):
        (saved / "model-00001-of-00002.safetensors").write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors should have blake3"):
            load_checkpoint(saved, new_state())


def test_a_checkpoint_without_the_fast_hash_is_checked_by_the_other(saved: Path) -> None:
    change_state(saved, lambda content: content.pop("xxh3_128"))
    restored = new_state()
    load_checkpoint(saved, restored)
    assert_equal_states(restored, trained())
    flip(saved / "ema-00001-of-00002.safetensors", -1)
    with pytest.raises(ValueError, match=r"ema-00001-of-00002.safetensors should have blake3 [0-9a-f]{64}, but has "):
        load_checkpoint(saved, new_state())


def test_a_file_without_a_hash_is_not_read(saved: Path) -> None:
    change_state(saved, lambda content: content["blake3"].pop("ema-00001-of-00002.safetensors"))
    with pytest.raises(ValueError, match="is of another model than the config"):
        load_checkpoint(saved, new_state())


def test_a_flipped_bit_in_the_name_of_a_hash_is_found(saved: Path) -> None:
    text = (saved / "state.json").read_bytes()
    for name in (b'"xxh3_128"', b'"blake3"', b'"record_sha256"'):
        for at in range(1, len(name) - 1):
            wrong = name[:at] + bytes([name[at] ^ 1]) + name[at + 1 :]
            (saved / "state.json").write_bytes(text.replace(name, wrong))
            with pytest.raises(ValueError, match=r"state\.json is missing or damaged"):
                load_checkpoint(saved, new_state())


@pytest.mark.parametrize("value", [None, "", "0" * 31, "0" * 64, "../../x"])
def test_a_hash_that_is_not_one_is_named(saved: Path, value: object) -> None:
    change_state(saved, lambda content: content["xxh3_128"].update({"ema-00001-of-00002.safetensors": value}))
    with pytest.raises(ValueError, match=r"damaged .*xxh3_128.ema-00001-of-00002.safetensors is "):
        load_checkpoint(saved, new_state())


def test_a_file_that_another_program_wrote_again_is_read_too(saved: Path) -> None:
    """Add metadata, as other programs do, which our writer does not."""
    file = saved / "model-00001-of-00002.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    change_state(saved, lambda content: content["blake3"].update({file.name: blake3(file.read_bytes()).hexdigest()}))
    restored = new_state()
    load_checkpoint(saved, restored)
    for name, value in everything(trained()).items():
        assert torch.equal(value, everything(restored)[name]), name
