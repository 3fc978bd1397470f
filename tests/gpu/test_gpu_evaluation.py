"""Encoding, sampling and measuring on a GPU give the CPU's numbers, also where TF32 is allowed elsewhere."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, PatternSource, command, encode_pattern, json_lines, run_process
from inception_weights import PREFIX, random_weights
from on_device import DEVICE, distance, make_runtime, no_waiting
from pictures import make_autoencoder, photo
from small_text_encoders import write_small_clip, write_whole_clip
from tiny_run import Case
from tiny_samples import SAMPLERS, new_generator
from torch import Tensor

from core.precision import allow_tf32
from data.captions import Captioned, Templates
from data.conditions import ClassLabels, rows_of
from data.encode import Workers
from data.encodings import EncodeImages
from data.images import CenterCrop, Preparation
from data.shards import MappedShards
from data.text_encoders import CLIPText
from evaluation.features.inception import InceptionFeatures
from evaluation.generate import Generator
from evaluation.metrics.clip_score import CLIPScore
from evaluation.metrics.kernel import KernelDistance
from evaluation.metrics.manifolds import PrecisionRecall
from evaluation.metrics.statistics import FeatureStatistics
from evaluation.reference.reference import Reference
from launch.command.app import _sentence
from model.autoencoder_kl import DiffusersAutoencoder
from runtime.accelerate import AccelerateRuntime

FLOAT32 = 1e-4  # relative, of the norm of a difference
FLOAT16 = 1e-3  # the same, of values that are rounded to it
CPU = torch.device("cpu")
LABELS = ClassLabels(10)


class Watched:
    """A denoiser; from its first call on, the host must not wait. Before it, the sampler's tables are copied."""

    def __init__(self, denoiser: Any) -> None:
        self._denoiser = denoiser
        self._watch = no_waiting()
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.calls == 0:
            self._watch.__enter__()
        self.calls += 1
        output: Tensor = self._denoiser(*inputs)
        return output

    def finish(self) -> None:
        self._watch.__exit__(None, None, None)


def generator_on(runtime: AccelerateRuntime, sampler: str) -> Generator:
    model = runtime.place(Case("x", "accelerate").model().eval().requires_grad_(False))
    return new_generator(sampler, model, runtime)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_i_is_the_cpus_in_a_batch_of_any_size(sampler: str) -> None:
    condition = LABELS.in_turn(12)
    expected, found = (generator_on(runtime, sampler) for runtime in (make_runtime(device="cpu"), make_runtime()))
    one = expected.images(np.arange(12), condition).astype(int)
    for first, last in ((0, 12), (3, 8)):
        other = found.images(np.arange(first, last), rows_of(condition, np.arange(first, last))).astype(int)
        assert np.abs(one[first:last] - other).max() <= 1  # a rounding boundary may be crossed, not more
        assert (one[first:last] != other).mean() < 0.01


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_step_of_a_sampler_makes_the_host_wait(sampler: str, precision: str) -> None:
    runtime = make_runtime(precision)
    generator = generator_on(runtime, sampler)
    generator.images(np.arange(4), LABELS.in_turn(4))  # libraries are loaded
    watched = Watched(generator.denoiser)
    try:
        with torch.no_grad():
            latents = replace(generator, denoiser=watched)._latents(np.arange(4), LABELS.in_turn(4))
    finally:
        watched.finish()
    assert latents.isfinite().all()
    assert watched.calls > 4


def new_way() -> None:
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "tf32"


ALLOWING: dict[str, Callable[[], None]] = {"old way": lambda: allow_tf32(True), "new way": new_way}


@pytest.fixture(params=ALLOWING)
def _tf32_elsewhere(request: pytest.FixtureRequest) -> Any:
    """Allow TF32, as a user or the runtime may."""
    ALLOWING[request.param]()
    yield
    backends: Any = torch.backends
    backends.cuda.matmul.fp32_precision = backends.cudnn.conv.fp32_precision = "ieee"
    allow_tf32(False)


@pytest.mark.usefixtures("_tf32_elsewhere")
def test_inception_features_are_the_cpus(tmp_path: Path) -> None:
    extractor = InceptionFeatures(str(random_weights(tmp_path)), sha256=PREFIX, batch_size=3)
    images = np.stack([photo(number, 64, 64) for number in range(5)])
    expected = extractor(images)
    extractor.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = extractor(images)
    for name in ("vectors", "spatial", "logits"):
        one, other = (torch.from_numpy(getattr(part, name)) for part in (found, expected))
        assert distance(one, other) < FLOAT32, name


