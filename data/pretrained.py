"""Load networks from folders of transformers, read as untrusted files: no code of a folder runs.

`built` makes a model of a class that the caller chooses, from a config whose fields were checked one by one and from
safetensors; transformers itself opens neither file.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from core.names import plain_name
from core.reading import DamagedFileError, read_regular, require_regular
from core.records import parse_object, validate

CONFIG, WEIGHTS, WEIGHTS_INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_MOST_INDEX_BYTES = 2**25
Fields = TypeVar("Fields")


def require_files(folder: Path | str, what: str, remedy: str) -> list[Path]:
    """Return the paths of the config and of the weights, of which a large model has several files.

    Raises ValueError, which ends with ``remedy``, where one is missing or no regular file.
    """
    folder = Path(folder)
    try:
        require_regular(folder / CONFIG)
        names = [WEIGHTS]
        if not (folder / WEIGHTS).exists() and (folder / WEIGHTS_INDEX).exists():
            names = _names_in_index(folder / WEIGHTS_INDEX, what)
        for name in names:
            require_regular(folder / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"There is no {error.filename}; {remedy}") from None
    return [folder / name for name in (CONFIG, *names)]


def _names_in_index(path: Path, what: str) -> list[str]:
    """Return the names of the files of weights that an index lists, without duplicates."""
    try:
        names = json.loads(read_regular(path, _MOST_INDEX_BYTES))["weight_map"].values()
        return sorted({plain_name(name, str(path)) for name in names})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} does not list the weights of a {what} ({error}); copy it again.") from None


def read_config(path: Path, fields: type[Fields], kinds: Mapping[str, str | None], what: str) -> Fields:
    """Return the fields of a ``config.json`` that ``fields``, a dataclass, names; no others are used.

    ``kinds`` has the accepted values of ``model_type``, each with the section that has the fields, or None for the
    file itself. Raises ValueError for another model, and for fields that are missing or of other values.
    """
    try:
        content = parse_object(read_regular(path), str(path))
    except DamagedFileError as error:
        raise ValueError(f"{path} is not the JSON of a model ({error}); copy it again.") from None
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(
            f"{path} is of a {str(kind)[:80]}, not of a {' or '.join(kinds)}; name the folder of a {what}."
        )
    if (section := kinds[kind]) is not None:
        inner = content.get(section)
        if not isinstance(inner, dict):
            raise DamagedFileError(f"{path} is damaged: it has no section {section}.")
        content = inner
    names = getattr(fields, "__dataclass_fields__", ())
    return validate(fields, {name: content[name] for name in names if name in content}, str(path))


def require_heads(path: Path, hidden_size: int, num_attention_heads: int) -> None:
    """Raise DamagedFileError where the heads of a config do not divide the width, which transformers asserts."""
    if hidden_size % num_attention_heads:
        raise DamagedFileError(
            f"{path} is damaged: hidden_size {hidden_size} is not a multiple of num_attention_heads "
            f"{num_attention_heads}."
        )


def read_weights(paths: Sequence[Path], what: str) -> dict[str, Tensor]:
    """Return the tensors of files. Raises ValueError where one is damaged, not of numbers, or not finite."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        try:
            found: dict[str, Tensor] = load_file(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{path} does not hold a readable {what} ({reason}); copy it again.") from None
        for name, value in found.items():
            if name.endswith("position_ids"):  # of earlier versions of transformers: a range, which is not learned
                continue
            if not value.is_floating_point():
                raise DamagedFileError(f"{path} has {name} of {value.dtype}, but weights are floating-point.")
            if not value.isfinite().all():
                raise DamagedFileError(f"{path} has values that are not finite in {name}; copy it again.")
            tensors[name] = value
    return tensors


def built(
    model_class: Any, config: Any, tensors: Mapping[str, Tensor], path: Path, what: str, **settings: Any
) -> nn.Module:
    """Return a model of a class of transformers with these weights, which ``path`` holds; others are left out.

    Raises ValueError where weights are missing, or have other shapes than the config asks for.
    """
    with torch.device("meta"):
        wanted = sum(value.numel() for value in model_class(config).state_dict().values())
    if wanted > 2 * (held := sum(value.numel() for value in tensors.values())):
        raise DamagedFileError(
            f"{path} holds {held} numbers, but its config asks for {wanted}; copy both files from one model."
        )
    try:
        with _silent():
            both: Any = model_class.from_pretrained(
                None,
                config=config,
                state_dict=dict(tensors),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, in one sentence
                **{"dtype": torch.float32, **settings},
            )
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} does not hold a readable {what} ({reason}); copy both files again.") from error
    model, loaded = both
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} of the weights of its config, {missing[0]} among them; copy both files from "
            "one model."
        )
    if wrong := sorted(loaded["mismatched_keys"], key=str):
        name, theirs, ours = wrong[0]
        raise ValueError(
            f"{path} has {name} of shape {list(theirs)}, but its config asks for {list(ours)}; copy both files "
            "from one model."
        )
    assert isinstance(model, nn.Module)
    return model


def transformers_for(what: str) -> Any:
    """Return the module transformers, which takes seconds to import. Raises ValueError where it is not installed."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"{what} needs transformers, which is not installed; run `pip install transformers`."
        ) from error
    return transformers


@contextmanager
def _silent() -> Iterator[None]:
    """Keep transformers from printing a bar and a table of what it loads."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()
