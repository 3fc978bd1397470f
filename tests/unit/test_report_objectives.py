"""A sweep of several objectives is compared at equal network calls, with the spread over its seeds."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from test_house import CONF, composed
from test_report import Parsed, only_figures, record_of, write_run

from diffusion.objective import LatentFacts, Objective
from diffusion.samplers import Sampler
from launch.builders.components import build
from launch.builders.objectives import settled
from report.figures import NoDataError
from report.objectives import names_of
from report.over_calls import Curve, Point, curves_over_calls, figure_over_calls
from report.study import read_study
from report.style import styled
from report.write import write_report

NOISE = {"name": "gaussian", "prediction": "noise", "weighting": "none"}
V = {**NOISE, "prediction": "v"}
FLOW = {"name": "flow", "path": "linear", "times": "uniform", "shift": 1.0}
SAMPLERS = {"gaussian": "ddim", "flow": "euler"}


def measured(objective: dict[str, Any], steps: int, distance: float, **changes: Any) -> dict[str, Any]:
    """Return a record whose network was called once a step."""
    width, sampler = changes.pop("width", 16), {"name": SAMPLERS[objective["name"]], "steps": steps}
    changes = {"sampler": sampler, "sampling_gmacs": steps * width**2 / 1e9, **changes}
    return record_of(width, distance, objective=objective, **changes)


def write_two_objectives(sweep: Path) -> None:
    """Write two seeds of noise prediction and of a flow, their evaluations in no order."""
    for seed in (0, 1):
        seeded = {"training_seed": seed}
        write_run(
            sweep,
            f"noise-{seed}",
            *(
                measured(NOISE, steps, value + 2 * seed, **seeded)
                for steps, value in ((50, 4.0), (4, 90.0), (10, 20.0))
            ),
        )
        write_run(
            sweep,
            f"flow-{seed}",
            *(measured(FLOW, steps, value + 4 * seed, **seeded) for steps, value in ((10, 10.0), (50, 5.0), (4, 30.0))),
        )


def test_an_objective_has_the_mean_and_the_spread_of_its_seeds_by_rising_calls(tmp_path: Path) -> None:
    write_two_objectives(tmp_path)
    curves = curves_over_calls(read_study(tmp_path))
    points = (Point(4, (30.0, 34.0)), Point(10, (10.0, 14.0)), Point(50, (5.0, 9.0)))
    of_noise = (Point(4, (90.0, 92.0)), Point(10, (20.0, 22.0)), Point(50, (4.0, 6.0)))
    assert curves == {"d16 n4 p4": [Curve("flow", "euler", points), Curve("gaussian", "ddim", of_noise)]}
    assert [point.mean for point in points] == [32.0, 12.0, 7.0]


def test_bands_reach_from_the_least_to_the_greatest_seed_and_lines_are_means(tmp_path: Path) -> None:
    write_two_objectives(tmp_path)
    with styled():
        (axes,) = figure_over_calls(read_study(tmp_path)).axes
    line = {str(line.get_label()): line for line in axes.lines}["flow: euler"]
    assert list(line.get_xdata()) == [4, 10, 50]
    assert list(line.get_ydata()) == [32.0, 12.0, 7.0]
    band = axes.collections[0].get_paths()[0].get_extents()
    assert (band.y0, band.y1) == (5.0, 34.0)
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len({line.get_color() for line in axes.lines}) == len(axes.lines) == 2


def test_a_point_of_one_seed_is_its_own_mean_and_has_no_spread(tmp_path: Path) -> None:
    write_run(tmp_path, "a", measured(NOISE, 4, 9.0), measured(NOISE, 50, 4.0))
    write_run(tmp_path, "b", measured(FLOW, 4, 8.0), measured(FLOW, 50, 3.0))
    study = read_study(tmp_path)
    (curves,) = curves_over_calls(study).values()
    assert [[(point.mean, len(point.distances)) for point in curve.points] for curve in curves] == [
        [(8.0, 1), (3.0, 1)],
        [(9.0, 1), (4.0, 1)],
    ]
    with styled():
        (axes,) = figure_over_calls(study).axes
    assert len(axes.collections) == 0


def test_an_objective_with_two_samplers_has_two_lines_of_one_color(tmp_path: Path) -> None:
    write_two_objectives(tmp_path)
    heun = {"sampler": {"name": "heun_ode", "steps": 25, "shift": 1.0}, "sampling_gmacs": 50 * 256 / 1e9}
    write_run(tmp_path, "flow-2", measured(FLOW, 50, 6.0), measured(FLOW, 50, 2.0, **heun))
    study = read_study(tmp_path)
    with styled():
        (axes,) = figure_over_calls(study).axes
    lines = {str(line.get_label()): line for line in axes.lines}
    euler, other = lines["flow: euler"], lines["flow: heun_ode"]
    assert euler.get_color() == other.get_color() != lines["gaussian: ddim"].get_color()
    assert euler.get_linestyle() != other.get_linestyle()
    assert study.chosen["flow-0"]["sampler"]["name"] == "euler"  # which every run of the objective has


def test_models_are_not_mixed_and_only_those_of_several_objectives_are_drawn(tmp_path: Path) -> None:
    write_two_objectives(tmp_path)
    write_run(tmp_path, "wide", *(measured(NOISE, steps, 1.0, width=64) for steps in (4, 50)))
    study = read_study(tmp_path)
    assert set(curves_over_calls(study)) == {"d16 n4 p4", "d64 n4 p4"}
    with styled():
        assert [axes.get_title(loc="left") for axes in figure_over_calls(study).axes] == ["d16 n4 p4"]


def test_one_objective_alone_draws_nothing_and_its_page_says_nothing_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    for seed in (0, 1):
        write_run(tmp_path, f"{seed}", measured(NOISE, 4, 9.0 + seed), measured(NOISE, 50, 4.0))
    write_run(tmp_path, "of an earlier version", record_of(16, 7.0, sampler={"name": "ddim", "steps": 50}))
    (tmp_path / "report").mkdir()
    (tmp_path / "report/figure_objectives.png").write_bytes(b"of an earlier report")
    study = read_study(tmp_path)
    report = write_report(study, tmp_path / "report")
    assert "objectives" not in {*report.pictures, *report.missing}
    assert not (tmp_path / "report/figure_objectives.png").exists()
    assert "objective" not in Parsed(report.page.read_text()).tables["models"][0]
    with pytest.raises(NoDataError, match="no model with several objectives"):
        figure_over_calls(study)


def test_several_objectives_at_one_number_of_steps_say_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    write_run(tmp_path, "a", measured(NOISE, 50, 9.0))
    write_run(tmp_path, "b", measured(FLOW, 50, 8.0))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert "sampler.steps=4,10,25,50,100" in report.missing["objectives"]


def test_the_page_has_the_figure_the_objectives_and_each_sampler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_figures(monkeypatch)
    write_two_objectives(tmp_path)
    write_run(tmp_path, "v-0", *(measured(V, steps, 3.0) for steps in (4, 50)))
    report = write_report(read_study(tmp_path), tmp_path / "report")
    assert report.pictures["objectives"].name == "figure_objectives.png"
    text = report.page.read_text()
    assert 'id="figure-objectives"' in text
    assert "the runs of one objective: gaussian noise." in text
    assert "<dd>euler (steps 4); ddim (steps 4)</dd>" in text
    page = Parsed(text)
    assert page.open == []
    head, *rows = page.tables["models"]
    column = head.index("objective")
    assert sorted(row[column] for row in rows) == ["flow", "flow", "gaussian noise", "gaussian noise", "gaussian v"]


def test_the_scaling_figures_show_one_objective(tmp_path: Path) -> None:
    write_two_objectives(tmp_path)
    study = read_study(tmp_path)
    assert set(study.scaling()) == set(study.over_sampling_steps()) == {"noise-0", "noise-1"}
    write_run(tmp_path, "flow-2", measured(FLOW, 50, 5.0))
    assert set(read_study(tmp_path).scaling()) == {"flow-0", "flow-1", "flow-2"}


def test_a_name_has_what_differs_and_arguments_where_they_alone_do() -> None:
    shifted, gvp = {**FLOW, "shift": 3.0}, {**FLOW, "path": "gvp"}
    gamma_5, gamma_1 = ({**NOISE, "weighting": f"min_snr(gamma={gamma})"} for gamma in (5.0, 1.0))
    assert list(names_of([NOISE, gamma_5, FLOW]).values()) == ["gaussian", "gaussian min_snr", "flow"]
    assert list(names_of([gamma_5, gamma_1]).values()) == [f"gaussian min_snr(gamma={gamma})" for gamma in (5.0, 1.0)]
    assert list(names_of([FLOW, shifted, gvp]).values()) == [
        "flow linear shift=1.0",
        "flow linear shift=3.0",
        "flow gvp shift=1.0",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({}, "at one number of network calls"), ({"num_images": 5}, "num_images is 2000 in one and 5 in the other")],
)
def test_objectives_measured_at_other_calls_share_no_curve(
    tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    write_run(tmp_path, "a", measured(NOISE, 50, 9.0))
    write_run(tmp_path, "b", measured(FLOW, 50 if change else 25, 8.0, **change))
    with pytest.raises(ValueError, match=sentence):
        read_study(tmp_path)


def test_the_demo_of_objectives_trains_seven_with_three_seeds_and_one_network() -> None:
    swept = OmegaConf.load(CONF / "experiment/demo/objectives.yaml").hydra.sweeper.params
    names, seeds = (str(swept[key]).split(",") for key in ("experiment/demo/objective", "seed"))
    assert (len(names), seeds) == (7, ["0", "1", "2"])
    assert {path.stem for path in (CONF / "experiment/demo/objective").glob("*.yaml")} == set(names)
    runs = {
        name: composed("train", "experiment=demo/objectives", f"experiment/demo/objective={name}") for name in names
    }
    assert {name: run["name"] for name, run in runs.items()} == {name: f"{name}-seed0" for name in names}
    other = composed("train", "experiment=demo/objectives", "experiment/demo/objective=edm", "seed=2")
    assert other["name"] == "edm-seed2"
    differing = {key for run in runs.values() for key in run if run[key] != runs["noise"][key]}
    assert differing == {"name", "default_name", "run_dir", "diffusion", "sampler"}
    objectives: dict[str, Objective] = {}
    for name, run in runs.items():
        objectives[name] = build(settled(run["diffusion"], LatentFacts(64, 0.5)))
        sampler: Sampler = build(run["sampler"])
        sampler.require(objectives[name])
        assert sampler.calls() == 50
    assert {objective.outputs_per_channel for objective in objectives.values()} == {1}
    facts = {name: objective.facts() for name, objective in objectives.items()}
    assert {name: (fact["name"], fact.get("prediction"), fact.get("path")) for name, fact in facts.items()} == {
        "noise": ("gaussian", "noise", None),
        "v": ("gaussian", "v", None),
        "min_snr": ("gaussian", "noise", None),
        "flow": ("flow", "velocity", "linear"),
        "flow_logit_normal": ("flow", "velocity", "linear"),
        "flow_gvp": ("flow", "velocity", "gvp"),
        "edm": ("edm", None, None),
    }
    assert facts["min_snr"]["weighting"] == "min_snr(gamma=5.0)"
    assert str(facts["flow_logit_normal"]["times"]).startswith("logit_normal")
    assert str(facts["flow"]["times"]) == str(facts["flow_gvp"]["times"]) == "uniform"