@pytest.mark.usefixtures("_tf32_elsewhere")
def test_clip_scores_are_the_cpus(tmp_path: Path) -> None:
    scorer = CLIPScore(str(write_whole_clip(tmp_path)), batch_size=3).scorer
    images, captions = np.stack([photo(number, 64, 64) for number in range(5)]), ["a drawing", "", "of", "a", "a three"]
    expected = scorer(images, captions)
    scorer.to(DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        found = scorer(images, captions)
    assert distance(torch.from_numpy(found), torch.from_numpy(expected)) < FLOAT32


@pytest.mark.usefixtures("_tf32_elsewhere")
def test_an_autoencoder_in_float32_is_the_cpus(tmp_path: Path) -> None:
    folder = str(make_autoencoder(tmp_path))
    images = np.stack([photo(number, 32, 32) for number in range(3)])
    on_cpu, on_device = (
        EncodeImages(DiffusersAutoencoder("x", folder, 0.5), Preparation(32, CenterCrop()), True, device)
        for device in (CPU, DEVICE)
    )
    expected, found = on_cpu.moments(images), on_device.moments(images)
    assert found.device.type == DEVICE.type
    assert distance(found.cpu(), expected) < FLOAT32
    latents = expected[:, 0, :4]
    decoded = on_device._autoencoder.decode(latents.to(DEVICE)).cpu()
    assert distance(decoded, on_cpu._autoencoder.decode(latents)) < FLOAT32


@pytest.mark.usefixtures("_tf32_elsewhere")
def test_stored_embeddings_are_the_cpus_and_the_same_for_any_number_of_processes(tmp_path: Path) -> None:
    source = Captioned(PatternSource(), Templates(["{name}", "a drawing of the {name}"]))
    encoder = CLIPText(str(write_small_clip(tmp_path / "clip")))
    for name, device, world in (("cpu", CPU, 1), ("one", DEVICE, 1), ("two", DEVICE, 2)):
        for rank in reversed(range(world)):
            encode_pattern(tmp_path / name, source, text=encoder, embed_on=device, workers=Workers(rank, world))
    rows, chosen = np.arange(50), np.arange(50) % 2
    expected, found = (MappedShards(tmp_path / name).embeddings_of(rows, chosen) for name in ("cpu", "one"))
    assert distance(torch.from_numpy(found.tokens), torch.from_numpy(expected.tokens)) < FLOAT16
    assert distance(torch.from_numpy(found.pooled), torch.from_numpy(expected.pooled)) < FLOAT16
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.npz")} for name in ("one", "two"))
    assert one == two
    empty = "empty_caption.npz"
    assert one[empty] == (tmp_path / "cpu" / empty).read_bytes()  # which the CPU computes


@pytest.mark.usefixtures("_tf32_elsewhere")
def test_metrics_are_the_cpus() -> None:
    random = np.random.default_rng(0)
    real, samples = (random.normal(size=(count, 64)).astype(np.float32) for count in (300, 400))
    reference = Reference("r", "0", FeatureStatistics.of(real), None, num_vectors=300, load_vectors=lambda: real)
    for metric in (PrecisionRecall(block=128), KernelDistance(subsets=10, subset_size=100)):
        found, expected = (metric.compute(samples, reference, device) for device in (DEVICE, CPU))
        assert found == pytest.approx(expected, rel=FLOAT32, abs=1e-9)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="what is full is a GPU's memory")
def test_a_full_gpu_is_one_sentence() -> None:
    with pytest.raises(torch.OutOfMemoryError) as raised:
        torch.empty(2**45, dtype=torch.uint8, device=DEVICE)
    assert str(_sentence("sample", raised.value)).startswith("The GPU's memory is full (Tried to allocate 32768.00 GiB")


def test_a_users_first_commands(tmp_path: Path) -> None:
    """Encode, train with samples and evaluations, sample, evaluate with compiled blocks in bf16."""

    def ditscale(*words: str) -> str:
        return run_process(command(*words), tmp_path, expect=0)

    on_device = ["runtime=accelerate", f"runtime.device={DEVICE.type}"]
    small = ["evaluation.num_images=60", "evaluation.batch_size=25", "evaluation.features.epochs=1", "sampler.steps=4"]
    ditscale("encode", "data=digits", f"device={DEVICE.type}")
    often = ["sample_every=20", "evaluate_every=40", "precision=bf16", "skip_grad_norm=10", "max_grad_norm=1.0"]
    shown = ditscale("train", *TINY_RUN, *on_device, *small, *often, "runtime.compile=true", "run_dir=run")
    assert "step 40" in shown
    ditscale("sample", "checkpoint=run", *on_device, "num_images=20", "sampler.steps=4", "out=images")
    with np.load(tmp_path / "images.npz") as file:
        assert file["arr_0"].shape == (20, 8, 8, 1)
    guided = ["diffusion/guidance=classifier_free", "guidance.scale=1.5", "compile=true", "precision=bf16"]
    metrics = "metrics=[frechet,precision_recall,kernel,nll]"
    kernel = ["evaluation.metric.kernel.subset_size=50", "evaluation.metric.kernel.subsets=4"]
    ditscale("evaluate", "checkpoint=run", *on_device, *small, *guided, *kernel, metrics)
    records = json_lines(tmp_path / "run/evaluations.jsonl")
    assert [record["evaluated_by"] for record in records] == ["train", "evaluate"]
    assert records[1]["bits_per_dimension"] > 0
