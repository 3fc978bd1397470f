"""Count the bytes and multiply-adds of a training step without a GPU, and estimate its time on one.

``python -m benchmarks.step_bytes [--models xl/2] [--batch-sizes 256 32]`` prints one JSON line per model. Counted in
bf16 under autocast are the bytes that operators read and write: one by one (``eager``), with each block as PyTorch's
compiler fuses it (``units_compiled``), and with the whole network in one graph (``network_compiled``); each also with
``model.residual=bf16`` (``..._bf16_residual``). The compiler's count is that for this machine's processor, where it
fuses less than for a GPU. Bytes are linear in batch and depth, so small networks and one or two images give those of
the whole. Optimizer, average and norms are counted per parameter.

The estimate for an H100 SXM (its data sheet: 3.35 TB/s, 989 TFLOPS dense bf16) is the time of all matrix products and
attention at the peak, and of all other bytes at the memory's bandwidth. It is a lower bound, and compares variants.
"""

import argparse
import json
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.commit import current_commit
from benchmarks.train_step import BF16_RESIDUAL, CHANNELS, CLASSES, LATENT, SIZES
from model.dit import DiT, DiTConfig, Residual
from model.flops import TRAINING_FACTOR, multiply_adds

H100_BYTES_PER_SEC, H100_FLOPS = 3.35e12, 989e12
IMAGES, DEPTHS = (1, 2), (1, 2)  # of what is counted


PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")  # operators whose time is their multiply-adds


class OperatorBytes(TorchDispatchMode):
    """Sums the bytes of tensors that operators read and write: of matrix products, and of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.products = self.rest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "detach", "_local_scalar", "zeros", "new_empty")):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, found)) if isinstance(leaf, Tensor)]
            if found is None:  # it writes into arguments and returns nothing
                given = zip(func._schema.arguments, args, strict=False)
                written = [value for argument, value in given if argument.alias_info and argument.alias_info.is_write]
                tensors += tree_leaves(written)
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            if name in PRODUCTS or "attention" in name:
                self.products += size
            else:
                self.rest += size
        return found


def network(size: str, patch_size: int, depth: int, residual: Residual = "fp32") -> DiT:
    _, width, num_heads = SIZES[size]
    return DiT(DiTConfig(LATENT, CHANNELS, patch_size, width, depth, num_heads, CLASSES, residual=residual))


def passes(model: nn.Module, images: int) -> None:
    """Run forward and backward pass in bf16."""
    x = torch.randn(images, CHANNELS, LATENT, LATENT)
    condition = {"label": torch.zeros(images, dtype=torch.int64)}
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x, torch.zeros(images, dtype=torch.int64), condition)
    output.float().square().mean().backward()


def eager_bytes(model: DiT, images: int) -> tuple[int, int]:
    """Return the bytes of matrix products and those of the rest."""
    with OperatorBytes() as counted:
        passes(model, images)
    return counted.products, counted.rest


def compiled_bytes(model: DiT, images: int, whole: bool) -> int:
    """Return all bytes of what is compiled, by the compiler's own count; equal units are compiled once."""
    torch._dynamo.reset()
    metrics.reset()
    for part in [model] if whole else model.units():
        part.compile()
    passes(model, images)
    return int(metrics.num_bytes_accessed)


def of_whole(one: float, two: float, count: int) -> float:
    """Return the value at ``count`` of a linear function with these values at 1 and 2."""
    return one + (count - 1) * (two - one)


def of_variants(size: str, patch_size: int, images: int) -> dict[str, float]:
    """Return the bytes of everything but matrix products in forward and backward pass, by variant."""
    bf16 = of_residual(size, patch_size, images, "bf16")
    return of_residual(size, patch_size, images, "fp32") | {name + BF16_RESIDUAL: count for name, count in bf16.items()}


def of_residual(size: str, patch_size: int, images: int, residual: Residual) -> dict[str, float]:
    """Return the same of the variants with one kind of residual stream."""
    depth = SIZES[size][0]
    eager = [eager_bytes(network(size, patch_size, d, residual), images) for d in DEPTHS]
    products, rest = (of_whole(*pair, depth) for pair in zip(*eager, strict=True))
    (product_1, rest_1), (product_2, rest_2) = eager
    outside = 2 * rest_1 - rest_2  # of the eager rest, what is in no block
    unit = compiled_bytes(network(size, patch_size, 1, residual), images, whole=False)
    wholes = [compiled_bytes(network(size, patch_size, d, residual), images, whole=True) for d in DEPTHS]
    whole = of_whole(*wholes, depth)
    return {
        "eager": rest,
        "units_compiled": outside + depth * (unit - (product_2 - product_1)),
        "network_compiled": whole - products,
    }


def per_parameter() -> dict[str, float]:
    """Return the bytes per parameter of what a step does with the weights, eager."""
    weight = nn.Parameter(torch.ones(1024, 1024))
    weight.grad = torch.ones_like(weight)
    average = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight], fused=True)
    optimizer.step()  # makes its state
    works: dict[str, Callable[[], Any]] = {
        "adamw": optimizer.step,
        "average": lambda: average.lerp_(weight.detach(), 0.1),
        "norms_of_gradient_and_weights": lambda: [torch.linalg.vector_norm(of) for of in (weight.grad, weight)],
        "norm_of_update_at_log_steps": lambda: torch.linalg.vector_norm(weight.detach().clone().sub_(weight)),
    }
    found = {}
    for name, work in works.items():
        with torch.no_grad(), OperatorBytes() as counted:
            work()
        found[name] = round(counted.rest / weight.numel(), 1)
    return found


def estimates(model: str, batch_sizes: list[int]) -> dict[str, Any]:
    size, patch_size = model.split("/")
    whole = network(size, int(patch_size), SIZES[size][0])
    weights, macs = sum(weight.numel() for weight in whole.parameters()), multiply_adds(whole)
    one, two = (of_variants(size, int(patch_size), images) for images in IMAGES)
    of_weights = per_parameter()
    update = weights * sum(value for name, value in of_weights.items() if "log_steps" not in name)
    found: dict[str, Any] = {"bytes_per_parameter": of_weights}
    for batch_size in batch_sizes:
        products_ms = 1e3 * 2 * TRAINING_FACTOR * macs * batch_size / H100_FLOPS
        found[f"batch_{batch_size}"] = lines = {"products_ms": round(products_ms, 1)}
        lines["update_ms"] = round(1e3 * update / H100_BYTES_PER_SEC, 2)
        for variant in one:
            rest = of_whole(one[variant], two[variant], batch_size)
            rest_ms = 1e3 * rest / H100_BYTES_PER_SEC
            lines[variant] = {
                "rest_gb": round(rest / 1e9, 2),
                "step_ms": round(products_ms + lines["update_ms"] + rest_ms, 1),
            }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["xl/2"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 32])
    arguments = parser.parse_args()
    torch._logging.set_logs(inductor_metrics=True)  # the compiler counts only then
    logging.getLogger("torch").propagate = False
    torch._inductor.config.force_disable_caches = True
    for model in arguments.models:
        facts = {"torch": torch.__version__, "commit": current_commit()}
        found = estimates(model, arguments.batch_sizes)
        print(json.dumps({"benchmark": "step_bytes", "model": f"{model} at 256 px", **found, **facts}), flush=True)


if __name__ == "__main__":
    main()
