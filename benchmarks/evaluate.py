"""Measure the speed of sampling and of metrics, each against a plain eager loop in the same process.

``python -m benchmarks.evaluate [frechet] [inception] [sampling] [sampling_small] [manifold]`` prints one JSON line for
each. Weights are random: speed does not depend on them. Both networks run at the best of several batch sizes.
``sampling`` is XL/2 in bf16, compiled (on a CPU with few images and steps: about 5 minutes), ``sampling_small`` S/8 in
float32, eager. On a CPU seconds are CPU-seconds, which other work on the machine affects less, and each line says that
the targets for a GPU (at least twice the plain loop, metrics under 5% of generation) were not measured.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.commit import current_commit
from benchmarks.turns import Seconds, cpu, in_turns
from core.precision import allow_tf32
from data.conditions import ClassLabels
from data.manifest import LatentSpec
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.process import GaussianDiffusion
from diffusion.respacing import kept_steps
from diffusion.samplers import DDPM
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from evaluation.features.extractor import Features
from evaluation.features.inception import InceptionFeatures
from evaluation.features.inception_network import Inception2015
from evaluation.generate import Generator
from evaluation.metrics.manifolds import PrecisionRecall
from evaluation.metrics.statistics import FeatureStatistics, Gaussian, frechet_distance
from evaluation.reference.reference import Reference
from model.autoencoder import IdentityAutoencoder
from model.dit import DiT, DiTConfig
from runtime.accelerate import AccelerateRuntime

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
clock = time.perf_counter if ON_GPU else time.process_time


def seconds_of(work: Callable[[], Any], repeats: int = 3) -> float:
    """Return the seconds of the fastest repeat, after one warm-up."""
    found = []
    for _ in range(repeats + 1):
        if ON_GPU:
            torch.cuda.synchronize()
        started = clock()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        found.append(clock() - started)
    return min(found[1:])


def frechet() -> dict[str, Any]:
    """Measure CPU-seconds and error of the Frechet distance in 2048 dimensions.

    The error is against the closed form for commuting covariances.
    """
    size = 2048
    spectrum = 10.0 / np.arange(1, size + 1)
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(size, size)))
    reference = Gaussian(np.zeros(size), (basis * spectrum) @ basis.T)
    started = time.process_time()
    _ = reference.root
    result: dict[str, Any] = {"root_cpu_sec": round(time.process_time() - started, 2)}
    for name, rank in (("full_rank", size), ("rank_1000", 1000)):
        other = np.where(np.arange(size) < rank, 1.5 * spectrum, 0)
        samples = Gaussian(np.full(size, 0.01), (basis * other) @ basis.T, count=rank + 1)
        expected = size * 0.01**2 + ((np.sqrt(spectrum) - np.sqrt(other)) ** 2).sum()
        started = time.process_time()
        error = abs(frechet_distance(reference, samples) - expected)
        result |= {f"{name}_cpu_sec": round(time.process_time() - started, 2), f"{name}_error": error}
    return result


def inception() -> dict[str, Any]:
    """Measure images per second of the extractor, and of a loop over single images, at 256 px.

    On a CPU, our network and torch-fidelity's run in turns on the same batch, to the same bits.
    """
    extractor = _random_inception()
    count = 2000 if ON_GPU else 8
    images = np.random.default_rng(0).integers(0, 256, (count, 256, 256, 3), dtype=np.uint8)

    def in_batches(size: int) -> list[Features]:
        return [extractor(images[start : start + size]) for start in range(0, count, size)]

    batched = {size: seconds_of(lambda size=size: in_batches(size)) for size in ([50, 100, 200] if ON_GPU else [2, 4])}
    best = min(batched, key=lambda size: batched[size])
    single = seconds_of(lambda: in_batches(1))
    features = extractor(images)
    summed = seconds_of(lambda: _sums(features))
    return {
        "images_per_sec": round(count / batched[best], 2),
        "batch_size": best,
        "one_by_one_images_per_sec": round(count / single, 2),
        "ratio": round(single / batched[best], 2),
        "statistics_of_extraction": round(summed / batched[best], 4),
        **({} if ON_GPU else {"seconds_of_4_images": _beside_torch_fidelity(images[:4])}),
    }


@torch.no_grad()
def _beside_torch_fidelity(images: np.ndarray) -> dict[str, Seconds]:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    ours = Inception2015().eval()
    with tempfile.TemporaryDirectory() as folder:
        torch.save(ours.state_dict(), Path(folder) / "random.pth")
        weights = str(Path(folder) / "random.pth")
        theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=weights)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    assert torch.equal(ours(pixels).pool, theirs(pixels)[0])
    return in_turns({"ours": lambda: ours(pixels), "torch_fidelity": lambda: theirs(pixels)}, repeats=5)


def _random_inception() -> InceptionFeatures:
    with tempfile.TemporaryDirectory() as folder:
        torch.save(Inception2015().state_dict(), Path(folder) / "random.pth")
        extractor = InceptionFeatures(str(Path(folder) / "random.pth"), sha256="", batch_size=200)
    extractor.to(DEVICE)
    return extractor


def _sums(features: Features) -> None:
    assert features.spatial is not None
    FeatureStatistics.of(features.vectors)
    FeatureStatistics.of(features.spatial)


@dataclass(frozen=True)
class Sampled:
    """The settings of a sampling benchmark; the time of an image is proportional to the steps."""

    model: str
    depth: int
    width: int
    num_heads: int
    patch_size: int
    precision: str
    is_compiled: bool
    steps: int
    plain_batch: int
    batches: tuple[int, ...]


def sampling() -> dict[str, Any]:
    """Measure XL/2 as one would sample it on a GPU."""
    if ON_GPU:
        return _sampled(Sampled("XL/2", 28, 1152, 16, 2, "bf16", True, 10, 16, (32, 64, 128, 256)))
    return _sampled(Sampled("XL/2", 28, 1152, 16, 2, "bf16", True, 2, 2, (2, 4)))


def sampling_small() -> dict[str, Any]:
    """Measure the speed-up without a lower precision or a compiler."""
    return _sampled(Sampled("S/8", 12, 384, 6, 8, "fp32", False, 10, 4, (4, 8)))


def _sampled(of: Sampled) -> dict[str, Any]:
    """Compare guided images per second with a plain loop: eager, two passes a step, float32 (TF32 on a GPU)."""
    if ON_GPU:
        allow_tf32(True)
    model = DiT(
        DiTConfig(
            latent_size=32,
            channels=4,
            patch_size=of.patch_size,
            width=of.width,
            depth=of.depth,
            num_heads=of.num_heads,
            num_classes=1000,
        )
    )
    model.initialize(0)
    model.to(DEVICE).eval().requires_grad_(False)
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance()).to(DEVICE)
    repeats = 3 if ON_GPU or of.model == "S/8" else 1
    plain = of.plain_batch / seconds_of(lambda: _plain_loop(model, process, of), repeats)
    if of.is_compiled:
        for block in model.block_list:
            block.compile()
    ours = {size: size / _seconds_of_ours(model, process, of, size, repeats) for size in of.batches}
    best = max(ours, key=lambda size: ours[size])
    extractor = _random_inception()
    images = np.zeros((best, 256, 256, 3), np.uint8)
    measuring = seconds_of(lambda: _sums(extractor(images))) / best
    sampled_250 = 250 / of.steps / ours[best]
    return {
        "model": of.model,
        "steps": of.steps,
        "precision": f"{of.precision}, {'compiled' if of.is_compiled else 'eager'}",
        "images_per_sec": round(ours[best], 4),
        "batch_size": best,
        "plain_images_per_sec": round(plain, 4),
        "ratio": round(ours[best] / plain, 2),
        "metrics_of_sampling_250_steps": round(measuring / sampled_250, 4),
    }


@torch.no_grad()
def _plain_loop(model: DiT, process: GaussianDiffusion, of: Sampled) -> np.ndarray:
    respaced = process.respace(kept_steps(process.num_steps, of.steps))
    label = torch.arange(of.plain_batch, device=DEVICE)
    null = torch.full_like(label, 1000)
    x = torch.randn(of.plain_batch, 4, 32, 32).to(DEVICE)
    for step in reversed(range(of.steps)):
        t = torch.full_like(label, step)
        with_label, without = (model(x, respaced.timesteps[t], {"label": given}) for given in (label, null))
        guided = without[:, :4] + 1.5 * (with_label[:, :4] - without[:, :4])
        output = torch.cat([guided, with_label[:, 4:]], dim=1)
        reverse = respaced.p_reverse(respaced.prediction(output, x, t), x, t)
        x = reverse.mean + torch.exp(0.5 * reverse.log_variance) * torch.randn(x.shape).to(DEVICE)
    return x.cpu().numpy()


def _seconds_of_ours(model: DiT, process: GaussianDiffusion, of: Sampled, batch: int, repeats: int) -> float:
    torch._dynamo.reset()  # a second size would be compiled with dynamic shapes, which is slower
    return seconds_of(lambda: _ours(model, process, of, batch), repeats)


def _ours(model: DiT, process: GaussianDiffusion, of: Sampled, batch: int) -> np.ndarray:
    runtime, labels = AccelerateRuntime(of.precision), ClassLabels(1000)
    spec = LatentSpec("random", 32, "identity", "1", 1.0, 1, 4, "float16", False, 1000)
    guided = ClassifierFreeGuidance(model, labels.null, 4, scale=1.5)
    generator = Generator(guided, process, IdentityAutoencoder(4), DDPM(of.steps), spec, labels, 0, runtime)
    return generator.images(np.arange(batch), labels.in_turn(batch))


def manifold() -> dict[str, Any]:
    """Time precision and recall on 50,000 and 10,000 vectors of 2048 numbers; on a CPU a tenth of both."""
    num_samples, num_real = (50_000, 10_000) if ON_GPU else (5_000, 1_000)
    random = np.random.default_rng(0)
    samples, real = (random.normal(size=(count, 2048)).astype(np.float32) for count in (num_samples, num_real))
    reference = Reference(
        "random", "0", FeatureStatistics.of(real[:2]), None, num_vectors=num_real, load_vectors=lambda: real
    )
    started = clock()
    PrecisionRecall().compute(samples, reference, DEVICE)
    return {"samples": num_samples, "real": num_real, "sec": round(clock() - started, 1)}


def machine() -> dict[str, Any]:
    """Return the facts on hardware and versions that the results depend on."""
    return {
        "device": torch.cuda.get_device_name() if ON_GPU else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "commit": current_commit(),
        **cpu(),
        **({} if ON_GPU else {"seconds": "CPU-seconds", "gpu_targets": "not measured: no GPU"}),
    }


def main() -> None:
    parts = {part.__name__: part for part in (frechet, inception, sampling, sampling_small, manifold)}
    for name in sys.argv[1:] or parts:
        print(json.dumps({"benchmark": f"evaluate/{name}", **parts[name](), **machine()}), flush=True)


if __name__ == "__main__":
    main()
