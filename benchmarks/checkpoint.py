"""Measure what a checkpoint costs: how long training stalls, and how long writing and loading take beside their peers.

``python -m benchmarks.checkpoint [--size l] [--batch-size 1] [--folder DIR]`` prints one JSON line. It steps with and
without a checkpoint being written (the first save allocates the copy in memory). Then, in turns, it saves and calls
``torch.save`` with fsync, and loads and copies mapped safetensors files: medians of [wall, CPU] seconds.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.commit import current_commit
from benchmarks.train_step import SIZES, diffusion, host_batches, new_model, wait_for_device
from benchmarks.turns import Seconds, cpu, in_turns
from runtime.accelerate import AccelerateRuntime
from train.checkpoint import load_newest
from train.ema import constant
from train.saving import CheckpointWriter
from train.state import TrainState
from train.step import make_step
from train.stores import FolderStore

FACTS: dict[str, Any] = {"seed": 0, "config": {}, "spec": {}, "data_manifest_hash": ""}
SAVES = 3


class Training:
    """A training run that can be stepped and saved."""

    def __init__(self, size: str, batch_size: int, store: FolderStore) -> None:
        runtime = AccelerateRuntime("bf16")
        self.state = new_state(size)
        process = runtime.place(diffusion())
        model, self.state.optimizer = runtime.prepare(self.state.model, [self.state.ema.module], self.state.optimizer)
        self._step = runtime.step(make_step(model, self.state.optimizer, self.state.ema, process, runtime))
        self._batches = runtime.feed(host_batches(batch_size))
        self.writer = CheckpointWriter(store, runtime)

    def step_sec(self, steps: int) -> float:
        """Run some steps, and return the mean seconds of one."""
        wait_for_device()
        started = time.perf_counter()
        for _ in range(steps):
            self._step(next(self._batches), at_log_step=False)
            self.state.advance()
        wait_for_device()
        return (time.perf_counter() - started) / steps

    def save(self) -> None:
        """Start writing a checkpoint."""
        self.writer.save(self.state, FACTS)


def new_state(size: str) -> TrainState:
    model = new_model(f"{size}/2")
    return TrainState(model, constant(model), torch.optim.AdamW(model.parameters(), weight_decay=0.0), 1, 10**9)


def written(training: Training, store: FolderStore) -> dict[str, Seconds]:
    """Compare a whole save with ``torch.save`` of the same tensors to one file, and fsync.

    A save copies the tensors, for which the loop waits, and writes the copy; ``write_sec`` is the median of the latter.
    """
    writes: list[float] = []

    def peer() -> None:
        state = training.state
        modules = {"model": state.model, "ema": state.ema.module}
        content = {name: module.state_dict() for name, module in modules.items()}
        with open(store.folder / "peer.pt", "wb") as file:
            torch.save({**content, "optimizer": state.optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())

    def ours() -> None:
        training.save()
        training.writer.wait()
        writes.append(training.writer.timing.write_sec)

    def clear() -> None:  # so that both write to memory that was just freed: a virtual machine has slow memory, too
        (store.folder / "peer.pt").unlink(missing_ok=True)
        for step in store.steps():
            store.remove(step)
        os.sync()

    found = in_turns({"ours": ours, "torch_save_fsync": peer}, clear)
    (store.folder / "peer.pt").unlink(missing_ok=True)
    return {**found, "write_sec": [float(f"{statistics.median(writes[1:]):.4g}")]}


def loaded(size: str, store: FolderStore) -> dict[str, Seconds]:
    """Compare a load with that of mapped safetensors files, unchecked, copied to modules and a new optimizer state."""
    state, path = new_state(size), store.local(store.steps()[-1])

    def peer() -> None:
        state.model.load_state_dict(load_file(path / "model.safetensors"))
        state.ema.module.load_state_dict(load_file(path / "ema.safetensors"))
        tensors = load_file(path / "optimizer.safetensors")
        for name, parameter in state.model.named_parameters():
            quantities = ("exp_avg", "exp_avg_sq", "step")
            state.optimizer.state[parameter] = {key: tensors[f"{name}/{key}"].clone() for key in quantities}

    def forget() -> None:
        state.optimizer.state.clear()
        gc.collect()

    return in_turns({"ours": lambda: load_newest(store, state), "mapped_safetensors": peer}, forget)


def measure(size: str, batch_size: int, steps: int, store: FolderStore) -> dict[str, Any]:
    training = Training(size, batch_size, store)
    training.step_sec(1)
    alone, stalls, writes, while_writing = [], [], [], []
    for _ in range(SAVES):
        alone.append(training.step_sec(steps))
        training.save()
        stalls.append(training.writer.timing.stall_sec)
        while_writing.append(training.step_sec(steps))
        training.writer.wait()
        writes.append(training.writer.timing.write_sec)
        for old in store.steps()[:-1]:
            store.remove(old)
    gigabytes = training.writer.timing.bytes_written / 1e9
    write = written(training, store)
    training.save()
    training.writer.wait()
    del training
    gc.collect()
    step, stall = statistics.median(alone), statistics.median(stalls[1:])
    return {
        "gigabytes": round(gigabytes, 3),
        "save": write,
        "load": loaded(size, store),
        "first_stall_sec": round(stalls[0], 3),
        "stall_sec": round(stall, 3),
        "write_sec": round(statistics.median(writes), 3),
        "stall_over_write": round(stall / statistics.median(writes), 4),
        "batch_size": batch_size,
        "step_sec": round(step, 4),
        "step_sec_while_writing": round(statistics.median(while_writing), 4),
        "stall_fraction_at_one_per_1000_steps": round(stall / (1000 * step), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    has_gpu = torch.cuda.is_available()
    parser.add_argument("--size", choices=SIZES, default="xl" if has_gpu else "s")
    parser.add_argument("--batch-size", type=int, default=256 if has_gpu else 4)
    parser.add_argument("--steps", type=int, default=20 if has_gpu else 2, help="before and after each save")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(arguments.size, arguments.batch_size, arguments.steps, FolderStore(Path(folder)))
    result = {
        "benchmark": "checkpoint",
        "model": f"{arguments.size}/2 at 256 px",
        "device": torch.cuda.get_device_name() if has_gpu else "CPU",
        **found,
        "threads": torch.get_num_threads(),
        **cpu(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
