"""Checkpoints are written asynchronously, by all processes, to folders and to buckets."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest
import torch
import xxhash
from blake3 import blake3
from conftest import json_lines
from gcs_server import gcs_server
from hypothesis import given, settings
from hypothesis import strategies as st
from s3_server import BUCKET, s3_server
from safetensors import safe_open
from safetensors.torch import save as library_save
from test_training import FACTS, RUNTIME, batch_of, everything, new_state, run_steps, save, step_of

from core import remote
from core.reading import sha256_of
from core.records import SEAL, seal
from runtime.accelerate import AccelerateRuntime
from train import stores
from train.checkpoint import load_checkpoint, load_newest, read_tensors
from train.lines import read_lines
from train.mirror import MirroredRunFolder, fetch_run
from train.runfolder import RunFolder
from train.saving import CheckpointWriter, shares
from train.state import TrainState
from train.stores import BucketStore, CheckpointStore, FolderStore, list_checkpoints
from train.tensor_files import write_tensors


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yield the URL of an empty bucket on a local server."""
    with {"s3": s3_server, "gs": gcs_server}[request.param]():
        yield f"{request.param}://{BUCKET}"


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.float64]


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
@settings(deadline=None)
def test_our_files_are_the_librarys_byte_for_byte(kinds: dict[str, tuple[torch.dtype, list[int]]]) -> None:
    tensors = {name: torch.randint(0, 9, shape).to(dtype) for name, (dtype, shape) in kinds.items()}
    file = io.BytesIO()
    found = write_tensors(file, tensors)
    assert file.getvalue() == library_save(tensors)
    assert found.blake3 == blake3(file.getvalue()).hexdigest()
    assert found.xxh3_128 == xxhash.xxh3_128(file.getvalue()).hexdigest()


class Process(AccelerateRuntime):
    """One of several processes that hold the same state, each in a thread of this one."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__("fp32", device="cpu")
        self.data_rank, self.data_world, self.is_main = rank, world, rank == 0


def save_by(world: int, store: CheckpointStore, state: TrainState, split_bytes: int = 0) -> None:
    """Save by several processes; ``split_bytes`` 0 splits all parts, however small."""
    writers = [CheckpointWriter(store, Process(rank, world), split_bytes=split_bytes) for rank in range(world)]
    for writer in reversed(writers):  # the main one last: it must not rely on the others being late
        writer.save(state, FACTS)
    for writer in writers:
        writer.wait()


def trained(steps: int = 2, total_steps: int = 6) -> TrainState:
    state = new_state(total_steps)
    for number in range(steps):
        step_of(state)([batch_of(number)])
        state.advance()
    return state


def assert_equal_states(one: TrainState, other: TrainState) -> None:
    for name, value in everything(one).items():
        assert torch.equal(value, everything(other)[name]), name


@pytest.mark.parametrize("world", [1, 3, 200])
def test_any_number_of_processes_writes_what_any_number_reads(tmp_path: Path, world: int) -> None:
    state, restored = trained(), new_state()
    save_by(world, FolderStore(tmp_path), state)
    path = tmp_path / "step_00000002"
    load_checkpoint(path, restored)
    assert_equal_states(state, restored)
    names = {file.name for file in path.iterdir()}
    assert ("ema.safetensors" in names) == (world == 1)
    assert ("ema-00001-of-00003.safetensors" in names) == (world == 3)
    assert not {name for name in names if name.startswith(("written-by", "."))}


def test_a_stranger_finds_each_tensor_by_the_index_of_hugging_face(tmp_path: Path) -> None:
    state = trained()
    save_by(3, FolderStore(tmp_path), state)
    path = tmp_path / "step_00000002"
    places = json.loads((path / "ema.safetensors.index.json").read_text())["weight_map"]
    expected = state.ema.module.state_dict()
    assert set(places) == set(expected)
    for name, file_name in places.items():
        with safe_open(path / file_name, "pt") as file:
            assert torch.equal(file.get_tensor(name), expected[name]), name


def test_shares_are_even_and_complete() -> None:
    tensors = new_state().model.state_dict()
    parts = {"model": tensors, "ema": tensors}
    for world in (1, 2, 3, 7):
        owned = shares(parts, world, split_bytes=0)
        loads = [0] * world
        for part in parts:
            assert sorted(name for names in owned[part] for name in names) == sorted(tensors)
            loads = [
                load + sum(tensors[n].nbytes for n in names) for load, names in zip(loads, owned[part], strict=True)
            ]
        assert max(loads) - min(loads) <= max(value.nbytes for value in tensors.values())


def test_parts_of_a_small_network_are_one_file_each_by_different_processes(tmp_path: Path) -> None:
    save_by(2, FolderStore(tmp_path), trained(), split_bytes=2**20)
    names = {file.name for file in (tmp_path / "step_00000002").iterdir()}
    assert names == {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
    parts = {"model": {"a": torch.zeros(4)}, "optimizer": {"a": torch.zeros(8)}}
    assert shares(parts, 2, split_bytes=2**20) == {"model": [[], ["a"]], "optimizer": [["a"], []]}


class HeldStore(FolderStore):
    """Writes tensors only after ``may_write`` is set."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.may_write = threading.Event()

    def write(self, step: int, name: str, content: Callable[[IO[bytes]], Any]) -> Any:
        assert self.may_write.wait(60)
        return super().write(step, name, content)


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path: Path) -> None:
    state, expected, store = trained(), trained(), HeldStore(tmp_path)
    writer = CheckpointWriter(store, RUNTIME)
    state.interval = {"loss": [1.0]}
    writer.save(state, FACTS)
    step_of(state)([batch_of(2)])  # with the very tensors that are being saved
    state.interval["loss"].append(2.0)
    assert store.steps() == []
    store.may_write.set()
    writer.wait()
    restored = new_state()
    load_newest(store, restored)
    assert_equal_states(restored, expected)
    assert restored.interval == {"loss": [1.0]}
    assert writer.timing.bytes_written > 0


