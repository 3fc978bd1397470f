"""The report groups points by protocol, fits as closed forms do, and shows its page in a browser."""

import csv
import html
import json
import re
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from chromium import CHROMIUM, FLAGS, needs_chromium
from filelock import FileLock
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from evaluation.features.inception import SHA256
from launch.report import group_of, update_group
from report import figures, paper, write
from report.bubbles import Bubble, draw_bubbles
from report.fit import fit_power_law
from report.records import read_records
from report.study import Study, read_study
from report.write import Report, write_report
from train.runfolder import RunFolder


def record_of(width: int, distance: float, **changes: Any) -> dict[str, Any]:
    return {
        "step": 10,
        "images_seen": 640,
        "weights": "ema",
        "evaluated_by": "train",
        "family": "DiT",
        "patch_size": 4,
        "width": width,
        "depth": 4,
        "block": "adaLN-Zero",
        "gmacs": width**2 / 1e9,
        "parameters": width,
        "training_gmacs": 1.0,
        "feature_extractor": "digits classifier features",
        "feature_extractor_hash": "f",
        "reference": "digits",
        "reference_hash": "r",
        "reference_images": 1797,
        "decoder": "identity 1",
        "sampler": {"name": "ddpm", "steps": 50},
        "guidance": {"name": "unguided"},
        "num_images": 2000,
        "labels": "balanced",
        "sampling_seed": 0,
        "training_seed": 0,
        "network_precision": "fp32",
        "frechet_distance": distance,
        "frechet_distance_of_real_resample": 2.0,
        "recognized_fraction": 0.9,
        **changes,
    }


def write_run(sweep: Path, name: str, *records: dict[str, Any]) -> None:
    (sweep / name).mkdir(parents=True)
    (sweep / name / "config.yaml").write_text("seed: 0 # <script>alert('config')</script>")
    (sweep / name / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def only_figures(monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
    """Draw these figures alone in what follows: the others take seconds, and the test looks at none of them."""
    monkeypatch.setattr(write, "FIGURES", [figure for figure in figures.FIGURES if figure.number in numbers])


def distances(study: Study) -> dict[str, float]:
    return {row["run"]: row["frechet_distance"] for row in study.rows}


def test_the_report_takes_the_newest_evaluation_of_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_figures(monkeypatch, 8)
    write_run(tmp_path, "a", record_of(16, 99.0, step=5), record_of(16, 40.0))
    write_run(tmp_path, "b", record_of(64, 10.0))
    write_run(tmp_path, "c", record_of(32, 20.0))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert list(distances(report.study).items()) == [("a", 40.0), ("c", 20.0), ("b", 10.0)]
    fit = report.study.fit()
    assert fit is not None
    assert fit.rank_correlation == pytest.approx(-1)
    assert fit.slope == pytest.approx(-0.5)  # distance 640 / width, gmacs width^2
    with report.table.open() as file:
        assert [row["frechet_distance"] for row in csv.DictReader(file)] == ["40.0", "20.0", "10.0"]
    assert Image.open(report.pictures[8]).size[0] > 600
    assert "FID" not in report.study.distance_name


@pytest.mark.parametrize("change", [{"num_images": 100}, {"step": 11}, {"sampler": {"name": "ddpm", "steps": 9}}])
def test_runs_measured_differently_share_no_curve(tmp_path: Path, change: dict[str, Any]) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0))
    write_run(tmp_path, "b", record_of(32, 20.0, **change))
    with pytest.raises(ValueError, match=f"cannot share a curve: {next(iter(change))} is"):
        read_study(tmp_path)


def test_the_run_that_shares_no_protocol_is_named_not_one_with_a_further_evaluation(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0), record_of(16, 44.0, num_images=100))
    write_run(tmp_path, "b", record_of(32, 20.0))
    write_run(tmp_path, "c", record_of(64, 9.0, step=5, labels="random"), record_of(64, 10.0, sampling_seed=7))
    with pytest.raises(ValueError, match="a and c cannot share a curve: sampling_seed is 0 in one and 7 in the other"):
        read_study(tmp_path)


def test_evaluating_both_runs_the_same_way_brings_the_curve_back(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0), record_of(16, 44.0, num_images=100))
    write_run(tmp_path, "b", record_of(32, 20.0, num_images=100), record_of(32, 24.0, guidance={"scale": 2}))
    write_run(tmp_path, "unfinished")
    study = read_study(tmp_path)
    assert distances(study) == {"a": 44.0, "b": 20.0}
    assert study.unevaluated == ["unfinished"]


