"""Training on shards behind a URL, as a user types it: the same losses as from a folder."""

from pathlib import Path

import pytest
from conftest import TINY_RUN, ditscale, json_lines
from faulty_server import FaultyServer
from s3_server import s3_server, upload

WORDS = [*TINY_RUN, "data/order=windowed", "data.order.shards_per_window=2", "run_dir=run"]


@pytest.fixture(scope="module")
def losses(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Return the losses of a run on the local folder."""
    folder = tmp_path_factory.mktemp("local")
    ditscale("train", *WORDS, f"data.shards={digits}", cwd=folder)
    return [line["loss"] for line in json_lines(folder / "run/metrics.jsonl")]


def test_training_from_s3_gives_the_losses_of_the_folder(digits: Path, losses: list[float], tmp_path: Path) -> None:
    with s3_server():
        ditscale("train", *WORDS, f"data.shards={upload(digits, 'digits')}", cwd=tmp_path)
    assert [line["loss"] for line in json_lines(tmp_path / "run/metrics.jsonl")] == losses
    assert len(list((tmp_path / "cache/shards").glob("*.tar"))) >= 4  # two windows of the eight shards


def test_training_from_http_survives_failures_and_continues_on_a_fresh_cache(
    digits: Path, losses: list[float], tmp_path: Path
) -> None:
    with FaultyServer(digits).running() as server:
        server.faults = {"manifest.json": ["500"], "shard-000002.tar": ["cut", "500"], "shard-000005.tar": ["flip"]}
        words = [*WORDS, f"data.shards={server.url}"]
        ditscale("train", *words, "total_steps=20", cwd=tmp_path)
        words += ["data.cache=elsewhere", "resume.allow=[total_steps]"]
        ditscale("train", *words, cwd=tmp_path)
    assert [line["loss"] for line in json_lines(tmp_path / "run/metrics.jsonl")] == losses
