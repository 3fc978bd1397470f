"""Run one of several hosts without an accelerator, in a subprocess of the tests.

``python three_hosts.py INDEX COUNT FOLDER BEHAVIOUR``: finish, fail, differ, or wait to be killed.
"""

import sys
import time
from pathlib import Path

from runtime.agreement import require_same
from runtime.hosts import Hosts

index, count, folder, behaviour = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
hosts = Hosts(index, count, f"file://{folder}/meet", timeout_sec=300)
assert hosts.exchange(index * 10) == [0, 10, 20]
with hosts.together():
    hosts.wait()
    (folder / f"{index}.ready").touch()
    if behaviour == "differ":
        require_same({"seed": "0", "source code": "new" if index == 2 else "old"}, hosts.exchange)
    if index == 1 and behaviour == "fail":
        raise OSError("no space left on device")
    time.sleep(index if behaviour == "finish" else 1000)
print("left", time.time())
