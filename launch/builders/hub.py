"""Find models of the Hugging Face hub by name, in its cache or downloaded into it, and check their files' hashes."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path

from core.reading import DamagedFileError, open_regular, sha256_of

_NAME = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([0-9a-f]{40}))?", re.ASCII)
_STEM = "diffusion_pytorch_model"
_FILES = ["config.json", f"{_STEM}.safetensors", f"{_STEM}-*-of-*.safetensors", f"{_STEM}.safetensors.index.json"]
_OF_PARTS = [f"{part}/{file}" for part in ("transformer", "unet") for file in _FILES]
PATTERNS = ["model_index.json", "scheduler/scheduler_config.json", *_FILES, *_OF_PARTS]
_TEXT, _TABLES = "text_encoder", "tokenizer"  # folders of a pipeline
_OF_TEXT = ["config.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
_OF_TABLES = ["vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json"]
_OF_TABLES += ["special_tokens_map.json", "added_tokens.json"]
TEXT_PATTERNS = [*_OF_TEXT, *_OF_TABLES, *(f"{_TEXT}/{file}" for file in _OF_TEXT)]
TEXT_PATTERNS += [f"{_TABLES}/{file}" for file in _OF_TABLES]


def may_be_hub_name(where: str) -> bool:
    """Return whether a text has the form ORGANIZATION/NAME or ORGANIZATION/NAME@COMMIT, 40 hexadecimal digits.

    A local path that exists is never taken for one.
    """
    return _NAME.fullmatch(where) is not None


def names_hub(where: str) -> bool:
    """Return whether a text has the form of a name of the hub, and no local path of that name exists."""
    return may_be_hub_name(where) and not os.path.lexists(where)


def at_commit(name: str, commit: str) -> str:
    """Return a name of the hub that means one commit, whatever is published under the name later."""
    return f"{name.partition('@')[0]}@{commit}"


def fetch_from_hub(name: str) -> Path:
    """Return the local folder of a model in the hub's cache, after downloading files that are missing there.

    Only a network's safetensors and its configs are downloaded, nothing that could run code. Raises ValueError
    where the hub does not know the name, or where the hub cannot be reached and the cache does not have the model.
    """
    return _fetched(name, PATTERNS)


def fetch_text_encoder(name: str) -> tuple[Path, str]:
    """Return the folder of a text encoder in the hub's cache, and its commit, after downloading what is missing.

    The model is an encoder itself, or a pipeline that has one. Only its safetensors, its config and the tables of its
    tokenizer are downloaded, and all are checked against the hub's hashes. Raises as `fetch_from_hub`, and
    DamagedFileError.
    """
    folder = _fetched(name, TEXT_PATTERNS)
    inner = folder / _TEXT if (folder / _TEXT).is_dir() else folder
    tables = folder / _TABLES if (folder / _TABLES).is_dir() else folder
    for file in sorted({*inner.glob("*"), *tables.glob("*")}):
        if any(file.match(pattern) for pattern in (*_OF_TEXT, *_OF_TABLES)):
            require_whole(file)
    return inner, folder.name


def _fetched(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    said = _NAME.fullmatch(name)
    repository, commit = (name, None) if said is None else said.groups()
    try:
        return Path(snapshot_download(repository, revision=commit, allow_patterns=list(patterns)))
    except Exception as error:  # of several HTTP libraries, whose exceptions share no class
        raise ValueError(
            f"{name} is neither a file or folder here nor a model of the Hugging Face hub that can be read "
            f"({_reason(error)}); give a path that exists, or a name that the hub or its cache has."
        ) from None


def in_hub_cache(path: Path) -> bool:
    """Return whether a file is a link into the blobs of the hub's cache."""
    return path.resolve().parent.name == "blobs"


def require_whole(path: Path) -> None:
    """Raise DamagedFileError where a file of the hub's cache does not have the hash in its name there.

    The cache names a file in ``blobs/`` by its SHA-256, or a small one by its Git hash.
    """
    if not in_hub_cache(path):
        return
    blob = path.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", blob.name):
        found = sha256_of(blob)
    elif re.fullmatch(r"[0-9a-f]{40}", blob.name):
        with open_regular(blob) as file:
            content = file.read()
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        return
    if found != blob.name:
        raise DamagedFileError(f"{path} is damaged: its hash is {found}, but the hub's is {blob.name}; delete {blob}.")


def _reason(error: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "its owner asks for an agreement first: accept it on its page and log in"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such public model"
    if isinstance(error, HFValidationError):
        return "it is not a name that the hub allows"
    if isinstance(error, LocalEntryNotFoundError):
        away = "the hub is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
        return f"{away}, and its cache {constants.HF_HUB_CACHE} does not have it"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
