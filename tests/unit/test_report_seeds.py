"""Several seeds of a model are one point with a bar, and one file stands for the folders of a study's runs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from scipy import stats
from test_report import only_figures, record_of, write_run

from core.records import seal
from launch.report import _default_folder, group_of
from report.figures import figure_2, figure_5, figure_6, figure_8, figure_9, figure_10
from report.fit import rank_interval
from report.study import Study, read_study
from report.write import write_report

DISTANCES = {16: (40.0, 90.0, 50.0), 32: (20.0, 22.0, 21.0), 64: (10.0, 14.0, 12.0)}  # of three seeds, by width


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return three widths and two blocks of three seeds, over training and sampling."""
    folder = tmp_path_factory.mktemp("seeds")
    for width, distances in DISTANCES.items():
        for seed, distance in enumerate(distances):
            for block, more in (("adaLN-Zero", 1.0), ("in-context", 2.0))[: 1 + (width == 64)]:
                facts: dict[str, Any] = {"training_seed": seed, "block": block, "sampling_gmacs": 50 * width**2 / 1e9}
                last = record_of(width, more * distance, **facts)
                first = record_of(width, 3 * more * distance, step=5, **facts | {"training_gmacs": 0.5})
                few = facts | {"sampling_gmacs": 10 * width**2 / 1e9, "sampler": {"name": "ddpm", "steps": 10}}
                write_run(folder, f"d{width}-{block}-{seed}", first, last, record_of(width, 4 * distance, **few), last)
    return folder


def bars(axes: Axes) -> set[tuple[float, float]]:
    """Return lower and upper end of the bars of some axes."""
    found = [part for part in axes.collections if isinstance(part, LineCollection)]
    ends = [np.asarray(segment)[:, 1] for part in found for segment in part.get_segments()]
    return {(round(float(low), 6), round(float(high), 6)) for low, high in ends}


def expected(*factors: float, widths: tuple[int, ...] = (16, 32, 64)) -> set[tuple[float, float]]:
    return {(factor * min(DISTANCES[w]), factor * max(DISTANCES[w])) for w in widths for factor in factors}


def test_each_figure_shows_the_mean_and_the_range_of_the_seeds(sweep: Path) -> None:
    study = read_study(sweep)
    assert bars(figure_2(study).axes[0]) == bars(figure_8(study).axes[0]) == expected(1)
    assert bars(figure_5(study).axes[0]) == expected(1, 2, 3, 6, widths=(64,))
    assert bars(figure_6(study).axes[0]) == bars(figure_9(study).axes[0]) == expected(1, 3)
    assert bars(figure_10(study).axes[0]) == expected(1, 4) | expected(2, widths=(64,))
    means = {round(float(np.prod(distances)) ** (1 / 3), 6) for distances in DISTANCES.values()}
    singles = [line for line in figure_8(study).axes[0].lines if len(line.get_xdata()) == 1]
    assert {round(float(line.get_ydata()[0]), 6) for line in singles} == means


def test_the_interval_of_the_rank_correlation_is_that_of_resampled_seeds() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    values = [(9.0, 8.0), (8.5, 7.0), (6.5, 7.2), (3.0, 2.0)]
    found = rank_interval(x, values)
    generator, samples = np.random.default_rng(1), []
    for _ in range(4000):
        means = [np.log(generator.choice(of_model, len(of_model))).mean() for of_model in values]
        samples.append(stats.spearmanr(x, means).statistic)
    assert found == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=0.01)
    assert found == rank_interval(x, values)
    assert rank_interval(x, [(1.0,), (2.0,), (3.0,), (4.0,)]) is None
    assert rank_interval(x, [(1.0, 1.0)] * 4) is None
    assert rank_interval(x, [(9.0, 8.0), (7.0, 6.0), (5.0, 4.0), (3.0, 2.0)]) == (-1.0, -1.0)


def test_one_file_draws_the_figures_of_the_folders_byte_for_byte(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch, 5, 8)
    of_folders = write_report(read_study(sweep), tmp_path / "folders")
    file = tmp_path / "mine.jsonl"
    file.write_bytes((tmp_path / "folders/study.jsonl").read_bytes())
    study = read_study(file)
    of_file = write_report(study, tmp_path / "file")
    for number in (5, 8):
        for kind in (".png", ".svg"):
            ours, theirs = (report.pictures[number].with_suffix(kind) for report in (of_file, of_folders))
            assert ours.read_bytes() == theirs.read_bytes()
    for name in ("fid_vs_gflops.csv", "study.jsonl"):
        assert (tmp_path / "file" / name).read_bytes() == (tmp_path / "folders" / name).read_bytes()
    assert (study.name, group_of(study), _default_folder(study)) == ("mine", "mine", tmp_path / "mine-report")
    assert "<h2>Runs</h2>" not in of_file.page.read_text()
    assert "bootstrap interval over seeds" in of_file.page.read_text()


def test_a_damaged_file_of_a_study_is_refused_with_its_line(sweep: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.jsonl"
    good = seal({"run": "a", **record_of(16, 40.0)})
    for content, why in (
        ("", "has 0 evaluations"),
        (json.dumps(good)[:-9], "ends in the middle of line 1"),
        (json.dumps({**good, "frechet_distance": 4.0}) + "\n", "Line 1 of .* is damaged: its content has sha256"),
        (json.dumps(seal(record_of(16, 40.0))) + "\n", "Line 1 of .* names no run"),
        (json.dumps(seal({"run": "a\nb", **record_of(16, 40.0)})) + "\n", "names no run"),
        (json.dumps(seal({"run": "a", **record_of(16, 40.0), "width": "<b>"})) + "\n", "width"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=why):
            read_study(file)
    with pytest.raises(ValueError, match=r"There is no sweep .*nowhere; give the folder"):
        read_study(tmp_path / "nowhere")


def test_a_study_of_one_seed_has_no_bars(tmp_path: Path) -> None:
    for width in (16, 32, 64):
        write_run(tmp_path, f"d{width}", record_of(width, 640 / width))
    study: Study = read_study(tmp_path)
    assert bars(figure_8(study).axes[0]) == set()
    fit = study.fit()
    assert fit is not None
    assert fit.rank_interval is None
