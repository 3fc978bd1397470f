"""Run ``python ...`` in forks of a process that has already imported its modules.

One call may start several processes, as torchrun would: the ranks of a job, which connect by gloo. Tests of a launcher
itself, or of how an interpreter starts, start fresh interpreters.
"""

import atexit
import functools
import gc
import itertools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn

from warm_jobs import JOBS, import_all, prepare_configs

from core.garbage import uncollected

WITH_XLA = ("torch_xla", "torch_xla.core.xla_model", "runtime.xla", *JOBS)  # torch_xla must be imported first
# What XLA's CPU backend may leave out: compiling takes a third of the time, and the programs train the same run.
FAST_COMPILE = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"}
TRAINING = (*JOBS, "runtime.accelerate", "torch._dynamo", "diffusers.models.autoencoders.autoencoder_kl")


LITTLE_ROOM = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit_bytes = int(sys.argv.pop(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))
from launch import cli
cli.main()
"""


class WarmProcesses:
    """The running ranks of one job, whose output goes to one file."""

    def __init__(self, pids: list[int], status: IO[str]) -> None:
        self.pids, self._status = pids, status
        self.codes: list[int] | None = None  # of all, by rank
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code once all have ended, that of the first that failed, as a launcher does; else None."""
        return self._read(0)

    def wait(self) -> int:
        """Return the exit code of `poll` after all have ended, at the latest at the time limit of their start."""
        code = self._read(None)
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        """Send the signal to the first process, unless all have ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pids[0], number)

    def _read(self, timeout: float | None) -> int | None:
        if self.codes is None and select.select([self._status], [], [], timeout)[0]:
            self._code, self.codes = json.loads(self._status.readline())
        return self._code


def start_warm_python(
    modules: tuple[str, ...],
    *words: str,
    cwd: Path,
    output: Path,
    env: dict[str, str] | None = None,
    ranks: int = 1,
    limit_sec: float = 600,
    preload: str = "",
    launched: bool = True,
) -> WarmProcesses:
    """Start ``python WORDS...``, or ranks of it, where ``modules`` are imported. The previous call must have ended.

    The first rank that fails ends the others, as under a launcher, unless they are not ``launched`` together.
    """
    server, port = _server(modules, preload), _free_port()
    assert server.stdin is not None
    assert server.stdout is not None
    processes = [{**os.environ, **(env or {}), **_place(rank, ranks, port)} for rank in range(ranks)]
    job: dict[str, Any] = {"words": words, "cwd": str(cwd), "output": str(output), "processes": processes}
    job |= {"limit": limit_sec, "launched": launched}
    server.stdin.write(json.dumps(job) + "\n")
    return WarmProcesses(json.loads(server.stdout.readline()), server.stdout)


def run_warm_python(
    modules: tuple[str, ...],
    *words: str,
    cwd: Path,
    expect: int = 0,
    env: dict[str, str] | None = None,
    ranks: int = 1,
    limit_sec: float = 600,
    preload: str = "",
) -> str:
    """Run processes as `start_warm_python` does, to their end. Returns the output."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        job = start_warm_python(
            modules, *words, cwd=cwd, output=output, env=env, ranks=ranks, limit_sec=limit_sec, preload=preload
        )
        found, shown = job.wait(), output.read_text()
    assert found == expect, (job.codes, shown)
    return shown


def run_with_little_room(modules: tuple[str, ...], limit_bytes: int, *words: str, cwd: Path, expect: int) -> str:
    """Run ``ditscale WORDS...`` where no file may grow beyond so many bytes, as a full disk is to a writer."""
    return run_warm_python(modules, "-c", LITTLE_ROOM, str(limit_bytes), *words, cwd=cwd, expect=expect)


def start_ranks(ranks: int, *arguments: str, cwd: Path, output: Path, launched: bool = True) -> WarmProcesses:
    """``ditscale ARGUMENTS...`` in several gloo processes, as `run_ranks` runs it to its end."""
    words = ("-m", "launch.cli", *arguments)
    return start_warm_python(TRAINING, *words, cwd=cwd, output=output, ranks=ranks, launched=launched)


