"""The committed evaluations of the Fashion-MNIST studies give the tables and pictures of docs/fashion.md."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest

from benchmarks.fashion_tables import RATES, RESULTS, ROWS, STUDIES, table
from core.rooms import ROOT
from report.figures import FIGURES
from report.study import read_study
from report.style import content_of, styled

PAGE = ROOT / "docs/fashion.md"
PICTURES = sorted((ROOT / "docs/pictures/fashion").glob("*_*.png"))
PINNED = dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("study", STUDIES)
def test_the_page_has_the_tables_of_the_evaluations(study: str) -> None:
    assert table(study) in PAGE.read_text()


def test_all_runs_have_three_seeds_and_the_protocol_of_the_page() -> None:
    for study in {*STUDIES, *RATES.values()} - ROWS.keys():
        found = read_study(RESULTS / f"{study}.jsonl")
        seeds = {name.rsplit("-seed", 1)[0]: set() for name in found.chosen}
        for name, record in found.chosen.items():
            seeds[name.rsplit("-seed", 1)[0]].add(record["training_seed"])
        assert set(map(frozenset, seeds.values())) == {frozenset({0, 1, 2})}
        protocol = found.protocol
        assert (protocol["step"], protocol["num_images"], protocol["images_seen"]) == (1000, 10_000, 64_000)
        assert protocol["feature_extractor_hash"].startswith("cf81cec1")


@pytest.mark.skipif(
    any(version(name) != PINNED[name] for name in ("matplotlib", "numpy", "pillow")),
    reason="the pictures were drawn by the releases in constraints.txt",
)
@pytest.mark.parametrize("picture", PICTURES, ids=lambda path: path.stem)
def test_a_picture_is_drawn_again_from_the_evaluations_alone_byte_for_byte(picture: Path) -> None:
    name, number = picture.stem.split("_")
    study = read_study(RESULTS / f"{name}.jsonl")
    (figure,) = [figure for figure in FIGURES if figure.number == int(number)]
    with styled():
        assert content_of(figure.draw(study), "png") == picture.read_bytes()


def test_the_page_shows_the_figures() -> None:
    shown = set(re.findall(r"\(pictures/fashion/(\w+)\.png\)", PAGE.read_text()))
    assert shown == {*(path.stem for path in PICTURES), "samples"}
    assert {name.split("_")[1] for name in shown - {"samples"}} >= {"2", "5", "6", "8", "9", "10"}
