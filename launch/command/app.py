"""Run a job under Hydra, and report a user's mistake as one sentence with exit code 2."""

import errno
import itertools
import os
import re
import sys
import traceback
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

from core.closest import closest
from core.garbage import uncollected
from core.rooms import ROOT
from launch import STARTED_BY
from launch.command.check import check_finite, check_known, check_targets
from launch.command.memory import less_memory
from launch.command.mode import read_mode_where_it_is_set
from launch.command.parallel import started_by_torchrun, stop_without
from launch.command.progress import make_progress
from launch.command.redaction import exit_with_traceback, redact_file, secrets_hidden
from launch.command.settings import SETTINGS, register
from launch.command.sweep_processes import SweepFailedError
from launch.command.words import key_of, prepared

HELP = ("--help", "-h")
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_PERMISSION = {errno.EACCES, errno.EPERM, errno.EROFS}
CONF = ROOT / "conf"
_CLASSIFIER_GUIDANCE = re.compile(r"(noisy_)?classifier(_guidance|_guided)?|adm_g")
JobFunction = Callable[..., None]  # (settings, progress)
Settle = Callable[[DictConfig, list[str]], None]  # (config before interpolations are resolved, command-line words)


def run(job: str, function: JobFunction, settle: Settle | None = None) -> None:
    """Compose ``conf/{job}.yaml`` with the command line's overrides and call ``function(settings, progress)``.

    ``settle`` may change the composed config before its interpolations are resolved.

    Exits with code 2 and one sentence for a ValueError or a config error, and with 1 where training diverged.
    ``HYDRA_FULL_ERROR=1`` shows the traceback instead.
    """
    if started_by_torchrun():
        stop_without(STARTED_BY)
    register()
    read_mode_where_it_is_set()
    sys.argv[1:] = prepared(sys.argv[1:])
    wants_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
    application = hydra.main(config_path=str(CONF), config_name=job, version_base="1.3")
    task = _Task(job, function, settle, wants_traceback)
    with secrets_hidden(sys.argv):
        try:
            application(task)()
            if task.error is not None:
                raise task.error
        except KeyboardInterrupt:
            again = "; the same command continues" if job in ("train", "encode") else ""
            print(f"ditscale {job}: stopped{again}.", file=sys.stderr)
            sys.exit(130)
        except SweepFailedError as failure:
            print(f"ditscale {job}: error: {failure}", file=sys.stderr)
            sys.exit(failure.code)
        except Exception as error:
            with secrets_hidden(task.settings):
                _exit_with(job, error, wants_traceback)


def wants_help() -> bool:
    """Return whether a word of the command line asks for a job's help."""
    return any(word in HELP for word in sys.argv[1:])


def show_help(job: str) -> None:
    """Print a job's help, for which nothing of the job is imported."""
    from launch.command.help import help_of

    register()
    _print_to_its_reader(help_of(job))


def _print_to_its_reader(text: str) -> None:
    """Print a long text whose reader, such as ``| head``, may close the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would report an error at exit


def _exit_with(job: str, error: Exception, wants_traceback: bool) -> NoReturn:
    sentence = _sentence(job, error)
    if wants_traceback or sentence is None:
        exit_with_traceback(error)
    print(f"ditscale {job}: error: {sentence}", file=sys.stderr)
    print("(HYDRA_FULL_ERROR=1 shows the traceback)", file=sys.stderr)
    sys.exit(_code(error, sentence))


class _Task:
    """The function that Hydra calls for each run: in this process or, in a sweep of trainings, in a process per run.

    A single run stores its exception in ``error``, since Hydra would print more than one sentence about it. A run of a
    sweep prints its sentence at once and raises: the others continue, and the sweep names the failed ones at its end.
    """

    def __init__(self, job: str, function: JobFunction, settle: Settle | None, wants_traceback: bool) -> None:
        self.job = job
        self.row = 0
        self._function, self._settle = function, settle
        self._wants_traceback = wants_traceback
        self.error: Exception | None = None
        self.settings: Any = ()  # of the last run; they may hold secrets

    def __call__(self, config: DictConfig) -> None:
        self.settings = _settings_of(config)
        with secrets_hidden(self.settings):  # here too: a sweep's worker process does not pass through `run`
            self._call(config)

    def _call(self, config: DictConfig) -> None:
        try:
            self._run(config)
        except Exception as error:
            cause = _first_value_error(error) or error  # Hydra wraps what a constructor raises
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                sentence = _sentence(self.job, cause, self.settings) or f"{type(cause).__name__}: {cause}"
                print(f"ditscale {self.job}: {self.name(config)} failed: {sentence}", file=sys.stderr)
                raise cause from None
            self.error = cause

    def name(self, config: DictConfig) -> str:
        """Return the name of a run of a sweep, or its overrides where it has no name."""
        try:
            return str(config["name"])
        except OmegaConfBaseException:
            return str(HydraConfig.get().job.override_dirname)

    def exit_code(self, error: Exception) -> int:
        """Return the code for what a run raised. Shows the traceback where it is wanted, or no sentence says enough."""
        sentence = _sentence(self.job, error, self.settings)
        if self._wants_traceback or sentence is None:
            with secrets_hidden(self.settings):
                traceback.print_exception(error)
        return _code(error, sentence)

    def _run(self, config: DictConfig) -> None:
        check_known(config)
        if self._settle is not None:
            self._settle(config, list(HydraConfig.get().overrides.task))
        plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True, enum_to_str=True)  # type: ignore[assignment]
        check_finite(plain)
        with uncollected():  # imports the components
            check_targets(plain)
        settings = SETTINGS[self.job].of(plain)
        hydra_config: Any = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN:
            from launch.command.machine import take_gpu  # imports PyTorch, which --help does not need

            redact_file(Path(hydra_config.sweep.dir) / "multirun.yaml", plain)
            take_gpu(plain, Path(hydra_config.sweep.dir))
        is_main = os.environ.get("RANK", "0") == "0"
        self._function(settings, make_progress(plain.get("name", ""), self.row, is_main))


def _settings_of(config: DictConfig) -> Any:
    """Return the values of a config, unresolved where one of them cannot be resolved."""
    try:
        return OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException:
        return OmegaConf.to_container(config, resolve=False)


def _code(error: BaseException, sentence: str | None) -> int:
    """Return the exit code: 2 for a user's mistake, 1 for diverged training or a bug of the program."""
    return 1 if sentence is None or isinstance(error, FloatingPointError) else 2


