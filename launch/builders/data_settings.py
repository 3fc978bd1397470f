"""Take a job's data settings from its shards or checkpoint, where the command line does not give them.

`encode` writes ``data.json`` next to the manifest: the images and settings that the shards were encoded from. So
``ditscale train data.shards=shards/mine`` is enough. Without that file, all but the source follows from the manifest.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from core.atomic import write_bytes
from core.names import inside
from core.reading import DamagedFileError, read_regular, remedied
from core.records import parse_object, seal, unseal
from core.remote import is_remote, join, read_bytes
from core.urls import redacted_config
from data.manifest import FORMAT, LatentSpec, Manifest
from launch.builders.components import from_file, plain_value, target_of
from launch.command.app import CONF
from launch.command.settings import EncodeSettings
from launch.command.words import key_of

RECORD = "data.json"
SCALARS = ("name", "image_size", "apply_exif", "flip", "samples_per_shard")
COMPONENTS = ("source", "autoencoder", "crop")
OF_THE_JOB = ("seed", "batch_size", "max_skipped_fraction")  # of `encode`, besides `encoding`
_GROUPS = {"data/source": "source", "data/crop": "crop", "model/autoencoder": "autoencoder"}
_OF_AUTOENCODER = ("downscale", "channels", "scale", "shift", "precision")  # settings that the manifest has
_OPTIONAL = ("teacher", "captions", "text_encoder")  # components of `encode` that may be None
_EMBEDDINGS = "text_embeddings"  # a setting of `encode` that is written where it is true
_PATHS = (
    "root",
    "tars",
    "pretrained",
    "file",
    "folder",
    "tokenizer",
)  # settings that may be paths
_OVERRIDES = {  # the command-line override for a field of the manifest
    "source": "data.name={}",
    "image_size": "data.image_size={}",
    "crop": "data/crop={}",
    "apply_exif": "data.apply_exif={}",
    "flip": "data.flip={}",
}


def write_record(folder: Path, config: EncodeSettings) -> None:
    """Write an `encode` job's settings next to the manifest, so that users need not repeat them to other jobs."""
    plain = config.plain()
    data = plain["data"]
    source = {key: _absolute(key, value) for key, value in data["source"].items()}
    job = {key: plain[key] for key in (*OF_THE_JOB, "encoding")}
    for name in _OPTIONAL:
        if plain[name] is not None:  # else the file is as earlier versions wrote it
            job[name] = {key: _absolute(key, value) for key, value in plain[name].items()}
    if plain[_EMBEDDINGS]:
        job[_EMBEDDINGS] = True
    content = {
        "format_version": 1,
        "data": {**{key: data[key] for key in (*SCALARS, *COMPONENTS)}, "source": source},
        "encode": job,
    }
    write_bytes(folder / RECORD, json.dumps(seal(redacted_config(content)), indent=1).encode())


def _absolute(key: str, value: Any) -> Any:
    """Return an existing local path as an absolute path, and any other value unchanged."""
    is_path = key in _PATHS and isinstance(value, str) and not is_remote(value) and Path(value).exists()
    return str(Path(value).resolve()) if is_path else value


def settle_by_shards(config: DictConfig, words: list[str]) -> None:
    """Set the ``data`` settings that the command line leaves open to those of the shards in ``data.shards``.

    Changes ``config`` in place. Does nothing where there are no shards yet, which the job reports. Raises ValueError
    for a damaged record.
    """
    place = config.data.shards
    try:
        manifest = Manifest.load(place)
    except ValueError:
        return
    found, encoding = _of_manifest(manifest.spec), {}
    if (record := _read_record(place)) is not None:
        said_by = join(place, RECORD)
        found |= _data_of(record["data"], said_by)
        if "encoding" in config:
            encoding = _encoding_of(record["encode"], said_by)
        elif "encoder" in (config.get("condition") or ()) and "text_encoder" in record["encode"]:
            encoding = {"text_encoder": from_file(record["encode"]["text_encoder"], "text_encoder", said_by)}
    _set(config.data, found, _chosen(words))
    given = {key_of(word).split(".")[0] for word in words}
    for key, value in encoding.items():
        if key not in given and f"data/{key}" not in given:
            OmegaConf.update(config, key, value, merge=False, force_add=True)