def test_the_last_of_equal_evaluations_counts(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0), record_of(16, 41.0))
    assert distances(read_study(tmp_path)) == {"a": 41.0}


def test_lines_of_earlier_versions_are_of_a_dit_whose_blocks_have_the_names_of_their_classes(tmp_path: Path) -> None:
    earlier = {**record_of(16, 40.0), "block": "AdaLNZeroBlock"}
    del earlier["family"]
    write_run(tmp_path, "a", earlier)
    write_run(tmp_path, "b", record_of(32, 20.0))
    assert list(read_study(tmp_path).scaling()) == ["a", "b"]
    del earlier["patch_size"]
    write_run(tmp_path, "c", earlier)
    with pytest.raises(ValueError, match=r"c/evaluations.jsonl has no 'patch_size', so another program or version"):
        read_study(tmp_path)


def network_record(size: str, distance: float, gmacs: float, **changes: Any) -> dict[str, Any]:
    """Return a record of a network without patches, blocks, width and depth."""
    record = record_of(16, distance, gmacs=gmacs, family="U-Net", size=size, **changes)
    return {key: value for key, value in record.items() if key not in {"patch_size", "width", "depth", "block"}}


@pytest.mark.parametrize("others", [0, 1, 3])
def test_networks_of_any_family_are_drawn_and_each_curve_is_of_one_family(tmp_path: Path, others: int) -> None:
    for number, width in enumerate([16, 32][:others] + [64][: others - 2]):
        write_run(tmp_path, f"dit{number}", *(record_of(width, 900 / width - step, step=step) for step in (5, 10)))
    for name, gmacs in (("u32", 1.0), ("u64", 4.0)):
        size, steps = f"{name[1:]} channels", (5, 10)
        write_run(tmp_path, name, *(network_record(size, 50 / gmacs + s, gmacs, step=s) for s in steps))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert {2, 6, 8, 9} <= set(report.pictures)
    main = ["dit0", "dit1", "dit2"] if others == 3 else ["u32", "u64"]
    assert list(report.study.scaling()) == main
    assert report.study.main_kind.models == (
        "models with adaLN-Zero blocks" if others == 3 else "models of the family U-Net"
    )
    rows = {row[1]: row for row in Parsed(report.page.read_text()).tables["models"]}
    assert {"32 channels", "64 channels"} <= rows.keys()
    with report.table.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == others + 2
    assert ("patch_size" in table[0]) == (others > 0)
    assert {row["family"] for row in table} == ({"U-Net", "DiT"} if others else {"U-Net"})


def test_a_sweep_without_evaluations_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    with pytest.raises(ValueError, match="There are 0 evaluated runs"):
        read_study(tmp_path)


def test_a_folder_that_is_no_sweep_is_named_with_the_one_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There are 0 runs in .*, give the folder that holds them"):
        read_study(tmp_path)
    write_run(tmp_path / "sweep", "a", record_of(16, 40.0))
    with pytest.raises(ValueError, match=r"There are 0 runs in .*, but in .*/sweep; give one of these: sweep=FOLDER"):
        read_study(tmp_path)
    with pytest.raises(ValueError, match=r"sweep/a is one run; give the folder .*: sweep=.*/sweep\."):
        read_study(tmp_path / "sweep/a")


@pytest.mark.parametrize("key", ["labels", "gmacs", "feature_extractor"])
def test_a_line_that_another_program_wrote_is_named(tmp_path: Path, key: str) -> None:
    foreign = record_of(16, 40.0)
    del foreign[key]
    write_run(tmp_path, "a", record_of(16, 40.0), foreign)
    with pytest.raises(ValueError, match=f"A line of step 10 in .*a/evaluations.jsonl has no '{key}'"):
        read_study(tmp_path)


def test_runs_that_keep_the_others_from_a_later_step_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_figures(monkeypatch)
    write_run(tmp_path, "a", record_of(16, 99.0, step=5), record_of(16, 40.0))
    write_run(tmp_path, "diverged", record_of(32, 50.0, step=5))
    study = read_study(tmp_path)
    assert distances(study) == {"a": 99.0, "diverged": 50.0}
    said = "All are compared at step 5, since diverged has no later evaluation; others have some up to step 10."
    assert study.held_back == said
    assert said in write_report(study, tmp_path / "report").page.read_text()