def run_ranks(ranks: int, *arguments: str, cwd: Path, expect: int = 0) -> str:
    """Run ``ditscale ARGUMENTS...`` in several gloo processes, with the variables that torchrun sets."""
    return run_warm_python(TRAINING, "-m", "launch.cli", *arguments, cwd=cwd, expect=expect, ranks=ranks)


def _place(rank: int, ranks: int, port: int) -> dict[str, str]:
    if ranks == 1:
        return {}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1", **{name: str(number) for name, number in numbers.items()}}


PORTS = range(10_000, 32_000)  # below those that systems give to whoever asks for any port, as others do all the time
_ports = itertools.cycle([*PORTS[7919 * os.getpid() % len(PORTS) :], *PORTS])  # processes begin far from each other


def _free_port() -> int:
    """Return a port that is free, and that nobody else is likely to take before the ranks do."""
    for port in _ports:
        with socket.socket() as taken, suppress(OSError):
            taken.bind(("127.0.0.1", port))
            return port
    raise AssertionError


@functools.cache
def _server(modules: tuple[str, ...], preload: str) -> subprocess.Popen[str]:
    """Return the process that forks: one for each worker of pytest, choice of modules and preloaded library."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **({"LD_PRELOAD": preload} if preload else {})}
    words = [sys.executable, __file__, *modules]
    server = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=env)
    atexit.register(server.communicate)
    return server


def _serve() -> tuple[dict[str, Any], dict[str, str]]:
    """Fork the processes of each line of standard input; returns in each of them, with the job and its variables."""
    for line in sys.stdin:
        job: dict[str, Any] = json.loads(line)
        assert threading.active_count() == 1  # a fork takes no other thread along
        pids = []
        for variables in job["processes"]:
            pid = os.fork()
            if pid == 0:
                return job, variables
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps(_ended(pids, job["limit"], job["launched"])), flush=True)
    sys.exit()


def _ended(pids: list[int], limit_sec: float, launched: bool) -> tuple[int, list[int]]:
    """Return the exit code of the first that failed (0 if none did), and the codes of all, by rank.

    The time limit ends the others, and so does the first failure where they were ``launched`` together.
    """
    codes: dict[int, int] = {}  # in the order of their ends
    signal.signal(signal.SIGALRM, lambda *_: _end(set(pids) - codes.keys(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, limit_sec)
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, 0)
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0 and launched:
            _end(set(pids) - codes.keys(), signal.SIGTERM)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return next((code for code in codes.values() if code != 0), 0), [codes[pid] for pid in pids]


def _end(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _become(job: dict[str, Any], variables: dict[str, str]) -> NoReturn:
    """Become the process that a shell would have started, up to its exit handlers.

    After those, an interpreter would spend two seconds freeing all that was imported.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(job["cwd"])
    if "torch_xla" in sys.modules:  # which adds to this variable when it is imported
        sys.modules["torch_xla"]._setup_xla_flags()
    output = os.open(job["output"], os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    for target, number in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(target, number)
    sys.stdin = open(0)  # noqa: SIM115
    code = 0
    try:
        _run(job["words"])
    except SystemExit as stopped:
        if stopped.code is not None and not isinstance(stopped.code, int):
            print(stopped.code, file=sys.stderr)
        code = 0 if stopped.code is None else stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run(words: list[str]) -> None:
    what, *more = words
    if what == "-m":
        sys.argv = more
        runpy.run_module(more[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv = ["-c", *more[1:]]
        exec(compile(more[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [what, *more]
        sys.path.insert(0, str(Path(what).parent))
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    with uncollected():
        import_all(sys.argv[1:])
        prepare_configs(sys.argv[1:])
    gc.freeze()  # or a collection in a fork copies every page of what was imported
    _become(*_serve())