def test_an_error_of_writing_ends_the_run_at_a_later_step_and_leaves_nothing_half(tmp_path: Path) -> None:
    class Full(FolderStore):
        def write(self, step: int, name: str, content: Callable[[IO[bytes]], Any]) -> Any:
            if step == 4 and name.startswith("optimizer"):
                raise OSError(28, "No space left on device", name)
            return super().write(step, name, content)

    state, folder = new_state(), RunFolder(tmp_path, Full(tmp_path / "checkpoints"))
    with pytest.raises(OSError, match="No space left"):
        run_steps(state, folder, 6)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_process_that_does_not_see_the_folder_is_noticed(tmp_path: Path) -> None:
    writer = CheckpointWriter(FolderStore(tmp_path), Process(0, 2), patience_sec=0.1)
    writer.save(trained(), FACTS)
    with pytest.raises(ValueError, match=r"1 of 2 processes have not written their part of .*step_00000002 after 0 "):
        writer.wait()
    assert list(tmp_path.iterdir()) == []


def test_the_main_process_learns_why_another_could_not_write(tmp_path: Path) -> None:
    class Full(FolderStore):
        def write(self, step: int, name: str, content: Callable[[IO[bytes]], Any]) -> Any:
            if name.startswith("model-00002"):
                raise OSError(28, "No space left on device", name)
            return super().write(step, name, content)

    writers = [CheckpointWriter(Full(tmp_path), Process(rank, 2), split_bytes=0) for rank in range(2)]
    for writer in writers:
        writer.save(trained(), FACTS)
    with pytest.raises(ValueError, match=r"Another process could not write its part of .*: OSError: .*No space left"):
        writers[0].wait()
    with pytest.raises(OSError, match="No space left"):
        writers[1].wait()


