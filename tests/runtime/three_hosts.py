"""Run several hosts without an accelerator, each in a fork, from a subprocess of the tests.

``python three_hosts.py COUNT FOLDER BEHAVIOUR``: finish, fail, differ, or wait to be killed. A host that has met the
others writes its pid to ``FOLDER/INDEX.ready``; what it prints goes to ``FOLDER/INDEX.log``, exit codes are printed.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

from core.atomic import atomic_file
from runtime.agreement import require_same
from runtime.hosts import Hosts


def host(index: int, count: int, folder: Path, behaviour: str) -> None:
    hosts = Hosts(index, count, f"file://{folder}/meet", timeout_sec=300)
    assert hosts.exchange(index * 10) == [0, 10, 20]
    with hosts.together():
        hosts.wait()
        with atomic_file(folder / f"{index}.ready") as file:
            file.write(str(os.getpid()).encode())
        if behaviour == "differ":
            require_same({"seed": "0", "source code": "new" if index == 2 else "old"}, hosts.exchange)
        if index == 1 and behaviour == "fail":
            raise OSError("no space left on device")
        time.sleep(index if behaviour == "finish" else 1000)
    print("left", time.time())


def start(index: int, count: int, folder: Path, behaviour: str) -> int:
    """Fork a host; returns its pid. It ends as an interpreter does, with code 1 where it raised."""
    if pid := os.fork():
        return pid
    output, code = os.open(folder / f"{index}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND), 0
    for number in (1, 2):
        os.dup2(output, number)
    try:
        host(index, count, folder, behaviour)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(count: int, folder: Path, behaviour: str) -> None:
    pids = [start(index, count, folder, behaviour) for index in range(count)]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
