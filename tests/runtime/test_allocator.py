"""Steps on a CPU reuse the memory of the step before."""

import platform
from pathlib import Path

import pytest
from warm_python import TRAINING, run_warm_python

FAULTS = """
import resource, torch
from runtime.accelerate import AccelerateRuntime

def faults() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        kept = [torch.ones(2_000_000) for _ in range(8)]  # 64 MB in blocks that glibc maps one by one
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
AccelerateRuntime("fp32", device="cpu")
faults()
print(before, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator has these settings")
def test_a_process_that_trains_on_a_cpu_keeps_freed_memory(tmp_path: Path) -> None:
    before, after = map(int, run_warm_python(TRAINING, "-c", FAULTS, cwd=tmp_path).split())
    assert before > 100  # it returned memory to the system
    assert after < before / 10
