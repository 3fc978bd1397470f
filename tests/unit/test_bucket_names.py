"""Objects in a bucket are untrusted: names that lead elsewhere are refused, and only a run's files are fetched."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_server import BUCKET, GcsServer, gcs_server, upload
from listing_server import ListingServer
from test_saving import trained
from test_training import FACTS, RUNTIME, new_state, run_steps, save

from core import remote
from core.names import UnsafeNameError
from train import mirror, stores
from train.checkpoint import load_newest
from train.mirror import MirroredRunFolder, fetch_run
from train.runfolder import RunFolder
from train.saving import CheckpointWriter
from train.stores import BucketStore, list_checkpoints

RUN = f"gs://{BUCKET}/team/run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of six steps, with a config, a picture and the id of its wandb run."""
    path = tmp_path_factory.mktemp("run")
    folder = RunFolder(path)
    run_steps(new_state(), folder, 6)
    folder.write_config({"seed": 0})
    folder.samples.mkdir()
    folder.grid(6).write_bytes(b"a picture")
    (path / "wandb").mkdir()
    (path / "wandb/id").write_text("0123abc")
    return path


@pytest.fixture
def gcs(run: Path) -> Iterator[GcsServer]:
    """Yield a server whose bucket holds the run."""
    with gcs_server() as server:
        upload(server, run, "team/run")
        yield server


def put(server: GcsServer, name: str, content: bytes = b"of a stranger") -> None:
    server.put(BUCKET, f"team/run/{name}", content)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def change_state(server: GcsServer, step: int, **fields: Any) -> None:
    name = f"team/run/checkpoints/step_{step:08d}/state.json"
    content = json.loads(server.buckets[BUCKET][name].content)
    server.put(BUCKET, name, json.dumps({**content, **fields}).encode())


@pytest.mark.parametrize(
    "name",
    [
        "../../../../escaped.txt",
        "samples/../../../../../escaped.png",
        "checkpoints/../../escaped",
        "checkpoints/step_00000002/..",
        "samples//escaped.png",
        "samples/./escaped.png",
        "samples\\..\\escaped.png",
        "config.yaml\n",
        "x" * 300,
    ],
    ids=lambda name: name[:30].encode("unicode_escape").decode(),
)
def test_an_object_whose_name_leads_elsewhere_is_named_and_nothing_is_fetched(
    name: str, gcs: GcsServer, tmp_path: Path
) -> None:
    put(gcs, name)
    copies, folder = tmp_path / "one/two/copies", MirroredRunFolder(tmp_path / "here", RUN)
    with pytest.raises(UnsafeNameError, match=rf"{RUN}.* has the name .*, which leads out of its folder") as met:
        fetch_run(RUN, copies)
    assert repr(name)[1:30] in str(met.value) or repr(name.partition("/")[2])[1:30] in str(met.value)
    with pytest.raises(UnsafeNameError, match="which leads out of its folder"), folder.locked():
        pass
    assert files_in(tmp_path) <= {"here/.lock"}


@pytest.mark.parametrize("name", ["../../../escaped", "/etc/passwd", ".lock", "a/b", ""])
def test_a_state_file_that_names_files_elsewhere_is_refused_and_nothing_of_it_fetched(
    name: str, gcs: GcsServer, tmp_path: Path
) -> None:
    change_state(gcs, 6, sha256={name: "0" * 64})
    folder = MirroredRunFolder(tmp_path / "here", RUN)
    for action in (lambda: fetch_run(RUN, tmp_path / "a/b/c"), lambda: load_newest(folder.store, new_state())):
        with pytest.raises(UnsafeNameError, match=rf"{RUN}/checkpoints/step_00000006/state.json names the file"):
            action()
    assert not any("escaped" in file or "step_00000006" in file for file in files_in(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"{", b'{"sha256": null}', b'{"sha256": {"a": 1}}', b'{"sha256": {"a": "x"}}']
)
def test_a_state_file_of_junk_is_damage_and_the_checkpoint_before_is_used(
    content: bytes, gcs: GcsServer, tmp_path: Path
) -> None:
    put(gcs, "checkpoints/step_00000006/state.json", content)
    state = new_state()
    _, complaints = load_newest(BucketStore(f"{RUN}/checkpoints", tmp_path), state)
    assert (state.step, len(complaints)) == (4, 1)
    assert "step_00000006" in complaints[0]
    assert files_in(tmp_path / "step_00000006") == {"state.json"}  # nothing says what else would be of it


def test_only_what_a_run_consists_of_is_fetched(gcs: GcsServer, run: Path, tmp_path: Path) -> None:
    strangers = [".lock", ".bashrc", "notes.txt", "wandb/run.wandb", "samples/.hidden.png", "samples/a/b.png"]
    strangers += ["samples/x.sh", "checkpoints/.step_00000006.lock", "checkpoints/step_00000006/more.bin", "lock.json"]
    for name in strangers:
        put(gcs, name)
    copy = fetch_run(RUN, tmp_path / "copies")
    assert copy == tmp_path / "copies/gs" / BUCKET / "team/run"
    wanted = files_in(run)
    assert {"config.yaml", "metrics.jsonl", "timing.jsonl", "wandb/id", "samples/step_00000006.png"} < wanted
    found = {name for name in files_in(copy) if not name.endswith(".lock")}
    assert found == wanted
    assert all((copy / name).read_bytes() == (run / name).read_bytes() for name in wanted)
    remote.remove(f"{RUN}/lock.json")
    here = MirroredRunFolder(tmp_path / "here", RUN)
    with here.locked():
        assert files_in(here.path) == {name for name in wanted if "checkpoints" not in name} | {".lock"}
        (here.path / "notes.txt").write_text("mine")
        (here.path / "metrics.jsonl").write_text("")
        here.publish()
    assert remote.read_bytes(f"{RUN}/metrics.jsonl") == b""
    assert gcs.buckets[BUCKET]["team/run/notes.txt"].content == b"of a stranger"