class Tampered(FolderStore):
    """Changes the content of one JSON file whenever it is read."""

    def __init__(self, folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
        super().__init__(folder)
        self._name, self._change = name, change

    def read(self, step: int, name: str) -> bytes:
        content = super().read(step, name)
        return self._change(content) if name == self._name else content


def replaced(**fields: Any) -> Callable[[bytes], bytes]:
    """Return a function that replaces a record by one with these fields and a valid hash."""
    return lambda content: json.dumps(seal(fields)).encode()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: b"", "is damaged: it is not JSON"),
        (lambda content: b"null", "is damaged: it holds null"),
        (lambda content: content[:-1], "is damaged: it is not JSON"),
        (lambda content: content.replace(b"record_sha256", b"record_sha257"), "is damaged: it has no record_sha256"),
        (lambda content: content.replace(b"model", b"modem", 1), "is damaged: its content has sha256"),
        (replaced(blake3=None, xxh3_128={}), "is damaged: blake3 is None"),
        (replaced(blake3={"model.safetensors": "0"}, xxh3_128={}), r"is damaged: blake3.model.safetensors is '0'"),
        (
            replaced(blake3={"../x": "0" * 64}, xxh3_128={}),
            "is damaged: it has 1 files, but its process wrote 3; the first that diff",
        ),
        (replaced(blake3={}), "is damaged: it has no xxh3_128"),
        (replaced(blake3={}, xxh3_128={}, more=1), "is damaged: it has a field more"),
    ],
)
def test_a_receipt_that_is_not_what_its_process_wrote_ends_the_save_and_is_named(
    change: Callable[[bytes], bytes], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"step_00000002/written-by-00001.json {words}"):
        save_by(2, Tampered(tmp_path, "written-by-00001.json", change), trained())
    assert FolderStore(tmp_path).steps() == []


def test_a_record_of_another_process_is_not_read_beyond_its_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.write(2, "written-by-00001.json", lambda file: file.write(bytes(1001)))
    monkeypatch.setattr(stores, "MAX_STATE_BYTES", 1000)
    with pytest.raises(ValueError, match=r"written-by-00001.json has 1001 bytes, but at most 1000 are read of it"):
        store.read(2, "written-by-00001.json")


def test_why_a_process_could_not_write_is_told_without_passwords_and_only_where_it_can_be_read(tmp_path: Path) -> None:
    class Refusing(Tampered):
        def write(self, step: int, name: str, content: Callable[[IO[bytes]], Any]) -> Any:
            if name.startswith("model-00002"):
                raise ValueError("http://user:secret@host/x is refused")
            return super().write(step, name, content)

    for change, words in (
        (lambda content: content, "Another process could not write its part .*: ValueError: http://.*@host/x is"),
        (lambda content: content[:-1], "failed-by-00001.json is damaged: it is not JSON"),
    ):
        store = Refusing(tmp_path, "failed-by-00001.json", change)
        writers = [CheckpointWriter(store, Process(rank, 2), split_bytes=0) for rank in range(2)]
        writers[1].save(trained(), FACTS)
        with pytest.raises(ValueError, match="is refused"):
            writers[1].wait()
        assert b"secret" not in store.read(2, "failed-by-00001.json")
        writers[0].save(trained(), FACTS)
        with pytest.raises(ValueError, match=words):
            writers[0].wait()


@pytest.mark.parametrize("version", [1, 2, 3])
def test_checkpoints_of_earlier_formats_are_read_and_checked(tmp_path: Path, version: int) -> None:
    state, restored = trained(), new_state()
    save(tmp_path, state)
    path = tmp_path / "step_00000002"
    as_of_version(path, version)
    load_checkpoint(path, restored)
    assert_equal_states(state, restored)
    assert torch.equal(read_tensors(path, "ema")["patch_embedding.bias"], state.ema.module.patch_embedding.bias)
    flip(path / "ema.safetensors", -1)
    for action in (lambda: load_checkpoint(path, new_state()), lambda: read_tensors(path, "ema")):
        with pytest.raises(ValueError, match=r"ema.safetensors should have sha256 [0-9a-f]{64}, but has "):
            action()


def as_of_version(path: Path, version: int) -> None:
    """Rewrite the ``state.json`` of a checkpoint as an earlier version of the program wrote it."""
    content = json.loads((path / "state.json").read_text())
    names = [*content.pop("blake3"), *content["sha256"]]
    del content[SEAL], content["xxh3_128"]
    content |= {"format_version": version, "sha256": {name: sha256_of(path / name) for name in names}}
    (path / "state.json").write_text(json.dumps(seal(content) if version >= 3 else content))


