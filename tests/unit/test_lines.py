"""A flipped bit in a run's lines is found, lost lines are restored from the checkpoint, and no skip is silent."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, json_lines, prepared_by, resealed

from train.lines import append_record, parse_lines, read_lines
from train.runfolder import RunFolder

RECORD = {"step": 20, "frechet_distance": 5.25, "weights": "ema"}
WORDS = [*TINY_RUN, "run_dir=run", "total_steps=8", "log_every=2", "checkpoint_every=4"]


@pytest.fixture(scope="module")
def finished(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    prepared_by("train", *WORDS, f"data.shards={digits}", cwd=folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


def test_every_flipped_bit_of_a_sealed_line_is_found_or_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "evaluations.jsonl"
    append_record(file, RECORD, sealed=True)
    whole = file.read_bytes()
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        try:
            found = str(read_lines(file, whole=True))
        except ValueError as error:
            found = str(error)
        assert found == str([RECORD]) or str(file) in found


def test_a_line_of_an_earlier_version_has_no_hash_and_is_read() -> None:
    (line,) = parse_lines(json.dumps(RECORD).encode() + b"\n", "evaluations.jsonl")
    assert line.record == RECORD


@pytest.mark.parametrize("damage", ["cut in a line", "cut at a line", "emptied", "removed", "flipped", "junk"])
def test_metrics_that_were_lost_come_back_from_the_checkpoint(
    run: Path, digits: Path, in_process: InProcess, damage: str
) -> None:
    file = run / "metrics.jsonl"
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    damaged = {
        "cut in a line": whole[: len(whole) // 2],
        "cut at a line": b"".join(lines[:2]),
        "emptied": b"",
        "flipped": whole.replace(b'"loss": 1', b'"loss": 3').replace(b'"loss": 0', b'"loss": 2'),
        "junk": lines[0] + b"junk\n" + b"".join(lines[1:]),
    }
    assert all(content != whole for content in damaged.values())
    if damage == "removed":
        file.unlink()
    else:
        file.write_bytes(damaged[damage])
    shown = in_process("train", *WORDS, f"data.shards={digits}")
    assert file.read_bytes() == whole
    assert ("metrics.jsonl had lost lines up to step 8; they are restored" in shown) == (damage != "junk")


def test_training_that_goes_on_after_a_cut_leaves_no_gap(run: Path, digits: Path, in_process: InProcess) -> None:
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:50])
    in_process("train", *WORDS, f"data.shards={digits}", "total_steps=12", "resume.allow=[total_steps]")
    assert [line["step"] for line in json_lines(run / "metrics.jsonl")] == [2, 4, 6, 8, 10, 12]


def test_a_step_that_is_not_the_folders_is_damage_and_the_checkpoint_before_is_used(
    run: Path, digits: Path, in_process: InProcess
) -> None:
    state = run / "checkpoints/step_00000008/state.json"
    before = (run / "metrics.jsonl").read_bytes()
    state.write_text(state.read_text().replace('"step": 8', '"step": 9'))
    shown = in_process("train", *WORDS, f"data.shards={digits}")
    assert "state.json is missing or damaged (its content has sha256 " in shown
    assert "Continuing from step 4." in shown
    resealed(state, step=60)
    shown = in_process("train", *WORDS, f"data.shards={digits}")
    assert "it has step 60, but is in step_00000008" in shown
    assert (run / "metrics.jsonl").read_bytes() == before
    shown = in_process("train", *WORDS, f"data.shards={digits}")
    assert "warning" not in shown


def evaluations(folder: RunFolder, *steps: int) -> list[bytes]:
    for step in steps:
        folder.append(folder.evaluations, {"step": step, "frechet_distance": 10.0 - step})
    return folder.evaluations.read_bytes().splitlines()


def test_evaluations_that_were_lost_come_back_and_those_of_others_stay(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = evaluations(folder, 2, 4, 4)  # the same number twice: measured again
    copies = folder.lines_so_far()
    others = evaluations(folder, 4, 3, 6)[3:]
    folder.evaluations.write_bytes(b"\n".join([lines[1], *others]) + b"\n")
    assert "evaluations.jsonl had lost lines up to step 4" in folder.roll_back(4, copies)[0]
    assert sorted(folder.evaluations.read_bytes().splitlines()) == sorted([*lines, others[1]])
    assert folder.roll_back(4, copies) == []


def test_a_damaged_evaluation_that_no_checkpoint_has_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    evaluations(folder, 2)
    copies = folder.lines_so_far()
    evaluations(folder, 4)
    folder.evaluations.write_bytes(folder.evaluations.read_bytes().replace(b"6.0", b"2.0"))
    with pytest.raises(ValueError, match=r"Line 2 of .*evaluations\.jsonl is damaged: its content has sha256"):
        folder.roll_back(4, copies)
    with pytest.raises(ValueError, match=r"Line 2 of .*evaluations\.jsonl is damaged"):
        read_lines(folder.evaluations)


def test_an_emptied_file_of_evaluations_is_named(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    evaluations(folder, 2)
    assert folder.roll_back(1) == []
    assert not folder.evaluations.exists()
    folder.evaluations.write_bytes(b"")
    with pytest.raises(ValueError, match=r"evaluations\.jsonl is empty, and no other file has its content"):
        folder.roll_back(4)


def test_a_line_without_its_newline_is_a_line_and_a_cut_one_is_not(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    evaluations(folder, 2, 4)
    whole = folder.evaluations.read_bytes()
    folder.evaluations.write_bytes(whole[:-1])
    assert [line["step"] for line in read_lines(folder.evaluations, whole=True)] == [2, 4]
    folder.evaluations.write_bytes(whole[:-9])
    assert "evaluations.jsonl ended in the middle of a line" in RunFolder(tmp_path).roll_back(4)[0]
    folder.evaluations.write_bytes(whole[:-9])
    assert [line["step"] for line in read_lines(folder.evaluations)] == [2]
    with pytest.raises(ValueError, match=r"evaluations\.jsonl ends in the middle of line 2"):
        read_lines(folder.evaluations, whole=True)


@pytest.mark.parametrize(
    "line",
    ["[]", "null", "{}", '{"step": "2"}', '{"step": true}', '{"step": -1}', '{"step": 1e400}', "[" * 10**5, "\xff"],
)
def test_a_line_of_something_else_names_the_file_and_the_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "evaluations.jsonl"
    append_record(file, RECORD, sealed=True)
    with file.open("ab") as stream:
        stream.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"^Line 2 of .*evaluations\.jsonl is damaged"):
        read_lines(file)


def test_a_config_that_was_changed_is_found_and_one_that_is_gone_is_that_of_the_checkpoints(
    run: Path, digits: Path, in_process: InProcess
) -> None:
    words = ["train", *WORDS, f"data.shards={digits}"]
    config = run / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("seed: 0", "seed: 1"))
    assert "config.yaml cannot be read (it was changed after it was written)" in in_process(*words, expect=2)
    config.unlink()
    assert "seed is 0 there and 1 now" in in_process(*words, "seed=1", expect=2)
    in_process(*words)
    assert config.read_text() == whole
    config.write_text("\n".join(whole.splitlines()[:5]) + "\n")
    assert "config.yaml cannot be read (it is cut short)" in in_process(*words, expect=2)
    config.write_text("\n".join(whole.splitlines()[1:-1]) + "\n")  # of an earlier version, without a hash
    in_process(*words)
    assert config.read_text() == whole


@pytest.mark.parametrize(
    "content", [b"\xff", b"[" * 10**5, b"a: &a [*a]", b"", b"- 1", b"{", b"a: !!python/object/apply:os.getcwd []"]
)
def test_junk_in_place_of_a_config_is_one_sentence(
    run: Path, digits: Path, in_process: InProcess, content: bytes
) -> None:
    (run / "config.yaml").write_bytes(content)
    shown = in_process("train", *WORDS, f"data.shards={digits}", expect=2)
    assert "run/config.yaml" in shown or "in the run folder run and" in shown
