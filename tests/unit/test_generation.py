"""Generated images are divided over processes, cached in chunks, and written to files; mismatches are refused."""

import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, PatternSource, json_lines, silent_progress
from inception_weights import random_weights
from PIL import Image
from small_dinov2 import write_small_dinov2
from test_bad_input import fails
from test_evaluation import PixelFeatures, generator
from test_metrics import in_parallel
from test_model import golden_model
from test_references import write

from core.batch import Condition
from data.conditions import ClassLabels
from diffusion.guidance import Unguided
from evaluation.chunks import Chunk, ChunkStore, TrainingChunks, chunks_of, discard, discard_training
from evaluation.evaluate import Evaluator, MeasurementProtocol
from evaluation.features.extractor import Features
from evaluation.features.inception import InceptionFeatures
from evaluation.generate import Generator
from evaluation.hooks import EVALUATED_BY_TRAINING, EvaluationHook
from evaluation.image_files import NpzFile, PngFiles
from evaluation.metrics.frechet import FrechetDistance, FrechetInceptionDistance
from evaluation.metrics.manifolds import PrecisionRecall
from evaluation.metrics.statistics import FeatureStatistics
from evaluation.reference.file import write_reference
from evaluation.reference.image_sets import SourceImages
from evaluation.reference.reference import Reference, make_reference
from launch import cli
from launch.evaluate import compile_units
from runtime.agreement import require_same
from train.loggers import NoLogger
from train.runfolder import RunFolder
from train.state import TrainState


def test_random_labels_depend_on_seed_and_index_alone() -> None:
    labels = ClassLabels(10).random(2000, seed=3)["label"].numpy()
    assert labels.tolist()[:50] == ClassLabels(10).random(50, seed=3)["label"].tolist()
    assert labels.tolist() != ClassLabels(10).random(2000, seed=4)["label"].tolist()
    assert 130 < np.bincount(labels, minlength=10).min() <= np.bincount(labels, minlength=10).max() < 270


def test_chunks_of_all_processes_are_all_images_once() -> None:
    for world in (1, 2, 7):
        parts = [chunk.indices for rank in range(world) for chunk in chunks_of(101, 10, rank, world)]
        assert sorted(np.concatenate(parts).tolist()) == list(range(101))
        assert {len(part) for part in parts} == {10, 1}


class CountingGenerator(Generator):
    """Counts its images, and fails at a given image, as a killed process would."""

    made: list[int]
    fail_at: int | None

    def images_in_step(self, indices: np.ndarray, condition: Condition, at_most: int) -> np.ndarray:
        if self.fail_at in indices:
            raise KeyboardInterrupt
        self.made.extend(indices.tolist())
        return super().images_in_step(indices, condition, at_most)


def counting(fail_at: int | None = None, **changes: Any) -> CountingGenerator:
    made = CountingGenerator(**{**vars(generator()), **changes})
    object.__setattr__(made, "made", [])
    object.__setattr__(made, "fail_at", fail_at)
    return made


class Sums(PixelFeatures):
    """An extractor of a few sums of pixels, so that 30 images have a covariance of full rank."""

    def __call__(self, images: np.ndarray) -> Features:
        found = super().__call__(images)
        vectors = images.astype(np.float32).reshape(len(images), 8, -1).mean(axis=2)
        return Features(vectors, found.classes)


def evaluator(**changes: Any) -> Evaluator:
    real = np.random.default_rng(0).normal(120, 20, (50, 8)).astype(np.float32)
    reference = Reference("r", "h", FeatureStatistics.of(real), 0.0, num_vectors=50, load_vectors=lambda: real)
    protocol = MeasurementProtocol({"name": "ddpm", "steps": 10}, {"name": "unguided"}, 30, 0, "fp32")
    metrics = {"frechet": FrechetDistance(), "precision_recall": PrecisionRecall()}
    return replace(Evaluator(Sums(), reference, protocol, 7, metrics), **changes)


def test_a_killed_evaluation_keeps_its_finished_chunks(tmp_path: Path) -> None:
    whole = evaluator().evaluate(generator(), silent_progress)
    store = ChunkStore(tmp_path, {"weights": "w"})
    with pytest.raises(KeyboardInterrupt):
        evaluator().evaluate(counting(fail_at=15), silent_progress, store)
    again = counting()
    assert evaluator().evaluate(again, silent_progress, store) == whole
    assert again.made == list(range(14, 30))
    other = counting()
    evaluator().evaluate(other, silent_progress, ChunkStore(tmp_path, {"weights": "others"}))
    assert other.made == list(range(30))


