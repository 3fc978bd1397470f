"""Compare PyTorch's attention kernels on a GPU, forward and backward, at the head sizes of S to XL.

``python -m benchmarks.attention [--images 256]`` prints one JSON line per shape, in bf16, with seconds of each kernel
(the median of several rounds, by CUDA events) and the distance of its output from float64's. ``default`` is the kernel
that PyTorch chooses itself; ``cudnn_padded`` pads heads to a multiple of 64, whose zeros change no result.
"""

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from benchmarks.commit import current_commit

# name: tokens, heads, size of a head
SHAPES = {
    "s/2": (256, 6, 64),
    "b/2": (256, 12, 64),
    "l/2": (256, 16, 64),
    "xl/2": (256, 16, 72),
    "xl/2 at 512 px": (1024, 16, 72),
}
BACKENDS: dict[str, list[SDPBackend]] = {
    "default": [],
    "flash": [SDPBackend.FLASH_ATTENTION],
    "efficient": [SDPBackend.EFFICIENT_ATTENTION],
    "cudnn": [SDPBackend.CUDNN_ATTENTION],
    "cudnn_padded": [SDPBackend.CUDNN_ATTENTION],
}


def attend(query: Tensor, key: Tensor, value: Tensor, to_size: int) -> Tensor:
    size = query.shape[-1]
    parts = [pad(part, (0, to_size - size)) if to_size > size else part for part in (query, key, value)]
    return scaled_dot_product_attention(*parts, scale=size**-0.5)[..., :size]


def seconds(run: Callable[[], object], calls: int = 10, rounds: int = 5) -> float:
    """Return the seconds of a call on the GPU."""
    for _ in range(3):
        run()
    found = []
    for _ in range(rounds):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        for _ in range(calls):
            run()
        ended.record()
        torch.cuda.synchronize()
        found.append(started.elapsed_time(ended) / 1000 / calls)
    return statistics.median(found)


def measure(images: int, tokens: int, heads: int, size: int) -> dict[str, Any]:
    # As a block makes them: one projection [B, T, 3, heads, d / heads], whose parts are views.
    qkv = torch.randn(images, tokens, 3, heads, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(images, heads, tokens, size, device="cuda", dtype=torch.bfloat16)
    few = qkv.detach()[:2].double().permute(2, 0, 3, 1, 4)
    exact = scaled_dot_product_attention(*few)
    found = {}
    for name, backends in BACKENDS.items():
        to_size = -(-size // 64) * 64 if name.endswith("padded") else size
        only: AbstractContextManager[Any] = sdpa_kernel(backends) if backends else nullcontext()

        def forward(to_size: int = to_size) -> Tensor:
            return attend(*qkv.permute(2, 0, 3, 1, 4).unbind(0), to_size)

        try:
            with only:
                distance = ((forward()[:2].double() - exact).norm() / exact.norm()).item()
                alone = seconds(lambda: forward().detach())
                both = seconds(lambda: forward().backward(gradient))
        except RuntimeError as error:  # a kernel that this shape or GPU does not have
            found[name] = {"error": str(error).split("\n")[0][:100]}
            continue
        found[name] = {"forward_ms": round(1e3 * alone, 3), "both_ms": round(1e3 * both, 3), "distance": distance}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU, whose kernels this compares.")
    for model, shape in SHAPES.items():
        images = arguments.images * 256 // shape[0]
        result = {
            "benchmark": "attention",
            "shape": dict(zip(("tokens", "heads", "head_size"), shape, strict=True)),
            "model": model,
            "images": images,
            "device": torch.cuda.get_device_name(),
            "kernels": measure(images, *shape),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": current_commit(),
        }
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