def settle_by(config: DictConfig, words: list[str], data: Mapping[str, Any], said_by: str) -> None:
    """Set the ``data`` settings that the command line leaves open to those in the config of a checkpoint.

    A source at a URL is left out, so that a stranger's checkpoint cannot make a job access the network. Raises
    ValueError for a section that this project's configs cannot have.
    """
    found = _data_of(data, said_by)
    if any(isinstance(value, str) and is_remote(value) for value in found.get("source", {}).values()):
        del found["source"]
    if isinstance(shards := data.get("shards"), str) and not is_remote(shards):
        found["shards"] = plain_value(shards, "data.shards", said_by)
    _set(config.data, found, _chosen(words))


def _set(section: DictConfig, found: Mapping[str, Any], chosen: set[str]) -> None:
    for key, value in found.items():
        if key not in chosen:
            OmegaConf.update(section, key, value, merge=False, force_add=True)
    if section.source is not None and "split" in section.source:
        if "split" in chosen:
            section.source.split = section.split
        else:
            section.split = section.source.split


def _chosen(words: Iterable[str]) -> set[str]:
    """Return the keys of ``data`` that the command line sets. An experiment's choices do not count."""
    chosen: set[str] = set()
    for word in words:
        key = key_of(word).split("@")[0]
        if key == "data":
            chosen |= {*SCALARS, *COMPONENTS}
        elif key in _GROUPS:
            chosen.add(_GROUPS[key])
        elif key.startswith("data."):
            chosen.add(key.split(".")[1])
    return chosen


def _read_record(place: str) -> dict[str, Any] | None:
    """Return ``data.json`` of a folder or URL, or None if it does not exist, as with shards of earlier versions."""
    name = join(place, RECORD)
    with remedied("delete it, and give these settings on the command line"):
        try:
            text = read_bytes(name) if is_remote(place) else read_regular(inside(Path(place), RECORD, FORMAT))
        except FileNotFoundError:
            return None
        content = unseal(parse_object(text, name), name)
        if content.get("format_version") != 1 or not all(isinstance(content.get(k), dict) for k in ("data", "encode")):
            raise DamagedFileError(f"{name} is not of the format of this version.")
    return content


def _data_of(data: Mapping[str, Any], said_by: str) -> dict[str, Any]:
    found = {key: plain_value(data[key], f"data.{key}", said_by) for key in SCALARS if key in data}
    return found | {key: from_file(data[key], f"data.{key}", said_by) for key in COMPONENTS if key in data}


def _encoding_of(section: Mapping[str, Any], said_by: str) -> dict[str, Any]:
    stored = [_EMBEDDINGS] if _EMBEDDINGS in section else []
    found = {key: plain_value(section.get(key), key, said_by) for key in (*OF_THE_JOB, *stored)}
    found["encoding"] = from_file(section.get("encoding"), "encoding", said_by)
    return found | {name: from_file(section[name], name, said_by) for name in _OPTIONAL if name in section}


def _of_manifest(spec: LatentSpec) -> dict[str, Any]:
    """Return the settings that follow from the manifest alone."""
    found = {"name": spec.source, "image_size": spec.image_size, "apply_exif": spec.apply_exif, "flip": spec.flip}
    if (crop := _known("data/crop", spec.crop)) is not None:
        found["crop"] = crop
    if (autoencoder := _known("model/autoencoder", spec.autoencoder)) is not None:
        said = {key: getattr(spec, key) for key in _OF_AUTOENCODER if key in autoencoder}
        found["autoencoder"] = autoencoder | said
    return found


def _known(group: str, name: str) -> dict[str, Any] | None:
    """Return the section of a config group whose component has this name, as a setting or as a class, or None."""
    for path in sorted((CONF / group).glob("*.yaml")):
        section: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        if name == (section["name"] if "name" in section else target_of(section).name):
            return section
    return None


def require_shards(manifest: Manifest, expected: LatentSpec, place: str) -> None:
    """Raise ValueError unless shards fit the config. The message names overrides with which it fits them."""
    try:
        manifest.require(expected, place)
    except ValueError as error:
        words = [_OVERRIDES[key].format(getattr(manifest.spec, key)) for key in _differing(manifest.spec, expected)]
        hint = f"; to train on these: {' '.join(words)}" if words else ""
        raise ValueError(f"{str(error).rstrip('.')}{hint}.") from None


def _differing(spec: LatentSpec, expected: LatentSpec) -> list[str]:
    return [
        key for key in _OVERRIDES if getattr(spec, key) != getattr(expected, key) and not (key == "flip" and spec.flip)
    ]
