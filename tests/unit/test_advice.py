"""Errors advise what the job can do: never a setting that already has the value, never an empty range."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, PatternSource, encode_pattern, needs_torch_xla, resealed
from faulty_server import FaultyServer
from poisoned_shards import poisoned

import launch.verify
from data.conditions import ClassLabels
from data.images import ExactSize, Preparation, UnreadableImageError
from data.sources import prepared
from evaluation.features.classifier import ClassifierFeatures
from evaluation.features.inception import VARIABLE, InceptionFeatures
from evaluation.metrics.metric import require_inception
from evaluation.reference.image_sets import SourceImages
from evaluation.reference.reference import make_reference
from launch.command.app import _sentence
from launch.evaluate import compile_units
from model.autoencoder import IdentityAutoencoder
from runtime.choice import xla
from runtime.graph_adamw import GraphAdamW
from train.ema import Average, ConstantAverage, WarmedUpAverage, initial_share_note
from train.loggers import WandbLogger

SAMPLE = ["sample", "checkpoint=run", "num_images=2", "sampler.steps=2", "runtime=cpu", "out=x"]
FULL = torch.OutOfMemoryError("CUDA out of memory.")


def refusal(call: object, *given: object, **named: object) -> str:
    """Return the sentence by which a call is refused."""
    with pytest.raises(ValueError, match=r"\S\.$") as raised:
        call(*given, **named)  # type: ignore[operator]
    return str(raised.value)


def test_precision_fp32_is_advised_where_it_is_not_set_only(digits: Path, in_process: InProcess) -> None:
    words = [*TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=1", "optimizer.lr=1e15"]
    in_process("train", *words, "checkpoint_every=1")  # its loss is finite, its weights are no use
    for precision, advised in (("bf16", True), ("fp32", False)):
        shown = in_process(*SAMPLE, "weights=model", f"precision={precision}", expect=2)
        assert "2 of 2 images are not finite" in shown
        assert ("precision=fp32" in shown) == advised, shown


@pytest.mark.parametrize(("mode", "advised"), [("offline", False), ("dryrun", False), ("online", True)])
def test_wandbs_offline_mode_is_advised_where_it_is_not_set_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, advised: bool
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    logger = WandbLogger(tmp_path, project="no/name", group="group", name="name", config={}, job="train")
    shown = refusal(logger.log, {"step": 1})
    assert shown.startswith("wandb cannot log to this run (")
    assert ("WANDB_MODE=offline" in shown) == advised, shown
    assert "train/logger=none" in shown


@pytest.mark.parametrize(
    ("job", "settings", "advice"),
    [
        (
            "train",
            {"batch_size": 256, "runtime": {"micro_batches": 1}, "evaluation": {"batch_size": 250}},
            "set runtime.micro_batches=2 or activation_checkpointing=true, or for samples a smaller "
            "evaluation.batch_size",
        ),
        (
            "train",
            {"batch_size": 6, "runtime": {"micro_batches": 3}, "activation_checkpointing": True},
            "set runtime.micro_batches=6, or for samples a smaller evaluation.batch_size",
        ),
        (
            "train",
            {"batch_size": 2, "runtime": {"micro_batches": 2}, "activation_checkpointing": True},
            "take a GPU with more memory, or for samples set a smaller evaluation.batch_size",
        ),
        (
            "train",
            {
                "batch_size": 1,
                "runtime": {"micro_batches": 1},
                "activation_checkpointing": True,
                "evaluation": {"batch_size": 1},
            },
            "take a GPU with more memory",
        ),
        ("evaluate", {"evaluation": {"batch_size": 1}}, "take a GPU with more memory"),
        ("sample", {"batch_size": 1}, "take a GPU with more memory"),
        ("encode", {"batch_size": 64}, "set a smaller batch_size"),
    ],
)
def test_a_full_gpu_gets_no_advice_that_is_followed_already(job: str, settings: object, advice: str) -> None:
    assert _sentence(job, FULL, settings) == f"The GPU's memory is full; {advice}."


def test_a_diverged_run_that_clips_gradients_is_told_to_clip_more(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    poisoned(digits, tmp_path / "bad", 16 * 2 + 5)
    words = ["train", *TINY_RUN, "data.shards=bad"]
    assert "lower optimizer.lr or set max_grad_norm." in in_process(*words, "run_dir=a", expect=1)
    shown = in_process(*words, "run_dir=b", "max_grad_norm=1.5", expect=1)
    assert "lower optimizer.lr or set a max_grad_norm below 1.5." in shown


@pytest.mark.parametrize(
    ("precision", "advice"), [("bf16", "try data.autoencoder.precision=fp32"), ("fp32", "leave that image out")]
)
def test_an_autoencoder_in_fp32_is_not_advised_fp32(tmp_path: Path, precision: str, advice: str) -> None:
    class Broken(IdentityAutoencoder):
        def moments(self, images: torch.Tensor) -> torch.Tensor:
            return super().moments(images) / 0

    autoencoder = Broken(1)
    autoencoder.precision = precision
    shown = refusal(encode_pattern, tmp_path, autoencoder=autoencoder)
    assert re.search(rf"not finite for pattern-\d+; {advice}\.$", shown), shown


@pytest.mark.parametrize(
    ("average", "decay", "steps", "advice"),
    [
        (ConstantAverage, 0.9999, 600, "train with train/ema=warmed_up (or short_run), or longer."),
        (ConstantAverage, 0.99, 100, "train with train/ema=warmed_up, or longer."),  # that is short_run
        (WarmedUpAverage, 0.9999, 1, "train longer."),
    ],
)
def test_a_run_is_not_advised_the_average_that_it_has(
    average: type[Average], decay: float, steps: int, advice: str
) -> None:
    note = initial_share_note(average(torch.nn.Linear(1, 1), decay), "ema", steps)  # type: ignore[call-arg]
    assert advice in str(note)


def test_an_image_that_is_not_square_is_not_advised_the_size_that_is_set() -> None:
    for height, width, advice in [(8, 12, "set data/crop=center."), (12, 12, "set data.image_size=12 or data/crop=")]:
        shown = refusal(ExactSize(), np.zeros((height, width, 1), np.uint8), 8)
        assert advice in shown
        assert "data.image_size=8" not in shown


@needs_torch_xla
@pytest.mark.parametrize(
    ("precision", "way_out"), [("bf16", "unset it."), ("fp32", "unset it and use precision=bf16.")]
)
def test_a_variable_that_lowers_precision_gives_way_to_a_setting_that_is_not_set(
    monkeypatch: pytest.MonkeyPatch, precision: str, way_out: str
) -> None:
    monkeypatch.setenv("XLA_USE_BF16", "1")
    assert refusal(xla, precision).endswith(way_out)


def test_adamw_with_options_is_not_advised_adamw() -> None:
    layer = torch.nn.Linear(2, 2)

    def continued(optimizer: torch.optim.Optimizer) -> str:
        whole = (layer, lambda name, value: value, lambda value: value, False)
        return refusal(GraphAdamW.continuing, optimizer, dict(layer.named_parameters()), *whole)

    assert continued(torch.optim.AdamW(layer.parameters(), amsgrad=True)).endswith("leave optimizer.amsgrad out.")
    assert continued(torch.optim.Adam(layer.parameters())).endswith("use train/optimizer=adamw.")


class Unreadable(PatternSource):
    def __getitem__(self, index: int) -> object:  # type: ignore[override]
        raise UnreadableImageError("it is torn", f"pattern-{index}")


def test_an_unreadable_image_of_a_reference_is_advised_what_its_job_takes(tmp_path: Path) -> None:
    of_shards = "evaluation/image_set=shards"
    images = SourceImages(Unreadable(), 8)  # of ditscale reference
    assert refusal(images.images, np.arange(1)).endswith(
        f"or make the reference of the shards, where it is left out, by {of_shards}."
    )
    shown = refusal(ClassifierFeatures, Unreadable(), 8, str(tmp_path))  # of any job, which may have shards already
    assert shown.endswith("remove it, or choose other evaluation/features, which are not trained on these images.")
    shown = refusal(make_reference, Unreadable(), 8, None)
    assert "by evaluation.reference (`ditscale reference evaluation/image_set=shards` makes one)" in shown


def test_a_metric_of_other_features_is_named_as_every_job_lists_it(tmp_path: Path) -> None:
    shown = refusal(require_inception, "fid", ClassifierFeatures(PatternSource(), 8, str(tmp_path), epochs=1))
    assert "metrics=" not in shown  # which train has as evaluation.metrics
    assert "or the metric frechet for a distance in these features" in shown


def test_a_cache_too_small_for_windows_of_one_shard_is_not_advised_fewer(digits: Path, in_process: InProcess) -> None:
    with FaultyServer(digits).running() as server:
        words = ["train", *TINY_RUN, f"data.shards={server.url}", "data.cache_bytes=1000", "data/order=windowed"]
        fewer = "choose data/order=windowed with fewer data.order.shards_per_window."
        assert fewer in in_process(*words, "data.order.shards_per_window=2", expect=2)
        shown = in_process(*words, "data.order.shards_per_window=1", expect=2)
    assert "raise data.cache_bytes, or encode with a smaller data.samples_per_shard." in shown


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without GPUs")
def test_a_machine_without_gpus_is_not_advised_to_start_0_processes(in_process: InProcess) -> None:
    shown = in_process("encode", "data=digits", "data.shards=shards", "device=cuda", expect=2)
    assert "Process 0 of this host has no GPU: PyTorch sees 0; set device=cpu." in shown


def test_a_repair_that_mends_nothing_does_not_advise_itself(
    digits: Path, tmp_path: Path, in_process: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(digits, tmp_path / "shards")
    (tmp_path / "shards/shard-000000.tar").write_bytes(b"")
    words = ["verify", "data=digits", "data.shards=shards"]
    assert "run `ditscale verify` with the settings of the encoding and repair=true." in in_process(*words, expect=2)
    monkeypatch.setattr(launch.verify, "encode_shards", lambda *_: None)
    shown = in_process(*words, "repair=true", expect=2)
    assert "and repair=true" not in shown
    assert "a repair did not fix them: move them away and run `ditscale encode` again." in shown


def test_a_variable_is_advised_where_it_would_be_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert f"or {VARIABLE}=PATH" in refusal(InceptionFeatures, cache=str(tmp_path))
    assert VARIABLE not in refusal(InceptionFeatures, weights=str(tmp_path / "none"), cache=str(tmp_path))
    cpu = torch.device("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "there is no no-such-compiler; install one, name another by the variable CXX" in refusal(
        compile_units, torch.nn.Identity(), cpu
    )
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "install one, name yours by the variable CXX" in refusal(compile_units, torch.nn.Identity(), cpu)


def test_no_sentence_counts_classes_down_to_minus_one(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    """Use data of 0 classes, and a run without conditions."""
    source = PatternSource(num_classes=1, bad_label_at=0)
    source.class_names = []
    shown = [refusal(prepared, source, 0, Preparation(8, ExactSize()))]
    assert shown[0].endswith("has label 99, but there are 0 classes; name the classes, at least 1.")

    words = ["train", *TINY_RUN, "run_dir=run", "total_steps=1", "data/condition=none"]
    in_process(*words, f"data.shards={digits}", "checkpoint_every=1")
    for labels in ("[0]", "[]", "[-1]", "[10]", "[three]"):
        shown.append(in_process(*SAMPLE, f"labels={labels}", expect=2))
        assert re.search(r"labels is given, but \S+ was trained without classes; leave it out\.", shown[-1])

    shutil.copytree(digits, tmp_path / "shards")
    spec = {**json.loads((digits / "manifest.json").read_text())["spec"], "num_classes": 0}
    resealed(tmp_path / "shards/manifest.json", spec=spec, class_names=[])
    shown.append(in_process(*words, "data.shards=shards", "run_dir=other", expect=2))
    assert "spec.num_classes" in shown[-1]
    assert not [sentence for sentence in shown if "-1" in sentence.replace("labels=[-1]", "")]


def test_labels_need_a_class() -> None:
    with pytest.raises(AssertionError, match="data without classes have no labels"):
        ClassLabels(0)
