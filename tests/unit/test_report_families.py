"""Figures 2 and 8 show each family of networks with a color, a legend and a fit of its own."""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from test_model import tiny
from test_report import Parsed, only_figures, papers_record, record_of, write_run

from diffusion.flow import Flow
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from launch.builders.build import model_facts
from model.attention import RotarySelfAttention
from model.blocks import AdaLNZeroBlock
from model.mlp import SwiGluMlp
from model.norms import rms_norm
from report import paper
from report.curves import curves_of
from report.figures import figure_2, figure_5, figure_8, figure_12
from report.study import PROTOCOL_KEYS, read_study
from report.style import FAMILY_COLORS
from report.write import write_report
from train.lines import append_record

LIGHTNING = partial(AdaLNZeroBlock, norm=rms_norm, mlp=SwiGluMlp, attention=RotarySelfAttention)
ROTARY = partial(AdaLNZeroBlock, attention=RotarySelfAttention)
WIDTHS = (16, 32, 64)


@functools.cache
def facts_of(block: Any, width: int) -> dict[str, Any]:
    """Return the facts on a network that an evaluation's record has."""
    model = tiny(block=block, width=width, num_heads=4)
    objective = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    return model_facts(model, objective, images_seen=640, weights="ema", training_seed=0)


def evaluated(sweep: Path, name: str, block: Any, width: int, distance: float, **changes: Any) -> None:
    """Write a run with a line of the real writer, with the facts of a real network."""
    write_run(sweep, name)
    record = {**record_of(width, distance), **facts_of(block, width), **changes}
    append_record(sweep / name / "evaluations.jsonl", record, sealed=True)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Return three widths of the paper's DiT and of LightningDiT, each with its own slope, and one rotary DiT."""
    for width in WIDTHS:
        evaluated(tmp_path, f"dit{width}", AdaLNZeroBlock, width, 4000 / width)
        evaluated(tmp_path, f"lightning{width}", LIGHTNING, width, 40_000 / width**2)
    evaluated(tmp_path, "rotary", ROTARY, 32, 77.0)
    return tmp_path


def dots(axes: Axes) -> dict[str, set[float]]:
    """Return the distances that are drawn as single points, by color."""
    found: dict[str, set[float]] = {}
    for line in axes.lines:
        if len(line.get_xdata()) == 1:
            found.setdefault(to_hex(line.get_color()), set()).add(round(float(line.get_ydata()[0]), 3))
    return found


def test_each_family_has_a_color_a_legend_and_a_fit_of_its_own(sweep: Path) -> None:
    study = read_study(sweep)
    curves = curves_of(study)
    assert [curve.name for curve in curves] == ["DiT", "DiT + rotary", "LightningDiT"]
    assert [curve.color for curve in curves] == list(FAMILY_COLORS[:3])
    axes = figure_8(study).axes[0]
    by_color = dots(axes)
    assert by_color[curves[0].color] == {round(4000 / width, 3) for width in WIDTHS}
    assert by_color[curves[1].color] == {77.0}
    assert by_color[curves[2].color] == {round(40_000 / width**2, 3) for width in WIDTHS}
    lines = {to_hex(line.get_color()): line for line in axes.lines if len(line.get_xdata()) > 2}
    assert lines.keys() == {curves[0].color, curves[2].color}  # one model has no fit
    for curve, power in ((curves[0], 1), (curves[2], 2)):
        gmacs = [model.record["gmacs"] for model in curve.models]
        slope = np.polyfit(np.log(gmacs), -power * np.log(WIDTHS), 1)[0]
        x, y = (np.log(np.asarray(values)) for values in lines[curve.color].get_data())
        assert np.polyfit(x, y, 1)[0] == pytest.approx(slope)
        assert curve.fit is not None
        assert curve.label == f"{curve.name}: slope {slope:.2f}, 3 models"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [curves[0].label, "DiT + rotary: 1 run", curves[2].label]
    bubbles = figure_2(study).axes[0]
    assert [text.get_text() for text in bubbles.get_legend().get_texts()] == labels
    assert {to_hex(path.get_facecolor()[0]) for path in bubbles.collections} == {curve.color for curve in curves}


@pytest.mark.filterwarnings("error")
def test_seeds_of_one_model_are_named_once_and_correlate_with_nothing(tmp_path: Path) -> None:
    for seed, distance in enumerate((5.0, 7.0, 6.0)):
        evaluated(tmp_path, f"seed{seed}", AdaLNZeroBlock, 32, distance, inception_score=distance)
    study = read_study(tmp_path)
    axes = figure_8(study).axes[0]
    (name,) = [text for text in axes.texts if text.get_text() == "d32 n2 p2"]
    mean = 210 ** (1 / 3)
    assert name.xy[1] == pytest.approx(mean)  # type: ignore[attr-defined]
    assert list(dots(axes).values()) == [{round(mean, 3)}]
    figure_12(study)


