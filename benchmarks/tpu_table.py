"""Print result lines of `benchmarks.tpu_aot` as the table of docs/tpu.md.

``python -m benchmarks.tpu_table benchmarks/results/tpu_aot.jsonl``
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

GIB = 2**30
HEADINGS = (
    "slice",
    "images a core",
    "mode",
    "activation checkpointing",
    "GiB a core",
    "fits",
    "computes",
    "collectives, GB a core",
)


def table(lines: Iterable[str]) -> str:
    """Return the table in Markdown. "computes": compiled multiply-adds of all cores / those of model/flops.py."""
    rows = [HEADINGS, ("---",) * len(HEADINGS), *(_row(json.loads(line)) for line in lines)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    cores, shards = result["cores"], result["fsdp_devices"]
    used, capacity = result["hbm_bytes"] / GIB, result["hbm_capacity_bytes"] / GIB
    sent = (f"{kind} {total['bytes'] / 1e9:.2f}" for kind, total in result.get("collectives", {}).items())
    return (
        f"{result['slice']}, {cores} cores",
        f"{result['batch_size'] / cores:g}",
        result["mode"] if result["mode"] == "replicated" else f"{result['mode']} over {shards}",
        "yes" if result["activation_checkpointing"] else "no",
        f"{used:.2f} of {capacity:.2f}",
        "yes" if result["fits"] else f"**no**, {used - capacity:.2f} too many",
        f"{result['compiled_multiply_adds_over_model']:.2f}" if result["fits"] else "-",
        ", ".join(part for part in sent if not part.endswith(" 0.00")) or "-",
    )


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()), end="")
