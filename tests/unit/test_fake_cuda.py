"""The code of GPUs passes ``fake_cuda.py`` on a simulated one, which ``no_gpu.c`` makes PyTorch see.

No kernel runs, so no number is checked, only devices, dtypes, waits of the host, and copies.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from warm_python import TRAINING, run_warm_python

HERE = Path(__file__).parent
CC = os.environ.get("CC", "cc")
MODULES = (*TRAINING, "pytest", "torch._subclasses.fake_tensor", "torch.distributed.fsdp")
# PyTorch refuses CUDA in a fork of a process that has counted GPUs, and diffusers asks for them when it is imported.
COUNTS_NO_GPUS = {"CUDA_VISIBLE_DEVICES": "", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}

pytestmark = [
    pytest.mark.skipif(shutil.which(CC) is None, reason=f"there is no C compiler {CC} to make a GPU up with"),
    pytest.mark.skipif(torch.version.cuda is None, reason="this PyTorch was built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: make test-gpu uses it"),
]


@pytest.fixture(scope="module")
def no_gpu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the library that simulates a GPU for a process. PyTorch loads the driver by its soname too."""
    library = tmp_path_factory.mktemp("no_gpu") / "no_gpu.so"
    flags = ["-shared", "-fPIC", "-pthread", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([CC, *flags, str(HERE / "no_gpu.c"), "-o", str(library)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in COUNTS_NO_GPUS.items():
            patch.setenv(name, value)
        run_warm_python(MODULES, "-c", "", cwd=library.parent, preload=str(library))  # starts what is forked from
    return str(library)


def assert_passes(file: str, cwd: Path, no_gpu: str) -> None:
    words = ["-m", "pytest", "-n", "0", "-p", "no:cacheprovider", str(HERE / file)]
    shown = run_warm_python(MODULES, *words, cwd=cwd, preload=no_gpu)
    assert " passed" in shown
    assert "skipped" not in shown


def test_steps_samplers_and_metrics_stay_on_the_gpu_and_bytes_arrive(tmp_path: Path, no_gpu: str) -> None:
    assert_passes("fake_cuda.py", tmp_path, no_gpu)


def test_a_step_of_processes_that_spread_their_state_stays_on_the_gpu(tmp_path: Path, no_gpu: str) -> None:
    assert_passes("fake_fsdp.py", tmp_path, no_gpu)


GATHERING = """
import os
from pathlib import Path
import numpy as np
import torch
from runtime.accelerate import AccelerateRuntime
runtime = AccelerateRuntime("bf16")
gathered = runtime.gather(np.arange(runtime.data_rank + 1)).tolist()
Path(f"rank{runtime.data_rank}").write_text(f"{runtime.device} {torch.distributed.get_backend()} {gathered}")
os._exit(0)  # NCCL was never used
"""


def test_processes_on_gpus_exchange_numpy_arrays_without_the_gpu(tmp_path: Path, no_gpu: str) -> None:
    (tmp_path / "gathering.py").write_text(GATHERING)
    run_warm_python(MODULES, "gathering.py", cwd=tmp_path, ranks=2, preload=no_gpu)
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"cuda:{rank} cuda:nccl,cpu:gloo [0, 0, 1]"
