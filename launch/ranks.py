"""``ditscale launch ranks``: start one process per GPU of this host, and exit with the code that says what to do next.

torchrun exits with 1 whatever its processes exit with, so a scheduler cannot tell a stopped run, which is to be started
again, from a failed one.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from train.signals import EX_TEMPFAIL, SIGNALS

USAGE = """usage: ditscale launch ranks processes=P [nodes=N node=I address=HOST port=PORT] -- JOB [NAME=VALUE ...]

Start P processes of a job on this host, host I of N, which meet at the first host; exit with 0 if all did, with 75 if
the run was stopped and has saved, else with the code of the first that failed. Signals are passed on.
"""
_DEFAULTS = {"processes": "1", "nodes": "1", "node": "0", "address": "localhost", "port": "29500"}
_POLL_SEC = 0.1
_GRACE_SEC = 30.0  # that processes have to end once another one has failed


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code: 2, with one sentence, for a mistake."""
    if {"--help", "-h"} & set(words[: words.index("--")] if "--" in words else words):
        print(USAGE)
        return 0
    try:
        given, job = _parsed(words)
    except ValueError as error:
        print(f"ditscale launch ranks: error: {error}", file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "launch.cli", *job]
    local = int(given["processes"])
    started = [subprocess.Popen(command, env={**os.environ, **_variables(given, place)}) for place in range(local)]
    return _ended(started)


def _parsed(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Return the settings and the job's words. Raises ValueError for what is missing, unknown or no number."""
    if "--" not in words or not words[words.index("--") + 1 :]:
        raise ValueError("There is no job; give it after --, such as processes=8 -- train experiment=demo.")
    cut = list(words).index("--")
    given = dict(_DEFAULTS)
    for word in words[:cut]:
        key, mark, value = word.partition("=")
        if not mark or key not in _DEFAULTS:
            raise ValueError(f"{word!r} is not one of {', '.join(f'{name}=VALUE' for name in _DEFAULTS)}.")
        if key != "address" and not value.isdecimal():
            raise ValueError(f"{key} is {value!r}, but it must be a whole number.")
        given[key] = value
    if int(given["processes"]) < 1 or int(given["node"]) >= int(given["nodes"]):
        raise ValueError(
            f"processes={given['processes']} must be at least 1, and node={given['node']} below nodes={given['nodes']}."
        )
    return given, list(words[cut + 1 :])


def _variables(given: dict[str, str], place: int) -> dict[str, str]:
    """Return what torchrun would set for the process at this place of the host; nothing for a process alone."""
    local, nodes = int(given["processes"]), int(given["nodes"])
    if local * nodes == 1:
        return {}
    numbers = {"RANK": int(given["node"]) * local + place, "LOCAL_RANK": place, "WORLD_SIZE": local * nodes}
    numbers |= {"LOCAL_WORLD_SIZE": local, "MASTER_PORT": int(given["port"])}
    return {"MASTER_ADDR": given["address"], **{name: str(number) for name, number in numbers.items()}}


def _ended(started: Sequence["subprocess.Popen[bytes]"]) -> int:
    """Pass signals on until all have ended; return the code of the first that failed, else 75 if one was stopped."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS}
    failed, since = 0, 0.0
    try:
        while running := [process for process in started if process.poll() is None]:
            codes = [process.returncode for process in started if process.returncode not in (None, 0, EX_TEMPFAIL)]
            if codes and not failed:
                failed, since = codes[0], time.monotonic()
                for process in running:
                    process.terminate()
            if failed and time.monotonic() - since > _GRACE_SEC:
                for process in running:
                    process.kill()
            time.sleep(_POLL_SEC)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    codes = [process.returncode for process in started]
    failed = failed or next((code for code in codes if code not in (0, EX_TEMPFAIL)), 0)
    if failed:
        return failed if failed > 0 else 128 - failed
    return EX_TEMPFAIL if EX_TEMPFAIL in codes else 0
