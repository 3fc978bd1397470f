"""Every kind of file, damaged in every way, read by every job: no traceback, no hang, no silently different result.

``make test`` runs the same 60 trials each time; ``make soak`` draws a thousand (DITSCALE_TRIALS, DITSCALE_SEED) and
commits the outcomes.
"""

import json
import os
from collections import Counter
from pathlib import Path

from hostile_files import GOOD, JOBS, Fuzzer
from hostile_trials import DAMAGES, KINDS, covering_trials, some_trials

TRIALS = 60


def test_the_trials_of_make_test_have_every_kind_of_file_read_by_each_of_its_jobs_and_every_damage() -> None:
    trials = covering_trials(TRIALS)
    assert len(set(trials)) == TRIALS
    assert {(trial.kind, trial.job) for trial in trials} == {
        (kind, job) for kind, jobs in KINDS.items() for job in jobs
    }
    assert {trial.job for trial in trials} == set(JOBS)
    assert {trial.damage for trial in trials} == set(DAMAGES)


def test_a_damaged_file_is_made_again_or_named_and_never_believed(tmp_path: Path) -> None:
    is_soak = "DITSCALE_TRIALS" in os.environ or "DITSCALE_SEED" in os.environ
    count, seed = int(os.environ.get("DITSCALE_TRIALS", TRIALS)), int(os.environ.get("DITSCALE_SEED", 0))
    trials = list(some_trials(count, seed)) if is_soak else covering_trials(count)
    outcomes, bad = Counter[str](), []
    for trial, outcome, shown in Fuzzer(tmp_path).run(trials):
        outcomes[outcome] += 1
        print(f"{outcome}: {trial}", flush=True)  # shown by pytest -s
        if outcome not in GOOD:
            bad.append(f"{outcome}: {trial}\n{shown[-3000:]}")
    if result := os.environ.get("DITSCALE_RESULT"):
        Path(result).write_text(json.dumps(dict(sorted(outcomes.items()))))
    assert not bad, f"{len(bad)} of {count} trials: {dict(outcomes)}\n\n" + "\n\n".join(bad)