def test_chunks_that_nobody_wants_any_more_are_deleted_unless_they_are_in_use(tmp_path: Path) -> None:
    one, two = (ChunkStore(tmp_path, {"weights": which}, f"of-{which}") for which in "ab")
    chunk, features = Chunk(0, 0, 2), Features(np.zeros((2, 3), np.float32))
    for store in (one, two):
        store.write(chunk, features)
    discard(tmp_path, lambda name: name.startswith("of-b"))
    assert one.read(chunk) is not None
    assert two.read(chunk) is None
    with one.used():
        discard(tmp_path, lambda _: True)
        with one.used():  # as another process of the same evaluation
            pass
        discard(tmp_path, lambda _: True)
        assert one.read(chunk) is not None
    discard(tmp_path, lambda _: True)
    assert list(tmp_path.iterdir()) == []
    discard(tmp_path / "nowhere", lambda _: True)


def test_a_run_keeps_the_chunks_that_it_can_come_to_again_and_those_of_others(tmp_path: Path) -> None:
    mine, other = (TrainingChunks(tmp_path, {"lr": lr}) for lr in (1, 2))
    chunk, features = Chunk(0, 0, 2), Features(np.zeros((2, 3), np.float32))
    stores = [mine.of_step(4), mine.of_step(20), other.of_step(4), ChunkStore(tmp_path, {}, "evaluate-theirs")]
    for store in stores:
        store.write(chunk, features)
    old = tmp_path / "0123456789abcdef"  # of an earlier version of the program
    old.mkdir()
    (old / "chunk-000000.json").write_text("{}")
    mine.discard_foreign(step=2)
    assert [store.read(chunk) is not None for store in stores] == [True, True, False, True]
    assert not old.exists()
    mine.discard_until(4)
    assert [store.read(chunk) is not None for store in stores] == [False, True, False, True]
    mine.discard_foreign(step=0)
    assert [store.read(chunk) is not None for store in stores] == [False, False, False, True]
    stores[0].write(chunk, features)
    discard_training(tmp_path)
    assert [store.read(chunk) is not None for store in stores] == [False, False, False, True]


def test_a_damaged_chunk_is_made_again(tmp_path: Path) -> None:
    store = ChunkStore(tmp_path, {})
    whole = evaluator().evaluate(generator(), silent_progress, store)
    cut, flipped = (next(tmp_path.glob(f"*/chunk-00000{number}.safetensors")) for number in (1, 2))
    cut.write_bytes(cut.read_bytes()[:-5])
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x07")
    next(tmp_path.glob("*/chunk-000003.json")).unlink()
    again = counting()
    assert evaluator().evaluate(again, silent_progress, store) == whole
    assert again.made == list(range(7, 28))


class OneOf:
    """One of several runtimes, each in a thread, which otherwise equal the one on the CPU."""

    def __init__(self, rank: int, world: int, gather: Any) -> None:
        self.data_rank, self.data_world, self.gather, self.is_main = rank, world, gather, rank == 0
        self._runtime = generator().runtime

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def wait(self) -> None:
        self.gather(np.zeros(1))

    def require_same(self, facts: Mapping[str, str]) -> None:
        require_same(facts, lambda mine: list(self.gather(np.array([mine], dtype=object))))


@pytest.mark.parametrize("world", [2, 7])
def test_any_number_of_processes_gives_the_same_record(world: int, tmp_path: Path) -> None:
    """Use 30 images in chunks of 7, which are 5 chunks, so that 2 of 7 processes get none."""
    alone = evaluator().evaluate(generator(), silent_progress)

    def work(rank: int, gather: Any) -> dict[str, Any]:
        make = Generator(**{**vars(generator()), "runtime": OneOf(rank, world, gather)})
        files = NpzFile(str(tmp_path / "images.npz"))
        return evaluator().evaluate(make, silent_progress, ChunkStore(tmp_path / "chunks", {}), files)

    for record in in_parallel(world, work):
        assert record["frechet_distance"] == pytest.approx(alone["frechet_distance"], rel=1e-9)
        assert {**record, "frechet_distance": 0} == {**alone, "frechet_distance": 0}
    with np.load(tmp_path / "images.npz") as file:
        assert file["arr_0"].shape == (30, 8, 8, 4)


