"""The command line accepts any path, lists what exists, and refuses ambiguous input."""

import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY_RUN, InProcess, command
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.command.app import CONF
from launch.command.completion import script
from launch.command.help import comments_of, help_of
from launch.command.words import prepared, quoted
from launch.jobs import JOBS

NAMES = [
    *(
        "my photos",
        "photos (2)",
        "a=b",
        "a,b",
        "#1",
        "a@b",
        "50%",
        "it's",
        "[x]",
        "{x}",
        "x!",
        "a&b",
        "a;b",
        "ü",
        '"x"',
        "a\\",
    ),
    *(" spaced ", "a:b", "a b=c,d (e)", "~", "$x", "a'b\\'c", "*?", "<x>", "~x"),
]


def value_of(word: str) -> Any:
    return OverridesParser.create().parse_override(word).value()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("base", ["/data/", "data/", "../"])
def test_a_path_reaches_the_job_as_it_was_typed(name: str, base: str) -> None:
    (word,) = prepared([f"data.source.root={base}{name}"])
    assert value_of(word) == f"{base}{name}"


@given(text=st.text(st.characters(exclude_categories=["C"]), max_size=30))
@settings(max_examples=200, deadline=None)
def test_a_quoted_value_is_that_value(text: str) -> None:
    assert value_of(quoted("a", text)) == text


def test_the_home_folder_is_expanded_in_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me (2)")
    words = prepared(["data.source.root=~/images", "run_dir=~", "out=~/a,b", "name=a~b"])
    assert [value_of(word) for word in words] == ["/home/me (2)/images", "/home/me (2)", "/home/me (2)/a,b", "a~b"]


def test_what_hydra_reads_stays_as_it_is() -> None:
    words = [
        *(
            "seed=0,1",
            "name=${default_name}-lr${optimizer.lr}",
            "optimizer.betas=[0.9,0.99]",
            "~experiment",
            "+x=1",
            "--cfg",
        ),
        *("seed=choice(1,2)", "labels=['7',3]", "a={b: 1}", "out=null", "lr=1e-3", "path='a b'"),
    ]
    assert prepared(words) == words


def test_m_may_stand_anywhere(in_process: InProcess) -> None:
    for words in (
        ["plan", "-m", "model.patch_size=8,4", "model.depth=2"],
        ["-m", "plan", "model.depth=2"],
        ["plan", "model.patch_size=8,4", "model.depth=2", "-m"],
    ):
        assert "Gflops" in in_process(*words)
    words = ["plan", "model.patch_size=8,4", "--multirun", "model/size=b", "model.depth=2"]
    assert in_process(*words).count("d768") == 2


def test_a_word_may_set_hydras_mode_and_no_config_of_ours_does(in_process: InProcess) -> None:
    """`launch.command.mode` reads it only where a word of the command line may set it."""
    sweep = in_process("plan", "hydra.mode=MULTIRUN", "model.patch_size=8,4", "model.depth=2")
    assert re.findall(r"d384-n2-p(\d)", sweep) == ["8", "4"]
    for path in CONF.rglob("*.yaml"):
        of_hydra = (yaml.safe_load(path.read_text()) or {}).get("hydra") or {}
        assert "mode" not in of_hydra, path


