"""Missing permissions give one sentence, and no part of a run is skipped because of them.

Root may read and write everything by two capabilities, which it gives up here.
"""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY_RUN, InProcess, resealed
from pictures import make_image_folder

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, linux/capability.h
# Several commands in one process, for the seconds that imports take.
SCRIPT = """
import json, os, sys
from launch import cli
for words in json.loads(sys.argv[1]):
    os.environ.pop("HYDRA_FULL_ERROR", None)
    sys.argv = ["ditscale", *words]
    try:
        cli.main()
    except SystemExit as stopped:
        print("exit code", stopped.code, file=sys.stderr)
    print("----", file=sys.stderr, flush=True)
"""


def obey_permissions() -> None:
    """Give up the capabilities that override file modes. Called in a process before it executes another program."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            if libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
                os._exit(99)


def shown_by(cwd: Path, *commands: list[str]) -> list[str]:
    """Return what each command printed on standard error, with its exit code."""
    words = [sys.executable, "-c", SCRIPT, json.dumps(commands)]
    done = subprocess.run(
        words, cwd=cwd, preexec_fn=obey_permissions, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode == 99:
        pytest.skip("this user may do everything and cannot give that up")
    parts = done.stderr.split("----\n")
    assert len(parts) == len(commands) + 1, done.stderr
    return parts[:-1]


def test_what_may_not_be_read_or_written_is_one_sentence_and_exit_code_2(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = ["train", *TINY_RUN, "total_steps=20"]
    in_process(*words, f"data.shards={digits}", "run_dir=readonly")
    for copy in ("unreadable", "later"):
        shutil.copytree("readonly", copy)
    Path("unreadable/checkpoints/step_00000020/ema.safetensors").chmod(0)
    state = Path("later/checkpoints/step_00000020/state.json")
    resealed(state, format_version=7)
    shutil.copytree(digits, "hidden")
    Path("hidden/manifest.json").chmod(0)
    Path("closed").mkdir()
    for folder in ("closed", "readonly", "readonly/checkpoints"):
        Path(folder).chmod(0o555)
    before = set(tmp_path.rglob("*"))

    closed, readonly, unreadable, later, hidden = shown_by(
        tmp_path,
        [*words, f"data.shards={digits}", "run_dir=closed/run"],
        [*words, f"data.shards={digits}", "run_dir=readonly", "total_steps=30", "resume.allow=[total_steps]"],
        [*words, f"data.shards={digits}", "run_dir=unreadable"],
        [*words, f"data.shards={digits}", "run_dir=later"],
        [*words, "data.shards=hidden", "run_dir=new"],
    )
    sentence = " cannot be read or written: Permission denied; give the permission, or choose another folder"
    assert f"A file closed/run{sentence}" in closed
    assert re.search(rf"A file readonly/\S+{sentence}", readonly)
    assert f"/step_00000020/ema.safetensors{sentence}" in unreadable
    assert "step_00000020 has format version 7, but this program reads version" in later
    assert f"A file hidden/manifest.json{sentence}" in hidden
    for shown in (closed, readonly, unreadable, later, hidden):
        assert shown.endswith("exit code 2\n"), shown
        assert "Traceback" not in shown
    assert {path.name for path in set(tmp_path.rglob("*")) - before} <= {".lock"}


def test_a_folder_of_images_that_may_not_be_listed_is_named_and_no_class_is_lost(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", 2)
    make_image_folder(tmp_path / "closed", 2)
    make_image_folder(tmp_path / "litter", 2)
    make_image_folder(tmp_path / "file", 2)
    (tmp_path / "litter/lost+found").mkdir()
    for name in ("images/bee", "closed", "litter/lost+found", "file/ant/000.JPEG"):
        (tmp_path / name).chmod(0)
    words = [
        "encode",
        "data/source=image_folder",
        "model/autoencoder=identity",
        "data/crop=center",
        "data.image_size=8",
    ]
    words += ["data.name=x", "max_skipped_fraction=0.2"]
    class_folder, root, litter, file = shown_by(
        tmp_path,
        *(
            [*words, f"data.source.root={name}", f"data.shards=s-{name}"]
            for name in ("images", "closed", "litter", "file")
        ),
    )
    way_out = r"cannot be listed \(Permission denied\); grant the permission to read it, or move it out of"
    assert re.search(rf"error: The folder \S+/images/bee {way_out} \S+/images\.", class_folder)
    assert re.search(rf"error: The folder \S+/closed {way_out} \S+", root)
    for shown in (class_folder, root):
        assert shown.endswith("exit code 2\n"), shown
    for shown in (litter, file):
        assert "error" not in shown
    (line,) = (tmp_path / "s-file/skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["source_id"] == "ant/000.JPEG"
    assert "Permission denied" in json.loads(line)["reason"]