def test_processes_that_see_images_differently_are_refused() -> None:
    """Refuse hosts that each trained a classifier of their own, or were given different files of one name."""

    def work(rank: int, gather: Any) -> str:
        extractor = Sums()
        extractor.hash = f"hash {rank}"
        make = counting(runtime=OneOf(rank, 2, gather))
        with pytest.raises(ValueError, match=r"processes of this job differ: feature extractor is hash 0 on .* hash 1"):
            evaluator(extractor=extractor).evaluate(make, silent_progress)
        return str(make.made)

    assert in_parallel(2, work) == ["[]", "[]"]


def test_the_images_are_kept_in_adms_format_or_as_pngs(tmp_path: Path) -> None:
    expected = generator().all_images(ClassLabels(10).in_turn(30), 30, 7)
    npz = NpzFile(str(tmp_path / "images.npz"))
    with pytest.raises(KeyboardInterrupt):
        evaluator().evaluate(counting(fail_at=15), silent_progress, ChunkStore(tmp_path / "chunks", {}), npz)
    again = counting()
    evaluator().evaluate(again, silent_progress, ChunkStore(tmp_path / "chunks", {}), npz)
    assert again.made == list(range(14, 30))
    with np.load(tmp_path / "images.npz", allow_pickle=False) as file:
        np.testing.assert_array_equal(file["arr_0"], expected)
        np.testing.assert_array_equal(file["arr_1"], np.arange(30) % 10)
    assert not (tmp_path / "images.npz.parts").exists()
    png = PngFiles(str(tmp_path / "pngs"))
    chunk, images = Chunk(0, 4, 7), expected[4:7, :, :, :3]
    png.start("this", is_main=True)
    assert not png.has(chunk)
    png.write(chunk, images)
    assert png.has(chunk)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "pngs/000005.png")), images[1])
    PngFiles(str(tmp_path / "pngs")).start("this", is_main=True)
    with pytest.raises(ValueError, match=r"pngs holds other images .of evaluation this, this is that."):
        PngFiles(str(tmp_path / "pngs")).start("that", is_main=True)
    with pytest.raises(ValueError, match="have 4 channels, but a PNG has 1 or 3"):
        png.write(chunk, expected[4:7])
    with pytest.raises(ValueError, match=r"path is images, but it must end in .npz"):
        NpzFile("images")


def test_parts_of_a_file_from_another_evaluation_are_thrown_away(tmp_path: Path) -> None:
    files, chunk = NpzFile(str(tmp_path / "images.npz")), Chunk(0, 0, 2)
    files.start("one", is_main=True)
    files.write(chunk, np.zeros((2, 8, 8, 3), np.uint8))
    files.start("one", is_main=True)
    assert files.has(chunk)
    files.start("two", is_main=True)
    assert not files.has(chunk)


