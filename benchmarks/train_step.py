"""Compare images per second of a training step, eager and compiled, with the released program's step.

``python -m benchmarks.train_step [--models s/2 b/4] [--batch-size 256] [--precision bf16] [--variants ...]`` prints one
JSON line per model; the default is four sizes at patch size 2 on a GPU, S/2 and B/4 on a CPU. ``--batch-size 0`` takes
the largest power of two that fits a GPU. Images are 256 px. Peak memory is measured on a GPU only.

The variants, all at one precision and number of threads, are ``released`` (`benchmarks.released`: eager, TF32 on a GPU,
``torch.autocast`` for bf16, AdamW with its defaults, an average updated parameter by parameter, ``loss.item()`` each
step), and ours, through runtime, step and feed, between log steps: ``eager``, ``compiled`` (unit by unit) and ``whole``
(the network in one graph), each also as ``eager_bf16_residual`` and so on, with ``model.residual=bf16``, and on a GPU
also as ``graphed_eager`` and so on, whose steps are replayed as one CUDA graph. On a CPU the variants, each in a
process of its own, take turns and the medians are compared, since its speed drifts; the process's processor time is
given too, which other programs on the machine affect little, and which for ours includes the draws of random numbers.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.commit import current_commit
from benchmarks.released import ReleasedDiT, ReleasedLoss
from benchmarks.turns import apart
from core.batch import Batch, mapped
from core.draws import Philox, training_draws
from core.prefetch import prefetch
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.times import UniformSteps
from diffusion.variances import LearnedRangeVariance
from model.dit import DiT, DiTConfig, Residual
from model.flops import TRAINING_FACTOR, multiply_adds
from runtime.accelerate import AccelerateRuntime
from train.ema import constant
from train.step import make_step

SIZES = {"s": (12, 384, 6), "b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16)}
LATENT, CHANNELS, CLASSES = 32, 4, 1000
COMPILED = {"eager": False, "compiled": True, "whole": "whole"}  # variant -> runtime.compile
BF16_RESIDUAL, GRAPHED = "_bf16_residual", "graphed_"  # ending and beginning of a variant
RunStep = Callable[[], float]  # runs one step -> seconds that it waited for data


class Round(NamedTuple):
    """The timing of a round: wall and processor seconds per step, and the fraction of time spent waiting for data."""

    step_sec: float
    step_cpu_sec: float
    waiting: float


def new_model(model: str, residual: Residual = "fp32") -> DiT:
    size, patch_size = model.split("/")
    depth, width, num_heads = SIZES[size]
    network = DiT(DiTConfig(LATENT, CHANNELS, int(patch_size), width, depth, num_heads, CLASSES, residual=residual))
    for parameter in network.parameters():  # a fresh DiT has zeros, which processors multiply as fast as others
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.01)
    return network


def diffusion() -> GaussianDiffusion:
    return GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


def host_batches(batch_size: int) -> Iterator[Batch]:
    """Yield random latents with the draws of training: all of the host's work except reading files."""
    philox, shape, position = Philox(0), (CHANNELS, LATENT, LATENT), 0
    labels = torch.arange(batch_size) % CLASSES
    while True:
        positions = np.arange(position, position + batch_size)
        position += batch_size
        draws = training_draws(philox, positions, shape, UniformSteps(1000), 0.1, True)
        yield Batch(
            x_0=torch.from_numpy(draws.posterior),
            noise=torch.from_numpy(draws.noise),
            t=torch.from_numpy(draws.t),
            condition={"label": labels},
        )


def ours(model: str, batch_size: int, precision: Any, compiled: Any, residual: Residual, graphed: bool) -> RunStep:
    """Return the project's step under its runtime, between log steps."""
    runtime = AccelerateRuntime(precision, compile=compiled, cuda_graph=graphed)
    network, process = new_model(model, residual), runtime.place(diffusion())
    ema = constant(network)
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.0, foreach=True)
    stepping, optimizer = runtime.prepare(network, [ema.module], optimizer)
    step = runtime.step(make_step(stepping, optimizer, ema, process, runtime))
    batches = runtime.feed(prefetch(host_batches(batch_size)))

    def run() -> float:
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        step(batch, at_log_step=False)
        return waited

    return run