def test_a_sweep_is_named_by_its_folder_however_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "mine", "a", record_of(16, 40.0))
    monkeypatch.chdir(tmp_path / "mine")
    only_figures(monkeypatch)
    page = write_report(read_study(Path()), tmp_path / "report").page.read_text()
    assert "<title>mine: a scaling study</title>" in page


def test_a_curve_over_training_holds_one_protocol_alone(tmp_path: Path) -> None:
    others = [record_of(16, 7.0, step=5, num_images=9), record_of(16, 8.0, step=5, weights="model")]
    write_run(tmp_path, "a", record_of(16, 99.0, step=5), *others, record_of(16, 40.0))
    curve = read_study(tmp_path).over_training()["a"]
    assert [(r["step"], r["frechet_distance"]) for r in curve] == [(5, 99.0), (10, 40.0)]


def test_sampling_compute_is_compared_where_all_but_the_steps_is_equal(tmp_path: Path) -> None:
    def swept(steps: int, distance: float, **changes: Any) -> dict[str, Any]:
        return record_of(16, distance, sampler={"name": "ddpm", "steps": steps}, **changes)

    guided = swept(99, 1.0, guidance={"name": "ClassifierFreeGuidance", "scale": 2})
    write_run(tmp_path, "a", record_of(16, 40.0), swept(100, 30.0), swept(5, 90.0), guided, swept(9, 1.0, step=5))
    curves = read_study(tmp_path).over_sampling_steps()
    assert [(r["sampling_gmacs"], r["frechet_distance"]) for r in curves["a"]] == [
        (pytest.approx(steps * 256e-9), distance) for steps, distance in ((5, 90.0), (50, 40.0), (100, 30.0))
    ]


def test_a_record_says_what_sampling_cost_and_an_earlier_one_is_understood(tmp_path: Path) -> None:
    guided = {"guidance": {"name": "ClassifierFreeGuidance", "scale": 2}}
    heun = {"sampler": {"name": "heun", "steps": 10}}
    lines = [
        record_of(16, 1.0, **heun, **guided),
        record_of(16, 1.0, sampler={"name": "ddpm", "steps": "10,5"}),
        record_of(16, 1.0, **heun, **guided, sampling_gmacs=0.25),
    ]
    write_run(tmp_path, "a", *lines)
    found = [record["sampling_gmacs"] for record in read_records(RunFolder(tmp_path / "a"))]
    assert found == [pytest.approx(2 * 19 * 256e-9), None, 0.25]


def test_the_fit_equals_its_closed_form() -> None:
    generator = np.random.default_rng(0)
    x = np.geomspace(1, 100, 9)
    y = 10 ** (2 - 0.7 * np.log10(x) + generator.normal(0, 0.05, 9))
    fit = fit_power_law(list(x), [[value] for value in y])
    assert fit is not None
    design = np.stack([np.ones(9), np.log10(x)], axis=1)
    coefficients, (squares,), *_ = np.linalg.lstsq(design, np.log10(y))
    assert (fit.intercept, fit.slope) == pytest.approx(coefficients)
    covariance = np.linalg.inv(design.T @ design) * squares / 7
    at = np.array([1.0, np.log10(30)])
    half = stats.t.ppf(0.975, 7) * np.sqrt(at @ covariance @ at)
    low, high = fit.band(np.array([30.0]))
    assert np.log10([low[0], high[0]]) == pytest.approx([at @ coefficients - half, at @ coefficients + half])
    assert fit.slope_interval[1] - fit.slope == pytest.approx(stats.t.ppf(0.975, 7) * covariance[1, 1] ** 0.5)


def test_seeds_of_a_model_are_one_point_of_the_fit(tmp_path: Path) -> None:
    for width, distances_ in ((16, (40.0, 90.0)), (32, (20.0, 20.0)), (64, (10.0, 14.4))):
        for seed, distance in enumerate(distances_):
            write_run(tmp_path, f"d{width}-{seed}", record_of(width, distance, training_seed=seed))
    study = read_study(tmp_path)
    expected = fit_power_law([width**2 / 1e9 for width in (16, 32, 64)], [[60.0], [20.0], [12.0]])
    found = study.fit()
    assert found is not None
    assert expected is not None
    assert found.count == 3
    assert (found.slope, found.residual_std) == pytest.approx((expected.slope, expected.residual_std))
    write_run(tmp_path, "d64-2", record_of(64, -1.0, training_seed=2))
    assert read_study(tmp_path).fit() is None


