"""Find models of the Hugging Face hub by name, in its cache or downloaded into it, and check their files' hashes."""

import hashlib
import re
from pathlib import Path

from core.reading import DamagedFileError, open_regular, sha256_of

_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_STEM = "diffusion_pytorch_model"
_FILES = ["config.json", f"{_STEM}.safetensors", f"{_STEM}-*-of-*.safetensors", f"{_STEM}.safetensors.index.json"]
_OF_PARTS = [f"{part}/{file}" for part in ("transformer", "unet") for file in _FILES]
PATTERNS = ["model_index.json", "scheduler/scheduler_config.json", *_FILES, *_OF_PARTS]


def may_be_hub_name(where: str) -> bool:
    """Return whether a text has the form ORGANIZATION/NAME. A local path that exists is never taken for one."""
    return _NAME.fullmatch(where) is not None


def fetch_from_hub(name: str) -> Path:
    """Return the local folder of a model in the hub's cache, after downloading files that are missing there.

    Only a network's safetensors and its configs are downloaded, nothing that could run code. Raises ValueError
    where the hub does not know the name, or where the hub cannot be reached and the cache does not have the model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=PATTERNS))
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
