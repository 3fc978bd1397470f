"""Measure what one pass over the weights, AdamW's state and the average would save beside two passes.

``python -m benchmarks.one_pass [--model s/2]`` prints one JSON line. ``two_passes`` is what a step does: a fused
AdamW, and then the average. ``one_pass`` is an upper bound of what one kernel could save: a compiled function over all
weights as one flat tensor, so that nothing is lost between tensors. On a GPU seconds are of the wall, with the device
idle at the end.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.commit import current_commit
from benchmarks.train_step import new_model, wait_for_device
from benchmarks.turns import cpu, in_turns

LR, BETA_1, BETA_2, EPSILON, DECAY = 1e-4, 0.9, 0.999, 1e-8, 0.9999


def two_passes(model: str, device: str) -> Callable[[], None]:
    """Return a step of the fused optimizer, and of the average."""
    network, average = (new_model(model).to(device) for _ in range(2))
    weights = list(network.parameters())
    averages = [value.detach() for value in average.parameters()]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(BETA_1, BETA_2), eps=EPSILON, weight_decay=0.0, fused=True)

    def run() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, [weight.detach() for weight in weights], 1 - DECAY)
        wait_for_device()

    return run


def one_pass(model: str, device: str) -> Callable[[], None]:
    """Return the same arithmetic over flat tensors, compiled as one kernel."""
    size = sum(weight.numel() for weight in new_model(model).parameters())
    weight, gradient, first, average = (torch.randn(size, device=device) for _ in range(4))
    second = torch.rand(size, device=device)
    step = torch.zeros((), device=device)

    @torch.compile
    def update(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, average: Tensor, step: Tensor) -> None:
        step.add_(1)
        first.lerp_(gradient, 1 - BETA_1)
        second.lerp_(gradient * gradient, 1 - BETA_2)
        root = (second / (1 - BETA_2**step)).sqrt() + EPSILON
        weight.sub_(LR * (first / (1 - BETA_1**step)) / root)
        average.lerp_(weight, 1 - DECAY)

    def run() -> None:
        update(weight, gradient, first, second, average, step)
        wait_for_device()

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="s/2")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    works = {"two_passes": two_passes(arguments.model, device), "one_pass": one_pass(arguments.model, device)}
    result: dict[str, Any] = {
        "benchmark": "one_pass",
        "model": arguments.model,
        "sec_wall_and_cpu": in_turns(works),
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": current_commit(),
        **cpu(),
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