@pytest.mark.parametrize(("x", "y"), [([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 2])])
def test_no_line_is_drawn_through_too_few_points(x: list[float], y: list[float]) -> None:
    assert fit_power_law(x, [[value] for value in y]) is None


def test_the_papers_table_correlates_as_the_paper_says() -> None:
    assert len(paper.SWEEP) == 12
    fit = fit_power_law([point.gmacs for point in paper.SWEEP], [[point.fid] for point in paper.SWEEP])
    assert fit is not None
    assert fit.semilog_correlation == pytest.approx(-0.93, abs=0.005)


def papers_record(width: int, depth: int, fid: float, step: int = 400_000, **changes: Any) -> dict[str, Any]:
    """Return a record as a run of `experiment=paper/...` writes it."""
    record = {
        "step": step,
        "images_seen": step * 256,
        "depth": depth,
        "patch_size": 2,
        "fid": fid,
        "num_images": 50_000,
        "sampler": {"name": "ddpm", "steps": 250},
        "feature_extractor_hash": SHA256,
        "reference": "VIRTUAL_imagenet256_labeled.npz",
        "decoder": "sd-vae-ft-mse 31f26fd",
        "gmacs": width**2 * depth / 3.2e5,
        "training_gmacs": width**2 * depth / 3.2e5 * step * 256 * 3,
    }
    return record_of(width, fid, **record | changes)


GUIDED = {"guidance": {"name": "ClassifierFreeGuidance", "scale": 1.5}}
OTHER_PROTOCOLS: list[dict[str, Any]] = [
    {"num_images": 10_000},
    {"sampler": {"name": "ddim", "steps": 250}},
    {"sampler": {"name": "ddpm", "steps": 128}},
    GUIDED,
    {"feature_extractor_hash": "0"},
    {"reference": "mine.npz"},
    {"decoder": "sd-vae-ft-ema 1"},
    {"weights": "model"},
    {"images_seen": 1},
]


def test_the_papers_points_stand_beside_its_own_protocol_alone() -> None:
    record = papers_record(1152, 28, 20.0)
    assert paper.shares_figure_8(record)
    assert not paper.shares_figure_8(papers_record(1152, 28, 20.0, step=399_999))
    assert [(p.step, p.fid) for p in paper.points_of(record)] == [
        (400_000, 19.47),
        (2_352_000, 10.67),
        (7_000_000, 9.62),
    ]
    assert [p.fid for p in paper.points_of({**record, "block": "in-context"})] == [35.24]
    assert paper.points_of({**record, "width": 100}) == []
    assert not any(paper.points_of({**record, **change}) for change in OTHER_PROTOCOLS)
    of_10k = {**record, "num_images": 10_000, "sampler": {"name": "ddpm", "steps": 16}}
    # In words: 15.2 Tflops.
    assert [(round(p.sampling_gmacs, -2), p.fid) for p in paper.sampling_points_of(of_10k)] == [(15_200, 23.7)]
    assert paper.sampling_points_of(record) == []


def circles(axes: Axes) -> list[tuple[float, float]]:
    """Return the positions of the paper's hollow points."""
    lines = [line for line in axes.lines if line.get_marker() == "o" and line.get_color() == "none"]
    return [(float(x), float(y)) for line in lines for x, y in zip(*line.get_data(), strict=True)]


def test_the_papers_points_are_drawn_where_its_protocol_is_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)  # in the report: here they are drawn one by one
    for block in ("adaLN-Zero", "in-context"):
        steps = [papers_record(1152, 28, 9e6 / step, step=step, block=block) for step in (200_000, 400_000)]
        write_run(tmp_path, block, *steps)
    write_run(tmp_path, "s", *(papers_record(384, 12, 3e7 / step, step=step) for step in (200_000, 400_000)))
    study = read_study(tmp_path)
    of_s, of_xl = (400_000, 68.40), (400_000, 19.47)
    assert sorted(circles(figures.figure_5(study).axes[0])) == [of_xl, (400_000, 35.24)]
    by_patch, *by_size = (axes for axes in figures.figure_6(study).axes if axes.get_visible())
    assert circles(by_patch) == [of_s, of_xl]
    assert [circles(axes) for axes in by_size] == [[of_s], [of_xl]]
    assert circles(figures.figure_8(study).axes[0]) == [(p.gmacs, p.fid) for p in paper.SWEEP]
    (gmacs, fid), *of_xl_compute = circles(figures.figure_9(study).axes[0])
    assert (gmacs, fid) == (pytest.approx(6.06 * 400_000 * 256 * 3), 68.40)
    assert [fid for _, fid in of_xl_compute] == [19.47, 10.67, 9.62]
    for axes in (by_patch, figures.figure_8(study).axes[0], figures.figure_9(study).axes[0]):
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()].count("paper, table 4") == 1
    assert "The rings in figures 5, 6, 8 and 9" in write_report(study, tmp_path / "report").page.read_text()


