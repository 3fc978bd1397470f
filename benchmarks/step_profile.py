"""Measure where the time of a training step on a GPU goes, kernel by kernel.

``python -m benchmarks.step_profile [--models xl/2] [--batch-size 256] [--variants compiled]`` prints one JSON line per
model and variant of `benchmarks.train_step`: milliseconds of a step by kind of kernel and of the longest kernels.
``step_ms``, measured without the profiler, less ``busy_ms`` is the time in which the GPU computes nothing.
"""

import argparse
import json
import platform
import re
from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.commit import current_commit
from benchmarks.train_step import RunStep, free, make, timed

# kind: what the kernel's name contains; the first that fits counts
KINDS = {
    "attention": r"sdpa|flash|fmha|attention|cudnn",
    "products": r"gemm|nvjet|cutlass_\d|wgmma|cublas",
    "compiled": r"^triton_",
    "optimizer": r"multi_tensor|FusedAdam|fused_adam",
    "copies": r"Memcpy|Memset|copy_kernel|CatArray",
    "norms": r"layer_norm|LayerNorm|GammaBeta",
    "sums": r"reduce_kernel",
    "by element": r"elementwise|softmax",
}


def kind_of(kernel: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel)), "other")


def kernels_of(run: RunStep, steps: int) -> dict[str, tuple[int, float]]:
    """Return launches and milliseconds per step of each kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        timed(run, steps)
    events: dict[str, tuple[int, float]] = {}
    for event in found.key_averages():
        if event.self_device_time_total > 0:
            events[event.key] = (event.count // steps, event.self_device_time_total / 1e3 / steps)
    return events


def measure(model: str, variant: str, arguments: argparse.Namespace) -> dict[str, Any]:
    run = make(variant, model, arguments.batch_size, arguments.precision)
    timed(run, 5)
    rounds = [timed(run, arguments.steps) for _ in range(3)]
    fastest = min(rounds, key=lambda one: one.step_sec)
    kernels = kernels_of(run, arguments.steps)
    by_kind: dict[str, float] = defaultdict(float)
    for name, (_, milliseconds) in kernels.items():
        by_kind[kind_of(name)] += milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][1])[: arguments.longest]
    busy = sum(by_kind.values())
    return {
        "step_ms": round(1e3 * fastest.step_sec, 2),
        "waiting_for_data": round(fastest.waiting, 3),
        "busy_ms": round(busy, 2),
        "launches": sum(launches for launches, _ in kernels.values()),
        "kinds_ms": {kind: round(value, 2) for kind, value in sorted(by_kind.items(), key=lambda item: -item[1])},
        "longest": [[name[:110], launches, round(value, 2)] for name, (launches, value) in longest],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["xl/2"])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--variants", nargs="+", default=["compiled"])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--longest", type=int, default=20, help="kernels that are named")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU, whose kernels this measures.")
    for model in arguments.models:
        for variant in arguments.variants:
            result = {
                "benchmark": "step_profile",
                "model": f"{model} at 256 px",
                "variant": variant,
                "batch_size": arguments.batch_size,
                "precision": arguments.precision,
                "device": torch.cuda.get_device_name(),
                **measure(model, variant, arguments),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "commit": current_commit(),
            }
            print(json.dumps(result), flush=True)
            free()


if __name__ == "__main__":
    main()