def test_the_page_and_the_table_name_the_families(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only_figures(monkeypatch, 8)
    report = write_report(read_study(sweep), sweep / "report")
    page = report.page.read_text()
    assert "through the 3 models with adaLN-Zero blocks; 95%" in page
    assert "through the 3 models of the family LightningDiT with adaLN-Zero blocks; 95%" in page
    assert "There is no fit of the models of the family DiT + rotary with adaLN-Zero blocks" in page
    rows = Parsed(page).tables["models"]
    families = [row[rows[0].index("family")] for row in rows[1:]]
    assert sorted(families) == ["DiT"] * 3 + ["DiT + rotary"] + ["LightningDiT"] * 3


def test_one_network_of_each_family_is_enough_and_earlier_lines_are_of_the_papers_dit(tmp_path: Path) -> None:
    earlier = {**record_of(16, 40.0), "block": "AdaLNZeroBlock"}
    del earlier["family"]
    write_run(tmp_path, "old", earlier)
    evaluated(tmp_path, "new", LIGHTNING, 32, 20.0)
    curves = curves_of(read_study(tmp_path))
    assert {curve.name: [model.mean() for model in curve.models] for curve in curves} == {
        "DiT": [40.0],
        "LightningDiT": [20.0],
    }
    axes = figure_8(read_study(tmp_path)).axes[0]
    assert dots(axes) == {curve.color: {curve.models[0].mean()} for curve in curves}


def test_a_family_of_another_objective_is_drawn_and_says_it(tmp_path: Path) -> None:
    for width in WIDTHS:
        evaluated(tmp_path, f"dit{width}", AdaLNZeroBlock, width, 4000 / width)
    evaluated(tmp_path, "lightning", LIGHTNING, 32, 20.0, objective=Flow().facts())
    study = read_study(tmp_path)
    assert [curve.name for curve in curves_of(study)] == ["DiT", f"LightningDiT ({study.objectives['lightning']})"]
    assert list(study.scaling()) == ["dit16", "dit32", "dit64"]


U_NET = {"family": "ADM", "size": "256 channels, 6 levels", "width": 256, "levels": 6}


def u_net(sweep: Path, name: str, **changes: Any) -> None:
    record = {**record_of(64, 10.0, decoder="identity 1"), **U_NET, **changes}
    write_run(sweep, name, {key: value for key, value in record.items() if key not in ("patch_size", "depth", "block")})


def test_u_nets_on_latents_of_their_own_share_a_curve_with_dits_of_one_decoder(tmp_path: Path) -> None:
    write_run(tmp_path, "dit", papers_record(1152, 28, 20.0))
    record = papers_record(1152, 28, 20.0)
    same = {key: record[key] for key in record.keys() & set(PROTOCOL_KEYS) - {"decoder"}}
    u_net(tmp_path, "adm", **same)
    u_net(tmp_path, "ldm", **same, family="LDM", decoder="ldm-vq-f4 1")
    study = read_study(tmp_path)
    assert [curve.name for curve in curves_of(study)] == ["DiT", "ADM", "LDM"]
    assert study.protocol["decoder"].startswith("sd-vae-ft-mse")  # so that the paper's points are drawn beside them
    write_run(tmp_path, "other", {**papers_record(768, 12, 30.0), "decoder": "sd-vae-ft-ema 1"})
    with pytest.raises(ValueError, match=r"cannot share a curve: decoder is"):
        read_study(tmp_path)


def test_u_nets_of_one_family_with_two_decoders_and_other_differences_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "dit", record_of(16, 40.0))
    u_net(tmp_path, "one", decoder="ldm-vq-f4 1")
    read_study(tmp_path)
    u_net(tmp_path, "two", decoder="ldm-vq-f8 1", sampling_seed=7)
    with pytest.raises(ValueError, match=r"dit and one cannot share a curve: decoder is"):
        read_study(tmp_path)
    (tmp_path / "one/evaluations.jsonl").unlink()
    with pytest.raises(ValueError, match=r"dit and two cannot share a curve: sampling_seed is 0 in one and 7 in"):
        read_study(tmp_path)


def test_block_types_of_two_families_are_two_colors(tmp_path: Path) -> None:
    for step in (5, 10):
        for name, block in (("dit", AdaLNZeroBlock), ("lightning", LIGHTNING)):
            record = {**record_of(32, 90.0 - step), **facts_of(block, 32), "step": step}
            if step == 5:
                write_run(tmp_path, name)
            append_record(tmp_path / name / "evaluations.jsonl", record, sealed=True)
    (axes,) = figure_5(read_study(tmp_path)).axes
    assert {line.get_label(): to_hex(line.get_color()) for line in axes.lines} == {
        "adaLN-Zero": "#6a3d9a",
        "LightningDiT, adaLN-Zero": FAMILY_COLORS[1],
    }


def test_the_papers_points_are_of_its_own_network() -> None:
    record = papers_record(1152, 28, 20.0)
    assert {point.fid for point in paper.points_of(record)} == {19.47, 10.67, 9.62}
    assert paper.points_of({**record, "family": "LightningDiT"}) == []