def _sentence(job: str, error: BaseException, settings: Any = ()) -> str | None:
    """Return what to tell the user, or None for an error that is not theirs. ``settings`` are the job's."""
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
        return f"The GPU's memory is full{reason}; {less_memory(job, settings)}."
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
    """Return a sentence on an option that a group does not have, with the options that it has.

    Hydra lists a single folder, but experiments lie in subfolders, so they are listed here.
    """
    group, _, name = missing.rpartition("/")
    if group == "diffusion/guidance" and _CLASSIFIER_GUIDANCE.fullmatch(name):
        return (
            f"diffusion/guidance={name} would need a classifier of noisy images, as ADM-G does, which is out of this "
            f"program's scope. The options are: {', '.join(options)}."
        )
    if missing.startswith("experiment/"):
        group, name = "experiment", missing.removeprefix("experiment/")
        options = sorted(str(path.relative_to(CONF / group).with_suffix("")) for path in (CONF / group).rglob("*.yaml"))
    return f"There is no {name!r} in {group}{closest(name, options)} The options are: {', '.join(options)}."


def _explain_value(error: OmegaConfBaseException) -> str:
    if (missing := re.search(r"Missing mandatory value: (\S+)", str(error))) is not None:
        # OmegaConf gives the last part of the name, and the whole name of the setting that refers to it or is missing.
        section = str(getattr(error, "full_key", None) or "").rpartition(".")[0]
        name = f"{section}.{missing.group(1)}" if section and "." not in missing.group(1) else missing.group(1)
        return f"{name} is missing; give it as {name}=VALUE."
    key = getattr(error, "full_key", None) or "a setting"
    return f"{key}: {str(error).splitlines()[0]}."


def _explain_override(job: str, message: str) -> str:
    """Return a sentence that names the override that does not fit, and the closest setting or group."""
    typed = re.search(r"override (\S+?)=.* Value '(.*)' of type '\w+' could not be converted to (\w+)", message)
    if typed is not None:
        return f"{typed.group(1)} is {typed.group(2)!r}, but it must be of type {typed.group(3).lower()}."
    merged = re.search(r"override (\S+?)=.*? (Value .*|Invalid value.*?)\.? full_key", message)
    if merged is not None:
        return f"{merged.group(1)}: {merged.group(2)}."
    found = re.search(r"[Cc]ould not (?:override|append|delete)[^']*'([^']+)'", message)
    if found is None:
        return " ".join(message.split())
    key = key_of(found.group(1))
    settings, groups = valid_names(job)
    parent = key.rpartition("/")[0]
    is_of_another = parent in groups and (CONF / key).is_dir()  # a group that another option of the parent has
    if "override" in found.group() and (key in groups or is_of_another):
        return f"The option of {parent}=... has no {key}; leave {key} out."
    settings = _settings_with_choices(job, key, settings, groups)
    section, _, leaf = key.rpartition(".")
    there = [name.rpartition(".")[2] for name in settings if section and name.rpartition(".")[0] == section]
    if there and closest(leaf, there) == ".":
        return f"`ditscale {job}` has no setting {key!r}; {section} has {', '.join(there)}."
    others = [name for name in (*settings, *groups) if name != key]
    return f"`ditscale {job}` has no setting {key!r}{closest(key, others)}"


def _settings_with_choices(job: str, key: str, settings: list[str], groups: list[str]) -> list[str]:
    """Return the names of the settings that the command line's choices of options have.

    Of a sweep over options, those of the first option without ``key`` count.
    """
    words = [word for word in sys.argv[1:] if key_of(word) in groups or key_of(word) == "hydra.searchpath"]
    options: list[list[str]] = []
    for word in words:
        name, _, value = word.partition("=")
        swept = key_of(word) == key.partition(".")[0]
        options.append([f"{name}={one}" for one in value.split(",")] if swept else [word])
    for chosen in itertools.product(*options):
        try:
            found = _names_of_settings(default_config(job, chosen))
        except (HydraException, OmegaConfBaseException):
            continue
        if key not in found:
            return found
    return settings


def default_config(job: str, choices: Sequence[str] = ()) -> DictConfig:
    """Return a job's config as composed without any override but ``choices``, with Hydra's own section."""
    register()
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3", job_name=job):
        return hydra.compose(config_name=job, overrides=list(choices), return_hydra_config=True)


def valid_names(job: str) -> tuple[list[str], list[str]]:
    """Return the names of every setting and every config group of a job's default config."""
    config = default_config(job)
    groups = [str(group) for group in config.hydra.runtime.choices if not str(group).startswith("hydra/")]
    return _names_of_settings(config), groups


def _names_of_settings(config: DictConfig) -> list[str]:
    keys = _dotted_keys(OmegaConf.to_container(config))
    return [key for key in keys if not key.startswith("hydra") and "._" not in key]


def _dotted_keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for key, value in node.items():
        keys += [f"{prefix}{key}", *_dotted_keys(value, f"{prefix}{key}.")]
    return keys
