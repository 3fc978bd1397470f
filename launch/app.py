"""Runs a job under Hydra and turns errors of the user into one sentence and exit code 2."""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.check import check_known, check_positive, check_targets, closest
from launch.parallel import exit_if_asked, in_worker, run_in_worker
from launch.progress import make_progress
from launch.schema import register

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
LESS_MEMORY = {  # of a GPU; roundings are all that changes
    "train": "set runtime.micro_batches=2 or activation_checkpointing=true, or for samples a smaller "
    "evaluation.batch_size",
    "evaluate": "set a smaller evaluation.batch_size",
}
CONF = Path(__file__).resolve().parent.parent / "conf"
JobFunction = Callable[..., None]  # (config, progress)
Settle = Callable[[DictConfig, list[str]], None]  # (config before anything is resolved, words of the command line)


def run(job: str, function: JobFunction, settle: Settle | None = None) -> None:
    """Compose ``conf/{job}.yaml`` with the command line's overrides and call ``function(config, progress)``.

    ``settle`` may change the composed config before anything in it is resolved.

    Exits with 2 and one sentence for a ValueError or a config error, with 1 where training diverged.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    register()
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then leaves the reporting to us
    application = hydra.main(config_path=str(CONF), config_name=job, version_base="1.3")
    task = _Task(job, function, settle)
    try:
        application(task)()
        exit_if_asked()
        if task.error is not None:
            raise task.error
    except KeyboardInterrupt:
        again = "; the same command continues" if job in ("train", "encode") else ""
        print(f"ditscale {job}: stopped{again}.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sentence = _sentence(job, error)
        if wants_traceback or sentence is None:
            raise
        _exit(job, sentence, 1 if isinstance(error, FloatingPointError) else 2)


class _Task:
    """What Hydra calls for each run, in this process or, in a parallel sweep, in another.

    A single run keeps its exception in ``error``, past Hydra, which would print more than the sentence. A run of a
    sweep tells of it at once and raises it: Hydra goes on with the others, and in the end tells of the first alone.
    """

    def __init__(self, job: str, function: JobFunction, settle: Settle | None) -> None:
        self._job, self._function, self._settle = job, function, settle
        self.error: Exception | None = None

    def __call__(self, config: DictConfig) -> None:
        try:
            if in_worker():
                run_in_worker(lambda: self._run(config))
            else:
                self._run(config)
        except Exception as error:
            # Hydra wraps what a constructor raises, and the cause does not survive the way between processes.
            cause = _first_value_error(error) or error
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sentence = _sentence(self._job, cause) or f"{type(cause).__name__}: {cause}"
                print(f"ditscale {self._job}: {_name_in_sweep(config)} failed: {sentence}", file=sys.stderr)
                raise cause from None
            self.error = cause

    def _run(self, config: DictConfig) -> None:
        check_known(config)
        if self._settle is not None:
            self._settle(config, list(HydraConfig.get().overrides.task))
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)  # type: ignore[assignment]
        check_targets(plain)
        check_positive(plain)
        hydra_config: Any = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:
            from launch.gpus import take_gpu  # which imports PyTorch; showing help need not

            take_gpu(plain, Path(hydra_config.sweep.dir))
        row = OmegaConf.select(hydra_config, "job.num") or 0
        is_main = os.environ.get("RANK", "0") == "0"
        self._function(plain, make_progress(plain.get("name", ""), row, is_main))


def _name_in_sweep(config: DictConfig) -> str:
    """Of a run: its name where it has one, else what it overrides."""
    try:
        return str(config["name"])
    except OmegaConfBaseException:
        return str(HydraConfig.get().job.override_dirname)


def _exit(job: str, sentence: str, code: int) -> NoReturn:
    print(f"ditscale {job}: error: {sentence}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
    sys.exit(code)


def _sentence(job: str, error: BaseException) -> str | None:
    """What to tell the user, or None for an error that is not theirs."""
    if isinstance(error, FloatingPointError):
        return _one_line(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error.missing_cfg_file or "", error.options)
    if isinstance(error, ConfigCompositionException) or type(error).__name__ == "OverrideParseException":
        return _explain_override(job, " ".join(_one_line(cause) for cause in _causes(error)))
    cause = _first_value_error(error) or error
    if isinstance(cause, OmegaConfBaseException):
        return _explain_value(cause)
    if isinstance(cause, ValueError):
        return _one_line(cause)
    if isinstance(error, OSError) and error.errno in NO_ROOM | NO_PERMISSION:
        written, remedy = "written", "free some space"
        if error.errno in NO_PERMISSION:
            written, remedy = "read or written", "give the permission, or choose another folder"
        place = f" {error.filename}" if error.filename else ""
        return f"A file{place} cannot be {written}: {error.strerror}; {remedy}, then give the same command again."
    if full := next((cause for cause in _causes(error) if type(cause).__name__ == "OutOfMemoryError"), None):
        wanted = re.search(r"Tried to allocate .*? is free", _one_line(full))
        reason = f" ({wanted.group()})" if wanted else ""
        return f"The GPU's memory is full{reason}; {LESS_MEMORY.get(job, 'set a smaller batch_size')}."
    return _one_line(error) if isinstance(error, HydraException) else None


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _first_value_error(error: BaseException) -> ValueError | None:
    return next((cause for cause in _causes(error) if isinstance(cause, ValueError)), None)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _explain_choice(missing: str, options: Sequence[str]) -> str:
    """Name what a group does not have. Hydra lists one folder, but experiments lie in folders of their own."""
    group, _, name = missing.rpartition("/")
    if missing.startswith("experiment/"):
        group, name = "experiment", missing.removeprefix("experiment/")
        options = sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))
    return f"There is no {name!r} in {group}{closest(name, options)} It has: {', '.join(options)}."


def _explain_value(error: OmegaConfBaseException) -> str:
    if (missing := re.search(r"Missing mandatory value: (\S+)", str(error))) is not None:
        return f"{missing.group(1)} is missing; give it as {missing.group(1)}=VALUE."
    key = getattr(error, "full_key", None) or "a setting"
    return f"{key}: {str(error).splitlines()[0]}."


def _explain_override(job: str, message: str) -> str:
    """Name the override that does not fit, and the closest setting or group."""
    typed = re.search(r"override (\S+?)=.* Value '(.*)' of type '\w+' could not be converted to (\w+)", message)
    if typed is not None:
        return f"{typed.group(1)} is {typed.group(2)!r}, but it must be of type {typed.group(3).lower()}."
    merged = re.search(r"override (\S+?)=.*? (Value .*|Invalid value.*?)\.? full_key", message)
    if merged is not None:
        return f"{merged.group(1)}: {merged.group(2)}."
    found = re.search(r"[Cc]ould not (?:override|append|delete)[^']*'([^']+)'", message)
    if found is None:
        return " ".join(message.split())
    key = found.group(1).split("=")[0].lstrip("+~")
    return f"`ditscale {job}` has no setting {key!r}{closest(key, _valid_names(job))}"


def _valid_names(job: str) -> list[str]:
    """Every setting of the job's default config, and every group that it chooses from."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=job):
        config = hydra.compose(config_name=job, return_hydra_config=True)
    groups = [str(group) for group in config.hydra.runtime.choices if not str(group).startswith("hydra/")]
    keys = _dotted_keys(OmegaConf.to_container(config))
    return [*(key for key in keys if not key.startswith("hydra")), *groups]


def _dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_dotted_keys(value, f"{prefix}{key}.")]
    return keys