def test_no_point_of_the_paper_is_drawn_beside_other_numbers(full: Report) -> None:
    for figure in figures.FIGURES:
        assert not any(circles(axes) for axes in figure.draw(full.study).axes)
    assert "The paper's own points are not drawn" in full.page.read_text()


@pytest.mark.parametrize(
    ("other", "best", "beside"),
    [
        ({"num_images": 10_000}, 20.0, {"ADM": 10.94, "ADM-U": 7.49, "LDM-4": 10.56, "LDM-8": 15.51, "DiT-XL/2": 9.62}),
        (GUIDED, 3.0, {"ADM-G": 4.59, "ADM-G, ADM-U": 3.94, "LDM-4-G": 3.6, "LDM-8-G": 7.76, "DiT-XL/2-G": 2.27}),
    ],
)
def test_figure_2_shows_the_best_model_beside_adm_and_ldm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, other: dict[str, Any], best: float, beside: dict[str, float]
) -> None:
    write_run(tmp_path, "xl", papers_record(1152, 28, 20.0), papers_record(1152, 28, 3.0, **other))
    write_run(tmp_path, "s", papers_record(384, 12, 70.0))
    study = read_study(tmp_path)
    left, right = figures.figure_2(study).axes
    assert bubbles(left) == {"XL/2": 20.0, "S/2": 70.0}
    assert bubbles(right) == {**beside, "ours: XL/2": best}
    assert right.get_ylim() == (0, pytest.approx(1.2 * max(best, *beside.values())))
    only_figures(monkeypatch, 2)
    report = write_report(study, tmp_path / "report")
    assert "the systems of the paper&#39;s table 2" in report.page.read_text()


def test_of_close_bubbles_the_higher_has_its_name_above() -> None:
    def above(*places: tuple[float, float]) -> list[bool]:
        axes = Figure().subplots()
        draw_bubbles(axes, [Bubble(str(i), *place, "grey") for i, place in enumerate(places)], "distance")
        return [text.get_va() == "bottom" for text in sorted(axes.texts, key=lambda text: text.get_text())]

    assert above((1, 9), (10, 5), (100, 1)) == [False, True, False]
    assert above((1, 9), (1.1, 5), (100, 1)) == [True, False, False]
    assert above((1, 9), (10, 5), (11, 6), (100, 1)) == [False, False, True, True]


def bubbles(axes: Axes) -> dict[str, float]:
    """Return the name and the distance of each bubble."""
    names = [text.get_text() for text in axes.texts]
    places = [np.asarray(collection.get_offsets())[0] for collection in axes.collections]
    return {name: float(place[1]) for name, place in zip(names, places, strict=True)}


def test_a_moved_sweep_is_reported_to_the_group_of_its_runs(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0))
    study = read_study(tmp_path)
    assert group_of(study) == tmp_path.name
    (tmp_path / "a/config.yaml").write_text("group: trained")
    assert group_of(study) == "trained"


def write_finished_run(sweep: Path, name: str, record: dict[str, Any]) -> None:
    write_run(sweep, name, record)
    (sweep / name / "config.yaml").write_text(f"total_steps: {record['step']}")


