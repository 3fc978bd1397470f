"""Run ``ditscale ...`` in forks of a process that has already imported its modules.

A fork shares only the imported modules with earlier jobs. Jobs that need a fresh interpreter (another environment at
import, the order of imports under XLA, launchers) start one; `conftest.ditscale` decides.
"""

import atexit
import gc
import importlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

from core.garbage import uncollected

# The modules that every job imports.
JOBS = [f"launch.{job}" for job in ("encode", "verify", "train", "sample", "serve", "evaluate", "reference", "export")]
JOBS.append("launch.report")
TRAINING = [*JOBS, "runtime.accelerate", "torch._dynamo", "torch._inductor.utils"]
# What some jobs import for seconds. Not wandb itself: it makes a folder at import, which the first job to end removes.
TRAINING += ["sklearn.datasets", "pandas", "networkx", "aiohttp", "requests", "rich.console", "matplotlib.pyplot"]
TRAINING += ["diffusers.models.transformers.dit_transformer_2d", "diffusers.schedulers"]


class WarmJobs:
    """Runs one job after the other, each in a fork of a process that has imported the jobs' modules."""

    def __init__(self, requests: FileIO, answers: FileIO, server: subprocess.Popen[bytes] | None = None) -> None:
        self._requests, self._answers, self._server = requests, answers, server
        self._twins: list[WarmJobs] = []

    @classmethod
    def importing(cls, modules: list[str]) -> "WarmJobs":
        """Start a process that imports ``modules``."""
        words = [sys.executable, __file__, *modules]
        server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        assert isinstance(server.stdin, FileIO)
        assert isinstance(server.stdout, FileIO)
        return cls(server.stdin, server.stdout, server)

    def twin(self) -> "WarmJobs":
        """Fork the process again, between two jobs, so that both run jobs at the same time."""
        with tempfile.TemporaryDirectory() as folder:
            requests, answers = Path(folder, "requests"), Path(folder, "answers")
            os.mkfifo(requests)
            os.mkfifo(answers)
            self._ask({"requests": str(requests), "answers": str(answers)})
            twin = WarmJobs(FileIO(requests, "w"), FileIO(answers, "r"))  # each waits until the other end is opened
        self._twins.append(twin)
        return twin

    def start(self, words: list[str], cwd: Path, output: Path, env: dict[str, str] | None = None) -> "WarmJob":
        """Run ``ditscale WORDS...`` in ``cwd``, with its output in the file ``output``."""
        self._ask({"words": words, "cwd": str(cwd), "output": str(output), "env": {**os.environ, **(env or {})}})
        return WarmJob(int(self._answers.readline()), self._answers)

    def close(self) -> None:
        """End the process that jobs are forked from."""
        for twin in self._twins:
            twin.close()
        self._requests.close()
        self._answers.read()
        self._answers.close()
        if self._server is not None:
            self._server.wait()

    def _ask(self, request: dict[str, Any]) -> None:
        self._requests.write(json.dumps(request).encode() + b"\n")


class WarmJob:
    """A running job, with the interface of `subprocess.Popen`."""

    def __init__(self, pid: int, status: FileIO) -> None:  # without a buffer, where a line could wait unseen
        self.pid, self._status = pid, status
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal that killed it, or None while it runs."""
        return self._read(0)

    def wait(self, timeout: float = 300) -> int:
        """Return the exit status after it has ended; kill it after ``timeout`` seconds."""
        if self._read(timeout) is None:
            self.send_signal(signal.SIGKILL)
            self._read(None)  # or the next job would take this one's status for its own
            raise subprocess.TimeoutExpired(f"job {self.pid}", timeout)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send the signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def _read(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            self.returncode = int(self._status.readline())
        return self.returncode


def serve() -> dict[str, Any]:
    """Fork for each line of standard input; returns the job in the child, and never returns in the parent."""
    for line in sys.stdin:
        assert threading.active_count() == 1  # a fork takes no other thread along
        request: dict[str, Any] = json.loads(line)
        is_job, pid = "words" in request, os.fork()
        if pid == 0 and is_job:
            return request
        if pid == 0:
            listen(request)
        elif is_job:
            print(pid, flush=True)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    end(0)


def listen(request: dict[str, str]) -> None:
    """Become a twin: take jobs from pipes of its own from now on."""
    for name, flags, number in (("requests", os.O_RDONLY, 0), ("answers", os.O_WRONLY, 1)):
        pipe = os.open(request[name], flags)
        os.dup2(pipe, number)
        os.close(pipe)


def import_all(modules: Sequence[str]) -> None:
    """Import the modules; hide torch_xla unless it is one of them.

    diffusers imports it wherever it is installed, and then each process opens the CPU's XLA client when it ends.
    """
    if modules and "torch_xla" not in modules and importlib.util.find_spec("diffusers") is not None:
        importlib.import_module("diffusers.utils.import_utils")._torch_xla_available = False
    for name in modules:
        importlib.import_module(name)
    assert ("torch_xla" in sys.modules) == ("torch_xla" in modules)


def prepare_configs(modules: list[str]) -> None:
    """Read the configs of those modules that are jobs, once for all forks."""
    if jobs := [name.removeprefix("launch.") for name in modules if name in JOBS]:
        import fast_hydra

        fast_hydra.prepare(jobs)


def become(job: dict[str, Any]) -> NoReturn:
    """Become the process that a shell would have started; it ends like one, with exit handlers."""
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
    """End as an interpreter does - join threads, call exit handlers, flush streams - but free no memory.

    Freeing the modules one by one takes a fork a second, since it copies each page that it touches.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    with uncollected():
        import_all(sys.argv[1:])
        prepare_configs(sys.argv[1:])
    gc.collect()
    gc.freeze()  # or a collection in a fork copies every page of what was imported
    become(serve())
