"""Write the batch script of an array, in which every value is quoted for the shell."""

import shlex
import sys
from pathlib import Path

from launch.slurm.plan import MARKER
from launch.slurm.settings import SlurmSettings
from train.signals import EX_TEMPFAIL

# What follows the values. A task's own steps get SIGUSR2 before the time limit and SIGTERM before they are preempted;
# the script only waits for them, then decides by the exit codes that they wrote.
_BODY = r"""
task=$((SLURM_ARRAY_TASK_ID + $1))
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
say() { printf 'ditscale: %s\n' "$1" >&2; }
if [ "$(cat -- "$folder/$marker" 2> /dev/null)" != "$token" ]; then
  say "the node $(hostname) does not see $folder as it was written on $host; give a sweep_dir that all nodes share."
  exit 2
fi
exec >> "$folder/logs/$task.log" 2>&1
requeue() {
  state=$(scontrol show job "$job" 2> /dev/null | grep -o 'JobState=[A-Z]*' | head -n 1)
  if [ "$state" != JobState=RUNNING ]; then
    say "$1; it is not requeued, since its state is ${state#JobState=}; the same command continues it."
    exit "$2"
  fi
  say "$1; it is requeued and continues."
  scontrol requeue "$job" || exit "$2"
  sleep 60
  exit "$2"
}
@SETUP@
ended=$folder/ended/$task
rm -rf -- "$ended"
mkdir -p -- "$ended" "$folder/crashes"
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
trap : TERM USR2 CONT
@SRUN@ "$task" &
step=$!
while kill -0 "$step" 2> /dev/null; do wait "$step"; done
codes=$(cat -- "$ended"/* 2> /dev/null)
fatal='1|2'
first=$(cat -- "$ended/0" 2> /dev/null)
if [ "$(wc -w <<< "$codes")" -lt "${SLURM_NTASKS:-1}" ]; then
  fatal=2  # where a process died without a word, the others end for that, with 1 or as if they were stopped
  first=
fi
if code=$(grep -xE -m 1 "$fatal" <<< "$codes"); then
  say "the run failed with exit code $code; it is not requeued."
  exit "$code"
fi
if [ "$first" = 0 ]; then exit 0; fi
if [ "$first" = @STOPPED@ ]; then
  rm -f -- "$folder/crashes/$task"
  requeue "the run was stopped and has saved" @STOPPED@
fi
date >> "$folder/crashes/$task"
crashes=$(wc -l < "$folder/crashes/$task")
if [ "$crashes" -gt "$max_crashes" ]; then
  say "the run's process died without a word $crashes times, more than hydra.launcher.max_crashes=$max_crashes allows."
  printf '1\n' > "$ended/.0" && mv -- "$ended/.0" "$ended/0"
  exit 1
fi
requeue "the run's process died without a word, $crashes of at most $max_crashes times" 1
"""


def batch_script(settings: SlurmSettings, folder: Path, token: str, host: str) -> str:
    """Return the script for the tasks of the plan in ``folder``; ``host`` submits it, ``token`` is in its marker."""
    values = {
        "folder": str(folder),
        "marker": MARKER,
        "token": token,
        "host": host,
        "max_crashes": settings.max_crashes,
    }
    head = ["#!/bin/bash", "# Written by ditscale for the tasks of one array."]
    head += [f"{name}={shlex.quote(str(value))}" for name, value in values.items()]
    body = _BODY.replace("@SETUP@", "\n".join(settings.setup)).replace("@STOPPED@", str(EX_TEMPFAIL))
    return "\n".join(head) + body.replace("@SRUN@", shlex.join(srun_words(settings, folder)))


def srun_words(settings: SlurmSettings, folder: Path) -> list[str]:
    """Return the command that starts the processes of a task, but for the task's index."""
    words = ["srun", "--kill-on-bad-exit=1", f"--nodes={settings.nodes}", f"--ntasks-per-node={settings.processes}"]
    if settings.cpus_per_task is not None:  # which srun no longer takes from sbatch
        words.append(f"--cpus-per-task={settings.cpus_per_task}")
    if settings.container is not None:
        mounts = ",".join([f"{folder}:{folder}", f"{Path.cwd()}:{Path.cwd()}", *settings.container_mounts])
        words += [f"--container-image={settings.container}", f"--container-mounts={mounts}"]
    return [*words, sys.executable, "-m", "launch.slurm.task", str(folder)]


def sbatch_options(settings: SlurmSettings, folder: Path, name: str, tasks: int, at_once: int | None) -> list[str]:
    """Return the options of sbatch for an array of so many tasks, of which ``at_once`` run at a time."""
    limit = "" if at_once is None else f"%{at_once}"
    found = {
        "job-name": name,
        "array": f"0-{tasks - 1}{limit}",
        "output": str(folder / "logs" / "slurm-%A.log"),
        "open-mode": "append",
        "signal": f"USR2@{settings.grace_sec}",
        "nodes": settings.nodes,
        "ntasks-per-node": settings.processes,
        "chdir": str(Path.cwd()),
        "partition": settings.partition,
        "account": settings.account,
        "qos": settings.qos,
        "time": settings.time_min,
        "cpus-per-task": settings.cpus_per_task,
        "mem": None if settings.mem_gb is None else f"{settings.mem_gb}G",
        "gpus-per-node": settings.gpus_per_node or None,
    }
    given = [f"--{key}={value}" for key, value in found.items() if value is not None]
    return ["--parsable", "--requeue", *given, *settings.options]
