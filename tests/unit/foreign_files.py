"""Make weights of other programs for tests, in every container format."""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from test_model import golden_model, tiny, trained
from torch import Tensor

from model.blocks import AdaLNZeroBlock
from model.diffusers_weights import to_diffusers
from model.dit import DiT

HEADS = "foreign.num_heads=4"  # of the golden network, whose width is none of the paper's
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def released_weights() -> dict[str, Tensor]:
    """Return the golden network's weights under the released code's names: 10 classes, 4 latent channels, side 8."""
    golden = golden_model()[1]
    return {name.removeprefix("weights/"): golden[name] for name in golden if name.startswith("weights/")}


def zeros_like(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros of the same shapes, which must not be read, with the fixed position embedding."""
    return {name: value if name == "pos_embed" else torch.zeros_like(value) for name, value in weights.items()}


def prefixed(prefix: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in weights.items()}


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def random_model(frequency_shift: int = 0) -> DiT:
    model = tiny(frequency_shift=frequency_shift)
    model.load_state_dict(trained(AdaLNZeroBlock).state_dict())
    return model


def assert_same_weights(one: DiT, two: DiT) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def hub_cache(root: Path, name: str, model: DiT) -> Path:
    """Write a cache of the hub with a DiT as a pipeline of diffusers."""
    to_diffusers(model, root / "written")
    return hub_cache_of(root, name, root / "written")


def hub_cache_of(root: Path, name: str, written: Path) -> Path:
    """Move a folder into a cache of the hub as its documentation defines it: refs, links, blobs named by their hash."""
    repository = root / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    for path in sorted(file for file in written.rglob("*") if file.is_file()):
        content = path.read_bytes()
        of_git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        blob = hashlib.sha256(content).hexdigest() if path.suffix == ".safetensors" else of_git
        (repository / "blobs").mkdir(exist_ok=True)
        (repository / "blobs" / blob).write_bytes(content)
        link = repository / "snapshots" / COMMIT / path.relative_to(written)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (len(link.relative_to(repository).parts) - 1)) / "blobs" / blob)
    shutil.rmtree(written)
    return repository


def change_json(path: Path, **changes: object) -> None:
    """Change values of a JSON object; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
