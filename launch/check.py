"""Checks of a composed config before anything is built."""

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hydra.utils import get_object
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import SchemaError

# Checkpoints carry a config; what it may build is limited to our rooms and PyTorch's optimizers.
TRUSTED_ROOTS = ("data.", "diffusion.", "evaluation.", "model.", "runtime.", "train.", "torch.optim.")


def closest(name: str, candidates: Iterable[str]) -> str:
    """End of a sentence on an unknown name: "; did you mean 'x'?" where something similar exists, else "."."""
    found = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else "."


def check_targets(config: Mapping[str, Any], path: str = "", trusted_only: bool = False) -> None:
    """Walk every ``_target_``: each key must be a parameter of it, each scalar of the parameter's type.

    ``trusted_only`` refuses targets outside our rooms, for configs that come out of a file. Raises ValueError
    with the closest valid name.
    """
    if "_target_" in config:
        _check_target(config, path, trusted_only)
    for key, value in config.items():
        if isinstance(value, Mapping):
            check_targets(value, f"{path}{key}.", trusted_only)


def _check_target(config: Mapping[str, Any], path: str, trusted_only: bool) -> None:
    name = config["_target_"]
    if trusted_only and not str(name).startswith(TRUSTED_ROOTS):
        raise ValueError(f"{path}_target_ is {name!r}, which a checkpoint may not ask for; it is not loaded.")
    try:
        target = get_object(name)
    except Exception as error:  # hydra raises several kinds, ImportError of the target's module among them
        raise ValueError(f"{path}_target_ is {name!r}, which cannot be imported: {error}") from error
    parameters, hints = inspect.signature(target).parameters, _hints(target)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in parameters and not takes_any:
            raise ValueError(f"{name} has no setting {path}{key}{closest(key, parameters)}")
        if isinstance(value, str | int | float | bool) and key in hints:
            _check_type(f"{path}{key}", value, hints[key])


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Parameter types of a class or function; what cannot be resolved is not checked."""
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        return {}


def _check_type(name: str, value: Any, hint: Any) -> None:
    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, SchemaError):  # no type that pydantic can judge, such as a Protocol
        return
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(f"{name} is {value!r}, but {error.errors()[0]['msg'].lower()}.") from error


def check_train_scalars(config: Mapping[str, Any]) -> None:
    """Run scalars that must fit each other. Raises ValueError with both numbers."""
    for key in ("total_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
        if config[key] < 1:
            raise ValueError(f"{key} is {config[key]}, but it must be at least 1; set it higher.")
    if config["checkpoint_every"] % config["log_every"]:
        raise ValueError(
            f"checkpoint_every {config['checkpoint_every']} is no multiple of log_every {config['log_every']}, "
            "so a resumed run would log other means; change one of them."
        )
    if not 0 <= config["class_dropout"] <= 1:
        raise ValueError(
            f"class_dropout is {config['class_dropout']}, but it is a fraction between 0 and 1; the paper uses 0.1."
        )


def check_weights_name(weights: str) -> None:
    """Raises ValueError unless ``weights`` names one of a checkpoint's two sets."""
    if weights not in ("ema", "model"):
        raise ValueError(f"weights is {weights!r}, but a checkpoint has 'ema' and 'model'; choose one.")
