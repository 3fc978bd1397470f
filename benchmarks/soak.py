"""Run the tests that kill jobs, or that damage files, many times: ``python -m benchmarks.soak encode 50``.

It prints one JSON line and appends it to ``benchmarks/results/soak.jsonl``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.commit import current_commit

TESTS = {
    "train": "tests/runtime/test_resume.py::test_a_run_killed_at_random_moments_ends_with_the_same_bits",
    "files": "tests/smoke/test_hostile_files.py",
    "encode": "tests/runtime/test_encode_processes.py::test_a_job_killed_at_random_moments_ends_with_the_same_bytes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=TESTS)
    parser.add_argument("times", type=int, help="number of kills, or of damaged files")
    parser.add_argument("--seed", type=int, default=0, help="seed for the choice of files, damages and jobs")
    options = parser.parse_args()
    started = time.time()
    words = [sys.executable, "-m", "pytest", TESTS[options.job]]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.json"
        wanted = {"DITSCALE_KILLS": str(options.times), "DITSCALE_TRIALS": str(options.times)}
        wanted |= {"DITSCALE_SEED": str(options.seed), "DITSCALE_RESULT": str(outcomes)}
        done = subprocess.run(words, env={**os.environ, **wanted}, check=False)
        found = json.loads(outcomes.read_text(encoding="utf-8")) if outcomes.exists() else {}
    is_files = options.job == "files"
    result = {
        "benchmark": "soak",
        "job": options.job,
        **({"trials": options.times, "outcomes": found} if is_files else {"kills": options.times}),
        ("none_bad" if is_files else "same_bytes"): done.returncode == 0,
        "duration_sec": round(time.time() - started),
        "commit": current_commit(),
    }
    line = json.dumps(result)
    print(line)
    with (Path(__file__).parent / "results/soak.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
