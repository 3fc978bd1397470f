"""The tests that kill jobs, with as many kills as asked for: ``python -m benchmarks.soak encode 50``.

Prints one JSON line and appends it to ``benchmarks/results/soak.jsonl``.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.commit import current_commit

TESTS = {
    "train": "tests/runtime/test_resume.py::test_a_run_killed_at_random_moments_ends_with_the_same_bits",
    "encode": "tests/runtime/test_encode_processes.py::test_a_job_killed_at_random_moments_ends_with_the_same_bytes",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", choices=TESTS)
    parser.add_argument("kills", type=int)
    options = parser.parse_args()
    started = time.time()
    words = [sys.executable, "-m", "pytest", TESTS[options.job]]
    done = subprocess.run(words, env={**os.environ, "DITSCALE_KILLS": str(options.kills)}, check=False)
    result = {
        "benchmark": "soak",
        "job": options.job,
        "kills": options.kills,
        "same_bytes": done.returncode == 0,
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