@pytest.mark.parametrize(("name", "limit"), [("wandb/id", 2**12), ("config.yaml", 2**24)])
def test_a_result_that_is_too_large_is_refused_with_both_numbers(
    name: str, limit: int, gcs: GcsServer, tmp_path: Path
) -> None:
    put(gcs, name, bytes(limit + 1))
    gcs.calls.clear()
    with pytest.raises(ValueError, match=rf"{RUN}/{name} has {limit + 1} bytes, but at most {limit} are read of it"):
        fetch_run(RUN, tmp_path)
    assert (files_in(tmp_path), set(gcs.calls)) == (set(), {"list "})


def test_an_object_that_is_larger_than_its_listing_said_is_never_read_to_its_end(
    gcs: GcsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(gcs, "checkpoints/step_00000006/state.json", bytes(10_001))
    with pytest.raises(
        remote.TooLargeError, match=r"state.json has 10001 bytes or more, but at most 10000 are read of it"
    ):
        remote.read_bytes(f"{RUN}/checkpoints/step_00000006/state.json", limit_bytes=10_000)
    monkeypatch.setattr(stores, "MAX_STATE_BYTES", 10_000)
    with pytest.raises(remote.TooLargeError, match="at most 10000"):
        fetch_run(RUN, tmp_path)


@pytest.mark.parametrize("url", [f"gs://{BUCKET}/../run", f"gs://{BUCKET}/team/../../../run", "gs://../run"])
def test_a_path_with_dots_that_a_user_gives_is_refused(url: str, gcs: GcsServer, tmp_path: Path) -> None:
    for action in (lambda: fetch_run(url, tmp_path / "copies"), lambda: MirroredRunFolder(tmp_path / "here", url)):
        with pytest.raises(UnsafeNameError, match=rf"{url} has the name .*, which leads out of its folder"):
            action()
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_fetched_from_the_listing_of_a_web_server_and_nothing_that_it_links_to_beside(
    run: Path, tmp_path: Path
) -> None:
    (tmp_path / "web/team").mkdir(parents=True)
    (tmp_path / "web/team/run").symlink_to(run)
    (tmp_path / "web/escaped.txt").write_text("of a stranger")
    odd = [
        "../../escaped.txt",
        "samples/../../../escaped.png",
        "/escaped.txt",
        "//other/x",
        "?C=N;O=D",
        "./config.yaml",
    ]
    links = {"team/run": [*odd, "./", "loop/", "../"], "team/run/loop": ["loop/", "../"]}
    with ListingServer(tmp_path / "web", "user:secret", links).running() as server:
        copy = fetch_run(f"{server.private_url}/team/run", tmp_path / "copies")
        assert copy == tmp_path / "copies/http" / server.url.removeprefix("http://") / "team/run"
    assert {name for name in files_in(copy) if not name.endswith(".lock")} == files_in(run)
    assert not any("escaped" in name or "secret" in name for name in files_in(tmp_path / "copies"))


def test_runs_of_one_name_in_two_stores_and_copies_of_a_former_run_are_not_mixed_up(
    gcs: GcsServer, run: Path, tmp_path: Path
) -> None:
    copies = tmp_path / "copies"
    assert list_checkpoints(fetch_run(RUN, copies) / "checkpoints")[-1].name == "step_00000006"
    gcs.buckets[BUCKET].clear()
    save(tmp_path / "new", trained(3))
    upload(gcs, tmp_path / "new", "team/run/checkpoints")
    (found,) = list_checkpoints(fetch_run(RUN, copies) / "checkpoints")
    assert found.name == "step_00000003"
    with ListingServer(run.parent).running() as server:
        other = fetch_run(f"{server.url}/{run.name}", copies)
    assert list_checkpoints(other / "checkpoints")[-1].name == "step_00000006"
    assert list_checkpoints(found.parent) == [found]


def test_a_run_whose_checkpoints_are_deleted_while_they_are_copied_is_copied_all_the_same(
    gcs: GcsServer, tmp_path: Path
) -> None:
    """Copy a run that keeps only the newest checkpoint and saves at each step."""
    url, ended, state = f"gs://{BUCKET}/busy", threading.Event(), new_state(10**6)
    folder = RunFolder(tmp_path / "busy", BucketStore(f"{url}/checkpoints", tmp_path / "none"))

    def train() -> None:
        while not ended.is_set():
            state.step += 1
            writer = CheckpointWriter(folder.store, RUNTIME, after_commit=lambda: folder.retain_checkpoints(1))
            writer.save(state, FACTS)
            writer.wait()

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        while not remote.list_tree(url) or not folder.store.steps():
            pass
        for number in range(10):
            copy = fetch_run(url, tmp_path / f"copies-{number}")
            load_newest(stores.FolderStore(copy / "checkpoints"), new_state())
    finally:
        ended.set()
        trainer.join()
    assert state.step > 1


def test_results_and_limits_name_every_file_that_a_run_writes(run: Path) -> None:
    written = {name for name in files_in(run) if not name.startswith("checkpoints/")}
    assert all(any(pattern.fullmatch(name) for pattern, _ in mirror.RESULTS) for name in written)
