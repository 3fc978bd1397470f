"""Results are logged to wandb, and a user who cannot log there is told why."""

import socket
from pathlib import Path

import pytest
import wandb

from report.study import MEASURES
from train.loggers import OVER_IMAGES_SEEN, WandbLogger


def logger(folder: Path) -> WandbLogger:
    return WandbLogger(folder, project="ditscale", group="group", name="name", config={}, job="train")


def test_every_metric_of_the_report_is_drawn_over_images_seen() -> None:
    assert {measure.key for measure in MEASURES} | {"frechet_distance", "fid"} == set(OVER_IMAGES_SEEN)


def test_a_mode_that_wandb_does_not_know_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match="WANDB_MODE is 'ofline', but it must be online, offline or disabled"):
        logger(tmp_path)


def test_a_machine_that_cannot_reach_wandb_is_told_of_the_offline_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:  # nobody listens at its port
        taken.bind(("127.0.0.1", 0))
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        wandb.teardown()  # a test before this one may have read the environment already
        with pytest.raises(
            ValueError,
            match=r"with WANDB_MODE=offline .which `wandb sync` sends later., or train/logger=none, the same",
        ):
            logger(tmp_path).log({"step": 1})


@pytest.mark.parametrize("damage", ["flip", "cut", "emptied", "folder"])
def test_a_damaged_id_of_a_wandb_run_is_named_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = logger(tmp_path)
    first.log({"step": 1})
    first.finish()
    file = tmp_path / "wandb/id"
    whole = file.read_text()
    logger(tmp_path)
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_text(
            {"flip": ("0" if whole[0] != "0" else "1") + whole[1:], "cut": whole[:8], "emptied": ""}[damage]
        )
    with pytest.raises(ValueError, match="wandb/id"):
        logger(tmp_path)
    if damage != "folder":
        file.write_text(whole[:16])  # as earlier versions kept it
        logger(tmp_path)
