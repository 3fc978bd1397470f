"""Measure what starting a job costs: processor seconds above a bare ``import torch``, in turns with it.

``python -m benchmarks.start`` runs ``plan``, ``train`` with one step of a tiny network on the digits, and the help of
``train`` in fresh processes, five times each, and prints one JSON line of medians. The help imports no PyTorch, so all
of its seconds count. Processor seconds grow too where other programs take caches and memory: compare with the bare
import.
"""

import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.commit import current_commit
from benchmarks.loader import processor

REPEATS = 5
SMALL = "experiment=demo model.width=16 model.depth=2 model.num_heads=2 batch_size=16 total_steps=1 log_every=1"
NOTHING_ELSE = "train/logger=none sample_every=null evaluate_every=null runtime=cpu data.shards=shards run_dir=run"
JOBS = {
    "import torch": ["-c", "import torch"],
    "plan": ["-m", "launch.cli", "plan"],
    "train to its first step": ["-m", "launch.cli", "train", *SMALL.split(), *NOTHING_ELSE.split()],
    "train --help": ["-m", "launch.cli", "train", "--help"],
}


def processor_seconds(words: list[str], folder: Path) -> float:
    """Run Python in ``folder``; return the seconds that it and its children took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, list[float]] = {name: [] for name in JOBS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor_seconds(["-m", "launch.cli", "encode", "data=digits", "data.shards=shards"], folder)
        for turn in range(REPEATS + 1):
            for job, words in JOBS.items():
                shutil.rmtree(folder / "run", ignore_errors=True)
                seconds = processor_seconds(words, folder)
                if turn:  # in the first one, files are read and compiled
                    found[job].append(seconds)
    medians = {job: statistics.median(seconds) for job, seconds in found.items()}
    above = {
        f"{job}, above import torch": statistics.median(
            own - bare for own, bare in zip(seconds, found["import torch"], strict=True)
        )
        for job, seconds in found.items()
        if job.startswith(("plan", "train to"))
    }
    result = {
        "benchmark": "start",
        "processor_seconds": {job: round(seconds, 2) for job, seconds in {**medians, **above}.items()},
        "load_average": round(os.getloadavg()[0], 1),
        "processor": processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
