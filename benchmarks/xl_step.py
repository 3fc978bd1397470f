"""Measure memory and time of one forward and backward pass of DiT-XL/2 at 256 px in bf16 autocast on the CPU.

``python -m benchmarks.xl_step [depth]`` prints one JSON line; the default depth is the model's 28.
"""

import json
import resource
import sys
import time

import torch

from model.dit import DiT, DiTConfig


def main() -> None:
    depth = int(sys.argv[1]) if len(sys.argv) > 1 else 28
    model = DiT(
        DiTConfig(latent_size=32, channels=4, patch_size=2, width=1152, depth=depth, num_heads=16, num_classes=1000)
    )
    for block in model.block_list:
        torch.nn.init.normal_(block.modulation.weight, std=0.02)
    torch.nn.init.normal_(model.final_layer.decoder.weight, std=0.02)
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(torch.randn(1, 4, 32, 32), torch.tensor([500]), {"label": torch.tensor([3])})
    forward_sec = time.perf_counter() - started
    output.float().square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    result = {
        "benchmark": "xl_step",
        "depth": depth,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "finite": all(gradient is not None and bool(gradient.isfinite().all()) for gradient in gradients),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "forward_sec": round(forward_sec, 1),
        "backward_sec": round(time.perf_counter() - started - forward_sec, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