def test_help_whose_reader_leaves_ends_without_a_word_and_leaves_signals_alone(in_process: InProcess) -> None:
    """Leave SIGPIPE alone: with its default handler, a server dies when a reader leaves early."""
    before = signal.getsignal(signal.SIGPIPE)
    in_process("train", "--help")
    assert signal.getsignal(signal.SIGPIPE) == before
    with subprocess.Popen(command("train", "--help"), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        assert job.stdout is not None
        job.stdout.close()
        assert job.stderr is not None
        assert job.stderr.read() == b""
    assert job.returncode == 0


def test_a_comma_in_a_path_that_exists_is_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b").mkdir()
    assert [value_of(word) for word in prepared(["-m", "run_dir=a,b"])[1:]] == ["a,b"]


def test_images_in_a_folder_of_a_hard_name_are_encoded(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    hard = tmp_path / "my photos (2), a=b #1"
    in_process("encode", "data=digits", f"data.shards={hard}")
    assert (hard / "manifest.json").exists()


def test_the_version_names_the_program_and_pytorch(in_process: InProcess) -> None:
    assert re.fullmatch(r"ditscale \d+\.\d+\.\d+ \(torch \d.*, Python 3\..*\)\n", in_process("--version"))


@pytest.mark.parametrize("job", JOBS)
def test_help_shows_every_setting_with_its_default_and_every_choice_with_what_it_does(job: str) -> None:
    shown = help_of(job)
    assert shown.startswith(f"ditscale {job}: {JOBS[job].summary}\n")
    assert "_target_" not in shown
    if job == "train":
        assert re.search(r"batch_size=256 +global, over all processes", shown)
        assert re.search(r"log_every=100 +steps", shown)
        assert re.search(r"adaln_zero +The adaLN block with a", shown)
        assert re.search(r"optimizer\.betas=\[0\.9, 0\.999\]", shown)
    if job == "sample":
        assert re.search(r"checkpoint \(must be given\) +a run folder", shown)


def test_a_comment_stands_beside_the_setting_of_its_own_file() -> None:
    comments = comments_of("train", {"data": "imagenet256", "train/ema": "short_run"})
    assert comments["data.samples_per_shard"] == "512 shards"
    assert comments["data.apply_exif"] == "ADM ignores EXIF rotation"
    assert comments_of("train", {"data": "digits"})["data.samples_per_shard"] == "images in a tar file"


def test_help_is_shown_by_the_command(in_process: InProcess) -> None:
    shown = in_process("sample", "--help")
    assert "Choices (NAME=OPTION; * is the default):" in shown
    assert yaml.safe_load(shown.split("Settings")[0].splitlines()[0].split(":")[1])


def test_a_shell_completes_jobs_settings_and_choices(tmp_path: Path) -> None:
    file = tmp_path / "completion"
    file.write_text(script("bash", ["train", "plan"]))

    def completed(line: str) -> list[str]:
        words = line.split(" ")
        lines = f"source {file}; COMP_LINE='{line}'; COMP_POINT={len(line)}; COMP_WORDS=({line}); "
        lines += f"COMP_CWORD={len(words) - 1}"
        done = subprocess.run(
            ["bash", "-c", f'{lines}; _ditscale; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("ditscale tr") == ["train"]
    assert completed("ditscale train keep_checkpoint_") == ["keep_checkpoint_every="]
    kinds = ("", "_unshifted", "_zero", "_zero_cross", "_zero_shared", "_zero_shared_cross", "_zero_unshifted")
    adaptive = [f"adaln{kind}" for kind in kinds]
    assert completed("ditscale train model/block=ada") == adaptive
    assert "model/size=" not in completed("ditscale plan x")


def test_a_part_that_the_chosen_network_has_not_is_refused_by_its_name(tmp_path: Path, in_process: InProcess) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/other.yaml").write_text("_target_: model.other.Other\nlayers: 3\n")
    words = [f"hydra.searchpath=[file://{tmp_path}]", "model=other", "shape_name=x", "model/size=digits_s"]
    shown = in_process("train", *words, expect=2)
    assert "The option of model=... has no model/size; leave model/size out." in shown
    for model in ("other", "dit,other"):
        more = ["-m"] if "," in model else []
        shown = in_process("plan", *more, words[0], f"model={model}", "model.patch_size=2", expect=2)
        assert "has no setting 'model.patch_size'; model has layers." in shown


@pytest.mark.parametrize("experiments", ["demo/blocks,demo/scaling", "demo,paper/scaling"])
def test_two_experiments_with_sweeps_of_their_own_are_refused_before_the_first_run(
    tmp_path: Path, in_process: InProcess, experiments: str
) -> None:
    shown = in_process("train", "-m", f"experiment={experiments}", *TINY_RUN[1:], expect=2)
    assert "experiment has 2 values, but" in shown
    assert "give each experiment in a command of its own: -m experiment=demo" in shown
    assert not (tmp_path / "runs").exists()
