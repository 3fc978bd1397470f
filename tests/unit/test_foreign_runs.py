"""The report of untrusted run folders names impossible fields, runs no code of theirs, and never hangs."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import InProcess
from damage import DAMAGES, within
from PIL import Image
from test_report import Parsed, only_figures, record_of, write_finished_run, write_run

from launch.report import update_group
from report.study import read_study
from report.write import write_report
from train.runfolder import RunFolder

NUMBERS = ("frechet_distance", "gmacs", "training_gmacs", "recognized_fraction", "frechet_distance_of_real_resample")
COUNTS = ("images_seen", "num_images", "patch_size", "width", "depth", "parameters", "sampling_seed", "training_seed")
TEXTS = ("weights", "labels", "network_precision", "decoder", "reference", "reference_hash", "block")
WRONG: list[tuple[str, Any]] = [
    *((key, value) for key in (*NUMBERS, *COUNTS) for value in ("40", [40], {"value": 40}, True)),
    *((key, None) for key in ("frechet_distance", "gmacs", "training_gmacs", *COUNTS, *TEXTS)),
    *((key, 2.5) for key in COUNTS),
    *((key, -1) for key in COUNTS if not key.endswith("seed")),
    *((key, value) for key in TEXTS for value in (3, ["x"], {"x": 1}, "a\x1b[31mb", "line\nline", "x" * 2000)),
    *(("gmacs", value) for value in (0, -1, 1e300)),
    *(("recognized_fraction", value) for value in (-0.1, 1.1)),
    ("frechet_distance", 1e300),
    ("width", 10**30),
    ("images_seen", 10**30),
    ("training_gmacs", -1),
    *(("fid", value) for value in (None, "40", [])),
    *(("recall", value) for value in ("0.5", True, {})),
    ("evaluated_by", 3),
    ("metrics", []),
    ("metrics", {"precision_recall": 3}),
    ("metrics", {"precision_recall": {"k": {"deep": {"er": 1}}}}),
    ("classifier_accuracy", 2),
    *(("sampler", value) for value in (None, "ddpm", [], {}, {"steps": 50}, {"name": 3}, {"name": None, "steps": 5})),
    *(("sampler", {"name": "ddpm", "steps": value}) for value in (0, -5, True, 2.5, [5], {"a": 1}, 10**30)),
    *(("guidance", value) for value in (None, 3, {"name": {"deep": {}}}, {"scale": [[1]]}, {"x" * 2000: 1})),
]


def shown(wrong: tuple[str, Any]) -> str:
    return f"{wrong[0]}-{str(wrong[1])[:20]!r}"


@pytest.mark.parametrize("wrong", WRONG, ids=shown)
def test_a_field_that_cannot_be_is_named_with_its_file_and_step(tmp_path: Path, wrong: tuple[str, Any]) -> None:
    key, value = wrong
    write_run(tmp_path, "a", record_of(16, 40.0), {**record_of(16, 20.0, step=15), key: value})
    with pytest.raises(ValueError, match=r"A line of step 15 in .*/a/evaluations\.jsonl is damaged: ") as raised:
        read_study(tmp_path)
    assert f": {key}" in str(raised.value)
    assert str(raised.value).endswith("; remove the line and measure again with `ditscale evaluate`.")
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e400", "9" * 5000, "[" * 10**5, "{", ""])
@pytest.mark.parametrize("key", ["gmacs", "step"])
def test_a_number_that_json_does_not_know_is_named_with_its_line(tmp_path: Path, key: str, text: str) -> None:
    record = record_of(16, 40.0)
    line = json.dumps({**record, key: "?"}).replace('"?"', text)
    write_run(tmp_path, "a", record)
    with (tmp_path / "a/evaluations.jsonl").open("a") as file:
        file.write(line + "\n")
    with within(30), pytest.raises(ValueError, match=r"Line 2 of .*/a/evaluations\.jsonl is damaged: "):
        read_study(tmp_path)


def test_numbers_at_the_edges_are_drawn(tmp_path: Path) -> None:
    """Draw numbers as they are measured: integers for floats, zeros, tiny and large ones."""
    edges = {"frechet_distance_of_real_resample": None, "recognized_fraction": 1, "training_gmacs": 0, "fid": 0}
    write_run(tmp_path, "tiny", record_of(16, 1e-30, gmacs=1e-30, **edges))
    write_run(tmp_path, "large", record_of(32, 10**29, gmacs=1e30, **edges))
    write_run(tmp_path, "below", record_of(64, -1e-9, gmacs=1, **edges))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert {2, 8} <= set(report.pictures)


STRANGE = "\"><script>alert('x')<!-- <img src=x onerror=y> &amp; {{ 7 * 7 }}{% raw %} a $\\frac{$ b =1+1"


def test_names_and_texts_of_strangers_are_shown_and_run_nothing(tmp_path: Path) -> None:
    """Use HTML, templates, and texts that matplotlib would take for formulas."""
    name = STRANGE
    sweep = tmp_path / name
    texts = dict.fromkeys(("feature_extractor", "reference", "decoder", "labels", "evaluated_by"), name)
    more = {"guidance": {"name": name, name: name}, "metrics": {name: {name: 1}}}
    for run, width, block in (("a", 16, name), (name, 32, name), ("b", 16, "X"), ("c", 32, name)):
        records = [record_of(width, 40.0 - step, step=step, block=block, **texts, **more) for step in (5, 10)]
        write_run(sweep, run, *records)
        config = {"name": f"{name} </pre><script>alert(1)</script>"}
        (sweep / run / "config.yaml").write_text(yaml.safe_dump(config))
    report = write_report(read_study(sweep), tmp_path / "report")
    assert {2, 5, 6, 8, 9} <= set(report.pictures)
    page = Parsed(report.page.read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert tags.count("img") == len(report.pictures)
    assert not any(key.startswith("on") for _, attrs in page.tags for key in attrs)
    for path in (tmp_path / "report").glob("*.svg"):
        assert "<script" not in path.read_text()
        assert "<img" not in path.read_text()
    names = [row[0] for row in page.tables["models"][1:]]
    assert name in names  # as it is, letter by letter
    assert {row[2] for row in page.tables["models"][1:]} == {name, "X"}


def test_no_cell_of_the_table_is_a_formula_of_a_spreadsheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_figures(monkeypatch)
    names = ["=HYPERLINK(A1)", "+1", "-1", "@SUM(A1)", "a=b"]
    for number, name in enumerate(names, start=1):
        write_run(tmp_path, name, record_of(16 * number, 40.0, block="=1+1"))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    with report.table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [*(f"'{name}" for name in names[:4]), "a=b"]
    assert {row["block"] for row in rows} == {"'=1+1"}


@pytest.mark.parametrize("name", ["a\x1b[31m", "a\nb", "a\udcff"])
def test_a_run_whose_name_cannot_be_shown_is_refused(tmp_path: Path, name: str) -> None:
    write_run(tmp_path, name, record_of(16, 40.0))
    with pytest.raises(ValueError, match="has a name that cannot be shown; rename it") as raised:
        read_study(tmp_path)
    assert str(raised.value).isprintable()


def grid(run: Path) -> Path:
    (run / "samples").mkdir(exist_ok=True)
    path = run / "samples/step_00000010.png"
    Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)).save(path)
    return path


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "longer"])
@pytest.mark.parametrize("name", ["evaluations.jsonl", "config.yaml", "samples/step_00000010.png"])
def test_a_run_folder_damaged_in_any_way_gives_a_report_or_a_sentence(
    tmp_path: Path, name: str, kind: str, in_process: InProcess
) -> None:
    for run, width in (("a", 16), ("b", 32)):
        folder = RunFolder(tmp_path / "sweep" / run)
        folder.write_config({"seed": 0})
        folder.append(folder.evaluations, record_of(width, 40.0))
        grid(folder.path)
    path = tmp_path / "sweep/a" / name
    DAMAGES[kind](path)
    # A last line without its end is one that a crash cut; a run without lines is named as one not evaluated.
    unevaluated = name == "evaluations.jsonl" and kind in ("cut", "emptied", "missing", "junk", "zeros")
    fine = unevaluated or (name.endswith(".png") and kind == "missing")
    with within(60):
        shown = in_process("report", "sweep=sweep", "out=report", "train/logger=none", expect=0 if fine else 2)
    assert ("Not evaluated, so not in the curve: a" in shown) == unevaluated
    if name == "evaluations.jsonl" and kind == "cut":
        assert f"warning: sweep/a/{name} ends in the middle of a line, which the report leaves out" in shown
    assert "Traceback" not in shown
    assert (tmp_path / "report/report.html").exists() == fine
    if not fine:
        assert "sweep/a has evaluations, but no config.yaml" in shown or f"sweep/a/{name}" in shown
        assert len([line for line in shown.splitlines() if "error:" in line]) == 1


def test_a_huge_config_or_picture_is_not_put_on_the_page(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0))
    study = read_study(tmp_path)
    for path in (tmp_path / "a/config.yaml", grid(tmp_path / "a")):
        with path.open("wb") as file:
            file.truncate(2**36)
        with pytest.raises(ValueError, match=f"{path.name} has {2**36} bytes, but at most"):
            write_report(study, tmp_path / "report")
        path.write_text("")
    assert not (tmp_path / "report").exists()


def test_where_a_report_cannot_be_written_the_place_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0))
    study = read_study(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is not a folder, but files are written below it"):
        write_report(study, tmp_path / "file")
    for name in ("report.html", "fid_vs_gflops.csv", "figure_10.png"):
        out = tmp_path / f"out-{name}"
        (out / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=f"{name} is a folder, but a file of that name is written there"):
            write_report(study, out)


@pytest.mark.parametrize("kind", ["a pipe", "a device", "a folder", "flipped bit"])
@pytest.mark.parametrize("name", ["config.yaml", "evaluations.jsonl"])
def test_a_damaged_run_does_not_stop_another_of_the_sweep_that_ends(
    tmp_path: Path, name: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, width in (("a", 16), ("b", 32), ("damaged", 64)):
        write_finished_run(tmp_path, run, record_of(width, 640 / width))
    damaged = RunFolder(tmp_path / "damaged")
    damaged.write_config({"total_steps": 10})
    DAMAGES[kind](tmp_path / "damaged" / name)
    logger = {"_target_": "train.loggers.NoLogger", "_partial_": True}
    with within(60):
        update_group(tmp_path, "g", logger)
    assert (tmp_path / "report/figure_8.png").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: damaged is left out of the sweep's curve: ")


def test_the_lines_that_this_program_writes_pass(tmp_path: Path) -> None:
    """Read the fields that records of `test_evaluation_commands` have, since that file draws no report."""
    record = record_of(16, 40.0, classifier_accuracy=0.98, classifier_held_out=359, average_of_steps=[2, 4])
    record |= {"metrics": {"frechet": {}, "precision_recall": {"k": 3, "distances": "fp32"}}, "precision": 0.5}
    record |= {"guidance": {"name": "ClassifierFreeGuidance", "scale": 1.5, "channels": None, "interval": [0, 900]}}
    record |= {"sampler": {"name": "dpm_solver", "steps": "ddim50", "eta": 0.0}, "kid_std": 1e-3}
    record |= {"network_calls": 50, "sampling_gmacs": 0.25}
    assert not math.isnan(record["frechet_distance"])
    write_run(tmp_path, "a", record)
    study = read_study(tmp_path)
    assert study.protocol.items() <= record.items()
    assert "average_of_steps" not in study.protocol  # no field of a figure