def test_a_run_that_waited_for_the_report_lock_leaves_no_run_out_of_the_groups_curve(tmp_path: Path) -> None:
    logger = {"_target_": "train.loggers.NoLogger", "_partial_": True}
    write_finished_run(tmp_path, "a", record_of(16, 40.0))
    waiting = Thread(target=update_group, args=(tmp_path, "g", logger))
    with FileLock(tmp_path / ".report.lock"):
        waiting.start()
        time.sleep(0.5)  # it is at the lock; what it looked at before would hold one run
        write_finished_run(tmp_path, "b", record_of(32, 20.0))
    waiting.join()
    assert (tmp_path / "report/figure_8.png").exists()  # drawn of two runs, not of one


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return a study with everything: sizes, patch sizes, blocks, steps of training and of sampling, samples."""
    sweep = tmp_path_factory.mktemp("full")
    names = []
    for width in (8, 16, 100):
        for patch_size in (4, 2):
            for block in ("adaLN-Zero", "in-context"):
                name = f"d{width}-p{patch_size}-{block}"
                gmacs = width * 16 / patch_size**2
                distance = 300 / gmacs**0.5 * (1.3 if block == "in-context" else 1)
                shape = {
                    "patch_size": patch_size,
                    "block": block,
                    "gmacs": gmacs,
                    "recall": 0.1 + width / 200 / patch_size,
                    "recognized_fraction": None if name == "d8-p4-in-context" else 0.5 + gmacs / 1000,
                }
                records = [
                    record_of(width, distance * 20 / step, step=step, training_gmacs=gmacs * step, **shape)
                    for step in (5, 10)
                ]
                steps = record_of(width, distance * 1.5, sampler={"name": "ddpm", "steps": 10}, **shape)
                write_run(sweep, name, *records, steps, records[-1])
                names += [name] if block == "adaLN-Zero" else []
    images = np.random.default_rng(0).integers(0, 256, (len(names), 3, 8, 8, 1), np.uint8)
    return write_report(read_study(sweep), sweep / "report", (names, images))


def test_all_figures_are_drawn_where_the_runs_give_them(full: Report) -> None:
    assert sorted(full.pictures) == [2, 5, 6, 7, 8, 9, 10, 12]
    assert full.missing == {}
    for path in full.pictures.values():
        assert np.asarray(Image.open(path).convert("L")).std() > 5
        assert path.with_suffix(".svg").read_text().rstrip().endswith("</svg>")


def test_figures_that_the_runs_do_not_give_are_named_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path, "a", record_of(16, 40.0))
    (tmp_path / "report").mkdir()
    (tmp_path / "report/figure_10.png").write_bytes(b"of an earlier report")
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert sorted(report.missing) == [2, 5, 6, 7, 8, 9, 10, 12]
    assert "sampler.steps=16,32" in report.missing[10]
    assert not (tmp_path / "report/figure_10.png").exists()
    page = report.page.read_text()
    assert all(f"<strong>Figure {number}</strong>" in page for number in report.missing)


def test_the_same_runs_give_the_same_bytes(full: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_figures(monkeypatch, 5, 8, 12)
    again = write_report(full.study, tmp_path)
    for number in (5, 8, 12):
        for kind in (".png", ".svg"):
            ours, theirs = (r.pictures[number].with_suffix(kind) for r in (full, again))
            assert ours.read_bytes() == theirs.read_bytes()


class Parsed(HTMLParser):
    """Parses tags with their attributes, and rows of the tables by id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "table":
            self.tables[dict(attrs)["id"] or ""] = []
        elif tag == "tr":
            list(self.tables.values())[-1].append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            list(self.tables.values())[-1][-1].append(data)


def test_a_column_that_no_run_fills_is_left_out_and_fid_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    write_run(tmp_path, "a", record_of(16, 40.0, fid=40.0, recognized_fraction=None, recall=0.5))
    page = Parsed(write_report(read_study(tmp_path), tmp_path / "report").page.read_text())
    head, row = page.tables["models"]
    assert head[3:6] == ["Gflops (GMACs)", "FID", "recall"]
    assert row[3:6] == ["2.560e-07", "40.00", "0.5000"]
    assert "recognized fraction" not in head


def test_the_table_of_evaluations_says_the_objective_and_where_its_numbers_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    edm = {"name": "edm", "sigma_data": 0.61, "sigma_data_from": "shards"}
    write_run(tmp_path, "a", record_of(16, 40.0, objective=edm))
    write_run(tmp_path, "b", record_of(32, 30.0))  # of an earlier version
    page = Parsed(write_report(read_study(tmp_path), tmp_path / "report").page.read_text())
    head, *rows = page.tables["evaluations"]
    column = head.index("objective")
    assert sorted(row[column] for row in rows) == ["-", "edm (sigma_data 0.61, sigma_data_from shards)"]