def flip(path: Path, at: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    save_by(3, FolderStore(tmp_path), trained())
    (tmp_path / "step_00000002/model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match=r"step_00000002 has no model-00002-of-00003.safetensors"):
        read_tensors(tmp_path / "step_00000002", "model")


def test_the_time_that_the_loop_stood_still_is_in_the_next_line_of_times(tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 6)
    stalls = ["checkpoint_stall_sec" in line for line in json_lines(tmp_path / "timing.jsonl")]
    assert stalls == [False, True, True]  # the first checkpoint comes after the first line


def test_a_bucket_has_a_checkpoint_when_it_is_complete(bucket: str, tmp_path: Path) -> None:
    state, store = trained(), BucketStore(f"{bucket}/complete", tmp_path)
    assert store.steps() == []
    store.write(2, "model.safetensors", lambda file: file.write(b"half"))
    assert (store.steps(), store.written(2)) == ([], {"model.safetensors"})
    save_by(3, store, state)
    assert store.steps() == [2]
    restored = new_state()
    path, complaints = load_newest(BucketStore(f"{bucket}/complete", tmp_path / "elsewhere"), restored)
    assert (path, complaints) == (tmp_path / "elsewhere/step_00000002", [])
    assert_equal_states(state, restored)
    assert not {name for name in store.written(2) if name.startswith("written-by")}
    store.write(4, "model.safetensors", lambda file: file.write(b"half"))
    store.clean(newest_good=2)
    assert (store.steps(), store.written(4)) == ([2], set())
    store.remove(2)
    assert store.written(2) == set()


def test_a_damaged_newest_checkpoint_of_a_bucket_is_passed_over_and_written_again(bucket: str, tmp_path: Path) -> None:
    url, state = f"{bucket}/damaged", trained(2)
    store = BucketStore(url, tmp_path / "copies")
    save_by(1, store, state)
    save_by(1, store, trained(4))
    remote.write_bytes(f"{url}/step_00000004/ema.safetensors", b"?")
    restored = new_state()
    _, complaints = load_newest(store, restored)
    assert (restored.step, len(complaints)) == (2, 1)
    assert "ema.safetensors should have blake3" in complaints[0]
    store.clean(restored.step)
    assert store.steps() == [2]
    save_by(1, store, trained(4))
    assert load_newest(store, restored)[1] == []
    assert_equal_states(restored, trained(4))


def test_a_run_goes_on_from_its_url_on_another_machine(bucket: str, tmp_path: Path) -> None:
    whole, url = new_state(), f"{bucket}/runs/one"
    run_steps(whole, RunFolder(tmp_path / "whole"), 6)
    here = MirroredRunFolder(tmp_path / "here", url)
    with here.locked():
        run_steps(new_state(), here, 5)  # what comes after the checkpoint of step 4 is lost with the machine
    there, state = MirroredRunFolder(tmp_path / "there", url), new_state()
    with there.locked():
        path, _ = load_newest(there.store, state)
        assert (path, state.step) == (tmp_path / "there/checkpoints/step_00000004", 4)
        there.roll_back(state.step)
        run_steps(state, there, 6)
        there.publish()
    assert_equal_states(state, whole)
    copy = fetch_run(url, tmp_path / "copies")
    assert [path.name for path in list_checkpoints(copy / "checkpoints")] == ["step_00000004", "step_00000006"]
    for folder in (tmp_path / "there", copy):
        assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "whole/metrics.jsonl").read_bytes()
    one = fetch_run(f"{url}/checkpoints/step_00000004", tmp_path / "one")
    assert [path.name for path in list_checkpoints(one.parent)] == ["step_00000004"]
    with pytest.raises(ValueError, match="has no complete checkpoint; give the URL of a run"):
        fetch_run(f"{bucket}/runs", tmp_path / "copies")


def test_a_run_with_another_history_here_is_not_overwritten(bucket: str, tmp_path: Path) -> None:
    run_steps(new_state(), RunFolder(tmp_path), 4)
    folder = MirroredRunFolder(tmp_path, f"{bucket}/runs/empty")
    with (
        pytest.raises(ValueError, match=r"has checkpoints up to step 4, but .*/runs/empty has none"),
        folder.locked(),
    ):
        pass
    with pytest.raises(ValueError, match="remote_dir is http://x/run, but a run is kept behind gs:// or s3:// only"):
        MirroredRunFolder(tmp_path, "http://x/run")


def test_lines_of_a_bucket_are_those_of_the_last_checkpoint(bucket: str, tmp_path: Path) -> None:
    folder = MirroredRunFolder(tmp_path / "a", f"{bucket}/runs/lines")
    with folder.locked():
        run_steps(new_state(), folder, 5)
    other = MirroredRunFolder(tmp_path / "b", f"{bucket}/runs/lines")
    with other.locked():
        steps = [line["step"] for line in read_lines(other.metrics)]
    assert steps[:2] == [2, 4]
