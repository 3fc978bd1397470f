"""Compare eager and compiled calls of the small DiTs of ``experiment=fashion/scaling``, as evaluations call them.

``python -m benchmarks.small_networks [--models 96/3/2 64/2/2] [--images 20]`` prints a JSON line per model, whose name
is its width, depth and patch size. The variants are ``eager``; ``units``, compiled block by block as they are written;
and ``where_possible``, what ``runtime.compile=where_possible`` makes of a network on a CPU: one graph of layers in the
forms that compile best (`model/compiled.py`). They take turns, each in a process of its own, in float32 on one thread.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack

import torch

from benchmarks.commit import current_commit
from benchmarks.turns import Seconds, apart, cpu, medians_in_turns, seconds_of
from model.dit import DiT, DiTConfig
from model.network import compile_each_unit
from runtime.accelerate import AccelerateRuntime
from runtime.kernels import compile_network

VARIANTS = ("eager", "units", "where_possible")
HEAD_WIDTH, CLASSES, CALLS = 32, 10, 10


def clock(variant: str, model: str, images: int) -> Callable[[], Seconds]:
    """Return what times `CALLS` calls of a variant's network, which gives seconds per 1,000 images and steps."""
    runtime = AccelerateRuntime("fp32", device="cpu", num_threads=1)
    width, depth, patch_size = map(int, model.split("/"))
    network = DiT(DiTConfig(28, 1, patch_size, width, depth, width // HEAD_WIDTH, CLASSES))
    for parameter in network.parameters():  # a fresh DiT has zeros; GELU takes longer for large numbers
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.02)
    network = runtime.place(network).eval().requires_grad_(False)
    if variant == "units":
        compile_each_unit(network)
    if variant == "where_possible":
        compile_network(network, "cpu", whole=True)
    x_t, t, labels = torch.randn(images, 1, 28, 28), torch.full((images,), 500), torch.arange(images) % CLASSES

    @torch.no_grad()
    def calls() -> None:
        for _ in range(CALLS):
            network(x_t, t, {"label": labels})

    return lambda: [seconds * 1000 / (CALLS * images) for seconds in seconds_of(calls)]


def measure(model: str, images: int) -> dict[str, Seconds]:
    """Time the variants of a model in turns, each in a process of its own."""
    with ExitStack() as running:
        clocks = {variant: running.enter_context(apart(clock, variant, model, images)) for variant in VARIANTS}
        return medians_in_turns(clocks, repeats=15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [f"{width}/{depth}/{patch}" for patch in (2, 4, 7) for width in (96, 64) for depth in (3, 2)]
    parser.add_argument("--models", nargs="+", default=models)
    parser.add_argument("--images", type=int, default=20)
    arguments = parser.parse_args()
    for model in arguments.models:
        result = {
            "benchmark": "small_networks",
            "model": model,
            "images": arguments.images,
            "sec_wall_and_cpu_per_1000_image_steps": measure(model, arguments.images),
            "torch": torch.__version__,
            "commit": current_commit(),
            **cpu(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
