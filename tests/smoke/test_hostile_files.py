"""Every kind of file, damaged in every way, read by every job: no traceback, no hang, no silently different result.

``make soak`` runs a thousand trials (DITSCALE_TRIALS) and commits what came of them.
"""

import json
import os
from collections import Counter
from pathlib import Path

from hostile_files import GOOD, Fuzzer, some_trials

TRIALS = int(os.environ.get("DITSCALE_TRIALS", "60"))


def test_a_damaged_file_is_made_again_or_named_and_never_believed(tmp_path: Path) -> None:
    fuzzer, outcomes, bad = Fuzzer(tmp_path), Counter[str](), []
    for trial in some_trials(TRIALS, seed=int(os.environ.get("DITSCALE_SEED", "0"))):
        outcome, shown = fuzzer.run(trial)
        outcomes[outcome] += 1
        print(f"{outcome}: {trial}", flush=True)  # shown by pytest -s
        if outcome not in GOOD:
            bad.append(f"{outcome}: {trial}\n{shown[-3000:]}")
    if result := os.environ.get("DITSCALE_RESULT"):
        Path(result).write_text(json.dumps(dict(sorted(outcomes.items()))))
    assert not bad, f"{len(bad)} of {TRIALS} trials: {dict(outcomes)}\n\n" + "\n\n".join(bad)
