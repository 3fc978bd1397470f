"""``ditscale launch tpu``: create or reuse a slice, train on it, and recreate it after a preemption."""

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from launch.tpu.gcloud import ENDED, GONE, READY, Gcloud, GcloudError
from launch.tpu.hosts import exit_code, following, installing, lines_of_log, pack, starting, stopping
from launch.tpu.settings import VERBS, TpuSettings, parsed, shown
from train.signals import EX_TEMPFAIL

USAGE = """usage: ditscale launch tpu name=NAME zone=ZONE type=TYPE [...] -- JOB [NAME=VALUE ...]
       ditscale launch tpu stop|logs|delete name=NAME zone=ZONE

Train on a slice of Cloud TPUs: create it, or use one of that name; copy the code; install it on every host; start the
job so that it survives the connection; show the first host's log; recreate a preempted slice and continue. Settings:
"""


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit code: 2, with one sentence, for a mistake or a refusal of gcloud's."""
    verb = words[0] if words and words[0] in VERBS else "start"
    rest = [word for number, word in enumerate(words) if number or word not in VERBS]
    cut = rest.index("--") if "--" in rest else len(rest)
    if {"--help", "-h"} & set(rest[:cut]):
        print(f"{USAGE}{shown()}")
        return 0
    try:
        return _run(verb, parsed(verb, rest[:cut]), rest[cut + 1 :])
    except ValueError as error:
        print(f"ditscale launch tpu: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("The job continues on the slice; `ditscale launch tpu logs` shows it, `stop` stops it.", file=sys.stderr)
        return 130


def _run(verb: str, settings: TpuSettings, job: list[str]) -> int:
    gcloud = Gcloud(settings)
    if verb == "start":
        return _Slice(settings, gcloud, job).train()
    if verb == "logs":
        return gcloud.follow(following(settings.folder, 1))
    if verb == "stop":
        gcloud.run(stopping(settings.folder))
    else:
        gcloud.delete()
    return 0


class _Slice:
    """A slice, and the job that runs on it."""

    def __init__(self, settings: TpuSettings, gcloud: Gcloud, job: list[str]) -> None:
        if not job:
            raise ValueError(
                "There is no job; give it after --, such as -- train runtime=xla remote_dir=gs://BUCKET/RUN."
            )
        if not any(word.startswith("remote_dir=") for word in job) and job[0] == "train":
            print("note: without remote_dir=gs://..., a preempted slice takes the run folder with it.", file=sys.stderr)
        self._settings, self._gcloud, self._job = settings, gcloud, job
        self._shown_lines = 0

    def train(self) -> int:
        """Start the job, and start it again, on a new slice if need be, until it ends. Returns its exit code."""
        installed = False
        for _ in range(self._settings.most_starts):
            installed = self._prepare(installed)
            code = self._try()
            if code is None:
                installed = False  # on a new slice
            elif code != EX_TEMPFAIL:
                return code
            else:
                print("The job was stopped and has saved; it is started again.", file=sys.stderr)
        raise ValueError(
            f"The job was started {self._settings.most_starts} times and has not ended; raise most_starts."
        )

    def _prepare(self, installed: bool) -> bool:
        """Create the slice where there is none, and install the code where it is new to this command."""
        state = self._gcloud.state()
        if state in ENDED:
            print(f"The slice is {state}; it is deleted and created again.", file=sys.stderr)
            self._gcloud.delete()
            state = GONE
        if state == GONE:
            self._gcloud.create()
        self._wait_until_ready()
        if not installed:
            with tempfile.TemporaryDirectory() as folder:
                archive = pack(Path(folder))
                self._gcloud.copy(archive, archive.name)
            self._gcloud.run(installing(self._settings.folder, self._settings.install))
            self._shown_lines = 0
        return True

    def _wait_until_ready(self) -> None:
        shown = ""
        while (state := self._gcloud.state()) != READY:
            queue = self._gcloud.queue_state() if self._settings.queued and state == GONE else ""
            if state in ENDED or queue in ENDED:
                raise ValueError(
                    f"The slice is {state or queue} before it was ready; delete it, or ask for another type."
                )
            if (state or queue) != shown:
                shown = state or queue
                print(f"The slice is {shown}.", file=sys.stderr)
            time.sleep(self._settings.poll_sec)

    def _try(self) -> int | None:
        """Start the job unless it runs, follow it, and return its exit code, or None where the slice is lost."""
        settings = self._settings
        try:
            self._gcloud.run(starting(settings.folder, settings.program, self._job))
            while self._gcloud.follow(following(settings.folder, self._shown_lines + 1)) != 0:
                if self._gcloud.state() != READY:
                    return None
                print("The connection was lost; the job continues on the slice.", file=sys.stderr)
                time.sleep(settings.poll_sec)
            if settings.dry_run:
                return 0
            self._shown_lines = int(self._gcloud.ask(lines_of_log(settings.folder)))
            return int(self._gcloud.ask(exit_code(settings.folder)))
        except GcloudError:
            if self._gcloud.state() == READY:
                raise
            return None
