"""A SLURM cluster of one node on this machine, of daemons that a test starts and stops, without systemd."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
CORES = 4
HOST = socket.gethostname().split(".")[0]  # the name of the node

# `cred_expire` is also how long a requeued job is held, by default two minutes.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket},cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MaxArraySize=5
KillWait=10
OverTimeLimit=0
MinJobAge=300
InactiveLimit=0
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} Boards=1 SocketsPerBoard=1 CoresPerSocket={cores} ThreadsPerCore=1
PartitionName=low Nodes={host} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes={host} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def _free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    for each in taken:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in taken]
    for each in taken:
        each.close()
    return ports


@contextmanager
def running(folder: Path) -> Iterator[dict[str, str]]:
    """Run the daemons of a cluster in ``folder``, and yield the variables by which SLURM's programs find it."""
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (controller, node), config = _free_ports(2), folder / "slurm.conf"
    short = Path(tempfile.mkdtemp(prefix="munge", dir="/tmp"))  # a socket's path has at most 107 characters
    places = {name: f"{short}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
    ports = {"controller": controller, "node": node}
    config.write_text(_CONFIG.format(folder=folder, host=HOST, cores=CORES, socket=places["socket"], **ports))
    variables = {"SLURM_CONF": str(config)}
    environment = {**os.environ, **variables, "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={places['socket']}"]
    munge += [f"--pid-file={places['pid']}", f"--log-file={places['log']}", f"--seed-file={places['seed']}"]
    daemons = [munge, ["slurmctld", "-D", "-f", str(config)], ["slurmd", "-D", "-f", str(config), "-N", HOST]]
    started: list[subprocess.Popen[bytes]] = []
    try:
        for words in daemons:
            output = (folder / f"{words[0]}.out").open("wb")
            started.append(subprocess.Popen(words, env=environment, stdout=output, stderr=output, cwd=folder))
            if words[0] == "munged":
                _until(lambda: Path(places["socket"]).exists())
        _until(lambda: "idle" in _asked(["sinfo", "-h", "-o", "%T"], environment))
        yield variables
    finally:
        subprocess.run(["scancel", "--state=PENDING"], env=environment, capture_output=True)
        subprocess.run(["scancel", "--user=root"], env=environment, capture_output=True)
        for daemon in reversed(started):
            daemon.terminate()
        for daemon in reversed(started):
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(short)


def _asked(words: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True).stdout


def _until(true: "object", seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < limit, "the cluster did not start"
        time.sleep(0.1)