def test_the_page_is_whole_and_needs_nothing_from_elsewhere(full: Report) -> None:
    text = full.page.read_text()
    assert "This is the left panel of the paper&#39;s figure." in text
    page = Parsed(text)
    assert page.open == []
    addresses = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href")]
    assert len(addresses) == 8
    assert all(value is not None and value.startswith("data:image/") for value in addresses)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert "<script>alert" not in text  # what a config says is text
    head, *rows = page.tables["models"]
    assert len(rows) == 12
    column = head.index("frechet distance")
    assert [row[column] for row in rows] == [f"{row['frechet_distance']:#.4g}" for row in full.study.rows]
    assert len(page.tables["evaluations"]) == 1 + 12 * 4
    assert "reference hash" in page.tables["evaluations"][0]


def shown_by_chromium(page: Path, script: str, folder: Path) -> Any:
    """Return what the script returns in the page after all of it is loaded. Fails where the page logs an error."""
    copy = folder / "page.html"
    watch = "<script>window.onerror = (m) => document.documentElement.dataset.failed = m;</script>"
    write = f"""<script>window.onload = () => {{
      const result = document.createElement("pre");
      result.id = "result";
      result.textContent = JSON.stringify((() => {{ {script} }})());
      document.body.append(result);
    }};</script>"""
    text = page.read_text().replace("<head>", f"<head>{watch}", 1)
    copy.write_text(text.replace("</body>", f"{write}</body>"))
    words = [CHROMIUM or "", *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", copy.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    assert "data-failed" not in done.stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout)
    assert found is not None
    return json.loads(html.unescape(found.group(1)))


@needs_chromium
def test_a_browser_sorts_the_tables_and_shows_every_picture(full: Report, tmp_path: Path) -> None:
    script = """
      const headOf = (table, name) =>
        [...document.querySelectorAll(`#${table} th`)].find(head => head.textContent === name);
      const read = (head) =>
        [...head.closest("table").tBodies[0].rows].map(row => row.cells[head.cellIndex].dataset.value);
      const sorted = (table, name, times, act = (head) => head.click()) => {
        const head = headOf(table, name);
        for (let time = 0; time < times; time++) act(head);
        return read(head);
      };
      const enter = (head) => head.dispatchEvent(new KeyboardEvent("keydown", {key: "Enter"}));
      return {
        before: read(headOf("models", "Gflops (GMACs)")),
        up: sorted("models", "frechet distance", 1), down: sorted("models", "frechet distance", 1),
        numbers: sorted("models", "parameters", 1),
        text: sorted("evaluations", "run", 1), textDown: sorted("evaluations", "run", 1, enter),
        gaps: sorted("models", "recognized fraction", 1), gapsDown: sorted("models", "recognized fraction", 1),
        heads: [...document.querySelectorAll("th[aria-sort]")].map(h => [h.textContent, h.getAttribute("aria-sort")]),
        rows: [...document.querySelectorAll("#models tbody tr")].map(
          row => ["run", "frechet distance"].map(name => row.cells[headOf("models", name).cellIndex].dataset.value)),
        widths: [...document.images].map(image => image.naturalWidth),
      };
    """
    shown = shown_by_chromium(full.page, script, tmp_path)
    rows = full.study.rows
    assert [float(value) for value in shown["before"]] == [row["gmacs"] for row in rows]
    values = sorted(distances(full.study).values())
    assert [float(value) for value in shown["up"]] == values
    assert [float(value) for value in shown["down"]] == values[::-1]
    assert [int(value) for value in shown["numbers"]] == sorted(row["parameters"] for row in rows)  # 16 before 100
    names = sorted(name for name, records in full.study.records.items() for _ in records)
    assert shown["text"] == names
    assert shown["textDown"] == names[::-1]  # by the keyboard
    fractions = sorted(row["recognized_fraction"] for row in rows if row["recognized_fraction"] is not None)
    assert len(fractions) == 11
    for key, expected in (("gaps", fractions), ("gapsDown", fractions[::-1])):
        assert [float(value) for value in shown[key][:-1]] == expected
        assert shown[key][-1] == ""  # an empty cell is last in both orders
    assert shown["heads"] == [["recognized fraction", "descending"], ["run", "descending"]]  # one of each table
    assert {name: float(value) for name, value in shown["rows"]} == distances(full.study)  # rows stayed whole
    assert len(shown["widths"]) == 8
    assert min(shown["widths"]) > 100
