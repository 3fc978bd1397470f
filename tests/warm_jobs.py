"""``ditscale ...`` in a process of its own that need not import everything again: forked from one that has.

A fork shares nothing with earlier jobs but the imported modules. What must see a fresh interpreter (other
environment at import, the order of imports under XLA, launchers) starts one; `conftest.ditscale` decides.
"""

import atexit
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any, NoReturn

# What every job imports in the end.
JOBS = [f"launch.{job}" for job in ("encode", "verify", "train", "sample", "evaluate", "reference", "export", "report")]
TRAINING = [*JOBS, "runtime.accelerate", "torch._dynamo"]
ENCODING = [*JOBS, "model.autoencoder_kl"]


class WarmJobs:
    """One job after the other, each in a fork of a process that has imported ``modules``."""

    def __init__(self, modules: list[str]) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def start(self, words: list[str], cwd: Path, output: Path, env: dict[str, str] | None = None) -> "WarmJob":
        """``ditscale WORDS...`` in ``cwd``; what it prints goes to the file ``output``."""
        job = {"words": words, "cwd": str(cwd), "output": str(output), "env": {**os.environ, **(env or {})}}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        return WarmJob(int(self._server.stdout.readline()), self._server.stdout)

    def close(self) -> None:
        """End the process that jobs are forked from."""
        self._server.communicate()


class WarmJob:
    """A running job, as `subprocess.Popen` shows it."""

    def __init__(self, pid: int, status: IO[str]) -> None:
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit status where it has ended; the negative signal where one killed it."""
        return self._read(0)

    def wait(self, timeout: float = 300) -> int:
        """As `poll`, once it has ended; it is killed after ``timeout`` seconds."""
        if self._read(timeout) is None:
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(f"job {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def _read(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode


def serve() -> dict[str, Any]:
    """Fork for each line of the standard input; returns the job in the child alone, and never in the parent."""
    for line in sys.stdin:
        assert threading.active_count() == 1  # a fork takes no other thread along
        pid = os.fork()
        if pid == 0:
            job: dict[str, Any] = json.loads(line)
            return job
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    sys.exit()


def become(job: dict[str, Any]) -> NoReturn:
    """Be the process that a shell would have started; ends as one, with handlers of the end."""
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    for target, number in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(target, number)
    sys.stdin = open(0)  # noqa: SIM115
    sys.argv = ["ditscale", *job["words"]]
    from launch.cli import main

    code: Any = 0
    try:
        main()
    except SystemExit as stopped:
        code = stopped.code or 0
        if not isinstance(code, int):
            raise
    end(code)


def end(code: int) -> NoReturn:
    """End as an interpreter does - threads joined, handlers of the end, streams flushed - but free no memory.

    To free the modules one by one takes a second of a fork, which copies each page that it touches.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # or a collection in a fork copies every page of what was imported
    become(serve())
