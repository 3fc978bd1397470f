"""Compare the time of guided sampling with the released program's loop, at one precision and number of threads.

``python -m benchmarks.sample [--models s/2 b/4] [--precision bf16] [--steps 4] [--images 4]`` prints one JSON line per
model. The released program runs eager, ours eager and with compiled blocks, DDPM with classifier-free guidance on the
device, in turns, each in a process of its own; weights are random. The time of an image is proportional to the steps.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from benchmarks.commit import current_commit
from benchmarks.released import ReleasedDiT, ReleasedLoss
from benchmarks.train_step import SIZES, diffusion, new_model
from benchmarks.turns import Seconds, apart, cpu, medians_in_turns, seconds_of
from data.conditions import ClassLabels
from data.manifest import LatentSpec
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.respacing import kept_steps
from diffusion.samplers import DDPM
from evaluation.generate import Generator
from launch.evaluate import compile_units
from model.autoencoder import IdentityAutoencoder
from runtime.accelerate import AccelerateRuntime

SCALE = 1.5
SIDES = ("released", "eager", "compiled")


class Released:
    """The released program's sampling loop."""

    def __init__(self, model: str, precision: str, steps: int) -> None:
        size, patch_size = model.split("/")
        depth, width, num_heads = SIZES[size]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._network = ReleasedDiT(int(patch_size), width, depth, num_heads).to(self._device).eval()
        self._is_bf16 = precision == "bf16"
        self._tables = ReleasedLoss(kept_steps(1000, steps))

    @torch.no_grad()
    def images(self, count: int) -> np.ndarray:
        """Return latents [count, 4, 32, 32]."""
        labels = torch.arange(count, device=self._device)
        labels = torch.cat([labels, torch.full_like(labels, 1000)])
        x = torch.randn(count, 4, 32, 32, device=self._device)
        x = torch.cat([x, x])
        for step in reversed(range(self._tables.num_steps)):
            t = torch.full((len(x),), step, device=self._device)
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._is_bf16):
                half = x[:count]
                output = self._network(torch.cat([half, half]), self._tables.timestep(t), labels)
            noise, rest = output[:, :4], output[:, 4:]
            with_label, without = noise.chunk(2)
            guided = without + SCALE * (with_label - without)
            mean, log_variance = self._tables.reverse(torch.cat([guided, guided]), rest, x, t)
            x = mean + (t != 0).float().view(-1, 1, 1, 1) * torch.exp(0.5 * log_variance) * torch.randn_like(x)
        return x[:count].cpu().numpy()


def ours(model: str, precision: Any, steps: int, compiled: bool) -> Generator:
    """Return the project's generator of images with latents as they are."""
    runtime, labels = AccelerateRuntime(precision), ClassLabels(1000)
    network = runtime.place(new_model(model)).eval()
    if compiled:
        compile_units(network, runtime.device)
    spec = LatentSpec("random", 32, "identity", "1", 1.0, 1, 4, "float16", False, 1000)
    guided = ClassifierFreeGuidance(network, labels.null, 4, scale=SCALE)
    process = runtime.place(diffusion())
    return Generator(guided, process, IdentityAutoencoder(4), DDPM(steps), spec, labels, 0, runtime)


def clock(side: str, model: str, precision: str, steps: int, images: int) -> Callable[[], Seconds]:
    """Return what times one batch of images of a side."""
    if side == "released":
        released = Released(model, precision, steps)
        return lambda: seconds_of(lambda: released.images(images))
    generator, labels = ours(model, precision, steps, side == "compiled"), ClassLabels(1000).in_turn(images)
    return lambda: seconds_of(lambda: generator.images(np.arange(images), labels))


def measure(*arguments: Any) -> dict[str, Any]:
    """Time the released program and ours, eager and compiled, in turns, each in a process of its own."""
    with ExitStack() as running:
        clocks = {side: running.enter_context(apart(clock, side, *arguments)) for side in SIDES}
        found = medians_in_turns(clocks, repeats=5)
    seconds = {side: found[side] for side in SIDES}
    ratios = {
        f"{side}/released": [round(a / b, 4) for a, b in zip(seconds[side], seconds["released"], strict=True)]
        for side in SIDES[1:]
    }
    return {**seconds, **ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["s/2", "b/4"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    for model in arguments.models:
        seconds = measure(model, arguments.precision, arguments.steps, arguments.images)
        result = {
            "benchmark": "sample",
            "model": f"{model} at 256 px",
            "precision": arguments.precision,
            "steps": arguments.steps,
            "images": arguments.images,
            "sec_wall_and_cpu": seconds,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": current_commit(),
            **cpu(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