def test_images_that_are_not_finite_are_refused() -> None:
    def diverged(x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        output = x_t.repeat(1, 2, 1, 1)
        output[condition["label"] == 2] = torch.nan
        return output

    with pytest.raises(
        ValueError, match=r"1 of 7 images are not finite .the first is image 2.; the weights have diverged"
    ):
        evaluator().evaluate(counting(denoiser=diverged), silent_progress)


class Overflowing(Sums):
    """An extractor like a network in float16 whose activations overflow."""

    def __call__(self, images: np.ndarray) -> Features:
        found = super().__call__(images)
        found.vectors[0, 2] = np.inf
        return found


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    words = r"1 of {} images have features .pixels. that are not finite"
    with pytest.raises(ValueError, match=words.format(7)):
        evaluator(extractor=Overflowing()).evaluate(generator(), silent_progress, ChunkStore(tmp_path, {}))
    assert list(tmp_path.glob("*/*")) == []
    with pytest.raises(ValueError, match=words.format(50)):
        make_reference(PatternSource(), 8, Overflowing())
    with pytest.raises(ValueError, match=words.format(50)):
        write_reference(
            tmp_path / "r.npz",
            SourceImages(PatternSource(), 8),
            Overflowing(),
            num_kept=5,
            seed=0,
            batch_size=50,
            runtime=generator().runtime,
            progress=silent_progress,
        )


def test_a_protocol_of_fewer_images_than_a_batch_generates_no_more(tmp_path: Path) -> None:
    sizes = []

    def seen(x_t: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        sizes.append(len(x_t))
        return x_t.repeat(1, 2, 1, 1)

    guided = Unguided(seen, null=ClassLabels(10).null, latent_channels=1)
    evaluator(batch_size=250).evaluate(counting(denoiser=guided, cost_of=lambda network: 1), silent_progress)
    assert set(sizes) == {30}


def test_what_does_not_fit_is_refused_before_anything_is_generated() -> None:
    make, fits = counting(), evaluator()
    for changes, words in (
        ({"reference": replace(fits.reference, image_size=256)}, "has images of side 256, but the generated images 8"),
        ({"reference": replace(fits.reference, num_classes=1000)}, "has classes: 1000, but the generated images 10"),
        ({"protocol": replace(fits.protocol, num_images=3)}, "needs at least 4 images .3 neighbors., but there are 3"),
        ({"metrics": {"fid": FrechetInceptionDistance()}}, "fid is defined on the 2015 Inception network"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluator(**changes).evaluate(make, silent_progress)
    assert make.made == []


def test_a_record_says_all_that_its_number_depends_on() -> None:
    """Check that `identity`, by which a run refuses to continue its curve, has each of these."""
    measure = evaluator()
    record = measure.evaluate(generator(), silent_progress)
    assert measure.identity == {
        "sampler": {"name": "ddpm", "steps": 10},
        "guidance": {"name": "unguided"},
        "num_images": 30,
        "sampling_seed": 0,
        "network_precision": "fp32",
        "labels": "balanced",
        "feature_extractor_hash": "0",
        "reference_hash": "h",
        "metrics": {"frechet": {}, "precision_recall": {"k": 3, "distances": "fp32"}},
    }
    assert measure.identity.items() <= record.items()
    assert (record["feature_extractor"], record["reference"], record["decoder"]) == ("pixels", "r", "identity 1")


def test_random_labels_are_part_of_the_protocol() -> None:
    balanced, random = evaluator(), evaluator(protocol=replace(evaluator().protocol, labels="random"))
    one, two = (each.evaluate(generator(), silent_progress) for each in (balanced, random))
    assert (one["labels"], two["labels"]) == ("balanced", "random")
    assert one["frechet_distance"] != two["frechet_distance"]


def test_training_refuses_to_continue_its_curve_in_another_protocol(tmp_path: Path) -> None:
    folder, runtime = RunFolder(tmp_path), generator().runtime
    state = TrainState(None, None, None, batch_size=4, total_steps=9, step=2)  # type: ignore[arg-type]

    def hook(num_images: int) -> EvaluationHook:
        measured, facts = {"num_images": num_images, "frechet_distance": 1.0}, {"weights": "ema"}
        identity = facts | {"num_images": num_images}
        chunks = TrainingChunks(tmp_path / "chunks", {})
        return EvaluationHook(2, lambda _: measured, chunks, lambda _: facts, identity, folder, NoLogger(), runtime)

    folder.append(folder.evaluations, {"step": 2, "weights": "ema", "num_images": 50, "evaluated_by": "evaluate"})
    hook(10).start(state)
    assert json_lines(folder.evaluations)[-1]["evaluated_by"] == EVALUATED_BY_TRAINING
    hook(10).require_one_protocol()
    with pytest.raises(ValueError, match="during training have num_images 10, but now it would be 50"):
        hook(50).require_one_protocol()


def test_an_evaluation_that_is_killed_during_training_goes_on_where_it_was(tmp_path: Path) -> None:
    folder, facts = RunFolder(tmp_path), {"weights": "ema"}
    state = TrainState(None, None, None, batch_size=4, total_steps=9, step=2)  # type: ignore[arg-type]

    def hook(make: Generator) -> EvaluationHook:
        chunks = TrainingChunks(tmp_path / "chunks", {})

        def measure(store: ChunkStore) -> dict[str, Any]:
            return evaluator().evaluate(make, silent_progress, store)

        return EvaluationHook(2, measure, chunks, lambda _: facts, facts, folder, NoLogger(), make.runtime)

    with pytest.raises(KeyboardInterrupt):
        hook(counting(fail_at=15))(state, {})
    assert not folder.evaluations.exists()
    again = counting()
    hook(again).start(state)
    assert again.made == list(range(14, 30))
    whole = evaluator().evaluate(generator(), silent_progress)
    (record,) = json_lines(folder.evaluations)
    assert whole.items() <= record.items()
    assert list((tmp_path / "chunks").iterdir()) == []
    later = counting()
    state.step = 4
    hook(later)(state, {})
    assert later.made == list(range(30))


def test_a_network_that_cannot_be_compiled_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="XLA compiles by itself"):
        compile_units(golden_model()[0], torch.device("xla"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"needs a C.. compiler, but there is no no-such-compiler"):
        compile_units(golden_model()[0], torch.device("cpu"))


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["ditscale", *arguments])
    cli.main()


def test_all_metrics_of_inception_and_dinov2_from_the_command_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/digits").symlink_to(digits)
    run(["train", *TINY_RUN, "total_steps=10", "run_dir=run"], monkeypatch)
    weights = random_weights(tmp_path)
    inception = ["evaluation/features=inception", f"evaluation.features.weights={weights}"]
    evaluate = ["evaluate", "checkpoint=run", "sampler.steps=3", "evaluation.num_images=6", "runtime.device=cpu"]
    classifier = [*evaluate, "evaluation.features.epochs=1"]
    assert "sha256" in fails([*evaluate, *inception], monkeypatch, capfd)
    inception.append("evaluation.features.sha256=''")

    source = SourceImages(PatternSource(6, num_classes=10), 8)
    write(tmp_path / "real.npz", source, InceptionFeatures(str(weights), sha256=""))
    names = "metrics=[fid,sfid,inception_score,precision_recall,kid]"
    settings = ["evaluation.reference=real.npz", "evaluation.labels=random", "evaluation.batch_size=4"]
    sizes = ["evaluation.metric.inception_score.split_size=3", "evaluation.metric.kid.subset_size=5"]
    files = ["evaluation/image_file=png", "evaluation.image_file.path=pngs"]
    run([*evaluate, *inception, *settings, *sizes, *files, names], monkeypatch)
    (record,) = json_lines(tmp_path / "run/evaluations.jsonl")
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert np.isfinite(record[name]), name
    assert record["fid"] == record["frechet_distance"] > 0
    assert (record["reference"], record["labels"], record["recognized_fraction"]) == ("pattern", "random", None)
    assert record["metrics"]["precision_recall"] == {"k": 3, "distances": "fp32"}
    assert len(list((tmp_path / "pngs").glob("*.png"))) == 6
    assert list((tmp_path / "run/chunks").iterdir()) == []

    dinov2 = ["evaluation/features=dinov2", f"evaluation.features.folder={write_small_dinov2(tmp_path / 'dinov2')}"]
    fitting = ["evaluation.features.image_size=28", "evaluation.metric.kernel.subset_size=5"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    dinov2.append("compile=where_possible")
    run([*evaluate, *dinov2, *fitting, "metrics=[frechet,kernel,precision_recall]"], monkeypatch)
    assert "note: blocks are not compiled, and steps are slower: there is no C++ compiler" in capfd.readouterr().err
    *_, record = json_lines(tmp_path / "run/evaluations.jsonl")
    assert record["feature_extractor"] == "DINOv2 features (width 32, depth 2)"
    for name in ("frechet_distance", "kernel_distance", "precision", "recall"):
        assert np.isfinite(record[name]), name

    assert "There is no metric 'fdi'" in fails([*classifier, "metrics=[fdi]"], monkeypatch, capfd)
    assert "choose evaluation/features=inception" in fails([*classifier, "metrics=[fid]"], monkeypatch, capfd)
    sentence = fails([*evaluate, "evaluation/features=inception"], monkeypatch, capfd)
    assert "There are no Inception weights at cache/pt_inception-2015-12-05-6726825d.pth; fetch https://" in sentence
    assert "There is no reference nowhere.npz" in fails(
        [*classifier, "evaluation.reference=nowhere.npz"], monkeypatch, capfd
    )


def test_references_from_the_command_line(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    features = ["evaluation.features.epochs=2", "num_kept=30"]
    run(["reference", "out=a.npz", *features], monkeypatch)
    run(["reference", "out=b.npz", *features, "evaluation/image_set=shards", f"data.shards={digits}"], monkeypatch)
    assert "1797 images of digits in digits classifier features: a.npz, sha256" in capfd.readouterr().out
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as two:
        assert one["arr_0"].shape == (30, 8, 8, 1)
        np.testing.assert_allclose(one["mu"], two["mu"], rtol=1e-5)
        assert json.loads(str(two["about"]))["name"] == "digits decoded by identity 1"
    assert "a reference is an .npz" in fails(["reference", "out=a.txt"], monkeypatch, capfd)
    shutil.rmtree(tmp_path / "cache")
    assert "num_kept is 0, but it must be positive" in fails(
        ["reference", "out=c.npz", "num_kept=0"], monkeypatch, capfd
    )