def released(model: str, batch_size: int, precision: str) -> RunStep:
    """Return the step of the released program, with its structure. Its data is already on the device."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")
    size, patch_size = model.split("/")
    depth, width, num_heads = SIZES[size]
    network, average = (ReleasedDiT(int(patch_size), width, depth, num_heads).to(device) for _ in range(2))
    average.requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0)
    loss_of = ReleasedLoss()
    batch = mapped(next(host_batches(batch_size)), lambda value: value.to(device))

    def run() -> float:
        t = torch.randint(0, 1000, (batch_size,), device=device)
        noise = torch.randn_like(batch.x_0)
        x_t = loss_of.noised(batch.x_0, t, noise)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = network(x_t, t, batch.condition["label"])
        loss = loss_of(output, batch.x_0, x_t, t, noise).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            weights = dict(network.named_parameters())
            for name, old in average.named_parameters():
                old.mul_(0.9999).add_(weights[name].data, alpha=1 - 0.9999)
        loss.item()
        return 0.0

    return run


def make(variant: str, model: str, batch_size: int, precision: str) -> RunStep:
    if variant == "released":
        return released(model, batch_size, precision)
    residual: Residual = "bf16" if variant.endswith(BF16_RESIDUAL) else "fp32"
    compiled = COMPILED[variant.removesuffix(BF16_RESIDUAL).removeprefix(GRAPHED)]
    return ours(model, batch_size, precision, compiled, residual, variant.startswith(GRAPHED))


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(run: RunStep, steps: int) -> Round:
    """Time some steps, until the device has finished."""
    wait_for_device()
    started, cpu_started = time.perf_counter(), time.process_time()
    waited = sum(run() for _ in range(steps))
    wait_for_device()
    elapsed, cpu_elapsed = time.perf_counter() - started, time.process_time() - cpu_started
    return Round(elapsed / steps, cpu_elapsed / steps, waited / elapsed)


def peak_flops() -> float:
    """Return true FLOPs per second of a bf16 matrix product, the best of several, as the base of utilization."""
    device, side = ("cuda", 8192) if torch.cuda.is_available() else ("cpu", 1024)
    one, other = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product() -> float:
        torch.mm(one, other)
        return 0.0

    timed(product, 3)
    return 2 * side**3 / min(timed(product, 10).step_sec for _ in range(5))


def largest_batch(variant: str, model: str, precision: str) -> int:
    """Return the largest power of two at which a step of this variant fits the GPU."""
    for batch_size in (2048, 1024, 512, 256, 128, 64, 32, 16, 8):
        try:
            timed(make(variant, model, batch_size, precision), 2)
            return batch_size
        except torch.cuda.OutOfMemoryError:
            continue
        finally:
            free()
    raise SystemExit(f"{model} does not fit this GPU even with 8 images")


def free() -> None:
    """Free the memory of the last variant."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(arguments: argparse.Namespace, model: str, peak: float) -> dict[str, Any]:
    """Measure every variant of a model, with ratios to the released step."""
    found = (on_gpu if torch.cuda.is_available() else taking_turns)(arguments, model)
    work = 2 * TRAINING_FACTOR * multiply_adds(new_model(model))  # FLOPs per image
    for values in found.values():
        values["utilization_of_bf16_peak"] = round(values["images_per_sec"] * work / peak, 4)
        if "released" in found:
            for time_of in ("step_sec", "step_cpu_sec"):
                values[f"{time_of}_over_released"] = round(values[time_of] / found["released"][time_of], 3)
    return found


def on_gpu(arguments: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """Measure one variant after the other, each with the whole memory."""
    found = {}
    for variant in arguments.variants:
        batch_size = arguments.batch_size or largest_batch(variant, model, arguments.precision)
        free()
        try:
            run = make(variant, model, batch_size, arguments.precision)
            timed(run, arguments.warm_up)
            rounds = [timed(run, arguments.steps) for _ in range(arguments.rounds)]
        except torch.cuda.OutOfMemoryError:
            print(f"{model} ({variant}) does not fit this GPU with {batch_size} images.")
            continue
        finally:
            run = None  # frees its memory
            peak_gb = torch.cuda.max_memory_allocated() / 1e9
            free()
        found[variant] = {**summary(rounds, batch_size), "peak_memory_gb": round(peak_gb, 2)}
        print(f"{model} {variant} {json.dumps(found[variant])}", file=sys.stderr, flush=True)  # a lent GPU may be gone
    return found


def clock(variant: str, model: str, batch_size: int, precision: str, steps: int, warm_up: int) -> Callable[[], Round]:
    """Return what times some steps of a variant that has warmed up."""
    run = make(variant, model, batch_size, precision)
    timed(run, warm_up)
    return lambda: timed(run, steps)


def taking_turns(arguments: argparse.Namespace, model: str) -> dict[str, dict[str, Any]]:
    """Measure with all variants in memory, each in a process of its own, a few steps of each in turn."""
    batch_size = arguments.batch_size or 8
    of_all = (model, batch_size, arguments.precision, arguments.steps, arguments.warm_up)
    with ExitStack() as running:
        clocks = {variant: running.enter_context(apart(clock, variant, *of_all)) for variant in arguments.variants}
        rounds: dict[str, list[Round]] = {variant: [] for variant in clocks}
        for _ in range(arguments.rounds):
            for variant, of_variant in clocks.items():
                rounds[variant].append(of_variant())
    return {variant: summary(times, batch_size) for variant, times in rounds.items()}


def summary(rounds: list[Round], batch_size: int) -> dict[str, Any]:
    seconds = [one.step_sec for one in rounds]
    return {
        "batch_size": batch_size,
        "images_per_sec": round(batch_size / statistics.median(seconds), 3),
        "step_sec": round(statistics.median(seconds), 4),
        "step_sec_range": [round(min(seconds), 4), round(max(seconds), 4)],
        "step_cpu_sec": round(statistics.median(one.step_cpu_sec for one in rounds), 4),
        "waiting_for_data": round(statistics.median(one.waiting for one in rounds), 4),
    }


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [f"{size}/2" for size in SIZES] if has_gpu else ["s/2", "b/4"]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--batch-size", type=int, default=0, help="0: the largest that fits a GPU, 8 on a CPU")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16", help="precision of all variants")
    parser.add_argument("--variants", nargs="+", default=["released", "eager", "compiled"])
    parser.add_argument("--steps", type=int, default=20 if has_gpu else 1, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=5 if has_gpu else 1, help="warm-up steps")
    arguments = parser.parse_args()
    if not has_gpu:
        print("There is no GPU: these are numbers of a CPU, and say nothing about the targets for GPUs.")
    for model in arguments.models:
        peak = peak_flops()
        result = {
            "benchmark": "train_step",
            "model": f"{model} at 256 px",
            "precision": arguments.precision,
            "device": torch.cuda.get_device_name() if has_gpu else "CPU",
            "bf16_peak_tflops": round(peak / 1e12, 4),
            "variants": measure(arguments, model, peak),
            "threads": torch.get_num_threads(),
            "processors": os.cpu_count(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": current_commit(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
