"""Call ``gcloud``: print every call, and keep the sentence with which it refuses. It holds the credentials."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from core.urls import redacted
from launch.tpu.settings import TpuSettings

READY, PREEMPTED, GONE = "READY", "PREEMPTED", ""
ENDED = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED")  # states from which a slice does not return by itself


class GcloudError(ValueError):
    """gcloud refused, with its own sentence."""


class Gcloud:
    """Drives one slice. With ``dry_run``, calls are printed and none is made."""

    def __init__(self, settings: TpuSettings) -> None:
        self._settings = settings
        self._pretended = GONE  # the state of a dry run's slice
        if not settings.dry_run and shutil.which("gcloud") is None:
            raise ValueError(
                "There is no gcloud on PATH; install the Google Cloud SDK (https://cloud.google.com/sdk) and log in "
                "with `gcloud auth login`, or give dry_run=true to see the calls."
            )

    def state(self) -> str:
        """Return the slice's state, such as READY, or an empty text where there is no such slice."""
        return self._described("tpu-vm", self._settings.name, "value(state)")

    def queue_state(self) -> str:
        """Return the state of the slice's request in the queue, such as WAITING_FOR_RESOURCES, or an empty text."""
        return self._described("queued-resources", self._settings.name, "value(state.state)")

    def create(self) -> None:
        """Create the slice, or request it in the queue."""
        wanted = self._settings
        spot = ["--spot"] if wanted.spot else []
        if wanted.queued:
            more = [
                f"--node-id={wanted.name}",
                f"--accelerator-type={wanted.type}",
                f"--runtime-version={wanted.version}",
            ]
            self._call(["queued-resources", "create", wanted.name, *more, *spot])
        else:
            more = [f"--accelerator-type={wanted.type}", f"--version={wanted.version}"]
            self._call(["tpu-vm", "create", wanted.name, *more, *spot])

    def delete(self) -> None:
        """Delete the slice, and its request in the queue."""
        if self._settings.queued:
            self._call(["queued-resources", "delete", self._settings.name, "--quiet", "--force"])
        else:
            self._call(["tpu-vm", "delete", self._settings.name, "--quiet"])

    def copy(self, file: Path, to: str) -> None:
        """Copy a file into the home folder of each host."""
        self._call(["tpu-vm", "scp", str(file), f"{self._settings.name}:{to}", "--worker=all"])

    def run(self, command: str, worker: str = "all") -> None:
        """Run a shell command on the hosts. Raises `GcloudError` where it fails on one of them."""
        self._call(["tpu-vm", "ssh", self._settings.name, f"--worker={worker}", f"--command={command}"])

    def follow(self, command: str) -> int:
        """Run a shell command on the first host, whose output is shown, and return its exit code."""
        words = self._words(["tpu-vm", "ssh", self._settings.name, "--worker=0", f"--command={command}"])
        _show(words)
        return 0 if self._settings.dry_run else subprocess.run(words).returncode

    def ask(self, command: str) -> str:
        """Return what a shell command on the first host prints."""
        return self._call(["tpu-vm", "ssh", self._settings.name, "--worker=0", f"--command={command}"])

    def _described(self, kind: str, name: str, what: str) -> str:
        try:
            return self._call([kind, "describe", name, f"--format={what}"]).strip()
        except GcloudError as error:
            if "NOT_FOUND" in str(error) or "not found" in str(error).lower():
                return GONE
            raise

    def _words(self, words: Sequence[str]) -> list[str]:
        project = [f"--project={self._settings.project}"] if self._settings.project else []
        return ["gcloud", "compute", "tpus", *words, f"--zone={self._settings.zone}", *project]

    def _call(self, words: Sequence[str]) -> str:
        whole = self._words(words)
        _show(whole)
        if self._settings.dry_run:
            self._pretended = READY if "create" in words else self._pretended
            return self._pretended
        done = subprocess.run(whole, capture_output=True, text=True)
        if done.returncode != 0:
            _refuse(words, done)
        return done.stdout


def _show(words: Sequence[str]) -> None:
    print(f"$ {redacted(shlex.join(words))}", flush=True)


def _refuse(words: Sequence[str], done: "subprocess.CompletedProcess[str]") -> NoReturn:
    said = " ".join((done.stderr or done.stdout).split()) or "it says nothing"
    raise GcloudError(f"gcloud {' '.join(words[:2])} failed with exit code {done.returncode}: {said}")
