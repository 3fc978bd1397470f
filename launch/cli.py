"""Find the job of ``ditscale JOB ...overrides`` and pass it the rest of the command line."""

import pkgutil
import platform
import sys
from importlib.metadata import version

from core.closest import closest
from core.urls import redacted
from launch.command.words import MULTIRUN
from launch.jobs import JOBS, start

LAUNCHED = {"tpu": "launch.tpu.command:main", "ranks": "launch.ranks:main"}


def _help() -> str:
    lines = ["usage: ditscale JOB [NAME=VALUE ...]", ""]
    lines += [f"  {name:10s} {job.summary}" for name, job in JOBS.items()]
    lines += [
        "",
        "ditscale JOB --help shows a job's settings; ditscale completion bash prints completions for a shell;",
        "ditscale launch tpu --help shows how to train on Cloud TPUs, ditscale launch ranks --help on several GPUs.",
    ]
    return "\n".join(lines)


def _version() -> str:
    return f"ditscale {version('ditscale')} (torch {version('torch')}, Python {platform.python_version()})"


def _complete(arguments: list[str]) -> None:
    """Print the completion script for a shell."""
    from launch.command.completion import SHELLS, script

    if len(arguments) != 1 or arguments[0] not in SHELLS:
        print(
            f"ditscale: error: give one of the shells {' and '.join(SHELLS)}: ditscale completion bash", file=sys.stderr
        )
        sys.exit(2)
    print(script(arguments[0], list(JOBS)))


def _launch(arguments: list[str]) -> int:
    """Start a job in another place, or as several processes, and return the exit code."""
    place = arguments[0] if arguments else ""
    if place not in LAUNCHED:
        print(f"ditscale launch: error: {place!r} is not one of {' and '.join(LAUNCHED)}.", file=sys.stderr)
        return 2
    code: int = pkgutil.resolve_name(LAUNCHED[place])(arguments[1:])
    return code


def main() -> None:
    """Run the command ``ditscale``."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        sys.exit(0 if arguments else 2)
    if arguments[0] in ("--version", "-V", "version"):
        print(_version())
        return
    if arguments[0] == "completion":
        return _complete(arguments[1:])
    if arguments[0] == "launch":
        sys.exit(_launch(arguments[1:]))
    arguments = [
        *(word for word in arguments if word not in MULTIRUN),
        *(word for word in arguments if word in MULTIRUN),
    ]
    job = arguments[0]
    if job not in JOBS:
        print(redacted(f"ditscale: error: There is no job {job!r}{closest(job, JOBS)}"), file=sys.stderr)
        sys.exit(2)
    sys.argv = [f"ditscale {job}", *arguments[1:]]
    start(job)


if __name__ == "__main__":
    main()
