"""Compute features with a small classifier that this job trains, for data that Inception features do not suit."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor, nn

from core.atomic import atomic_folder, write_bytes
from core.draws import Philox, Purpose, permutation
from core.locks import locked
from core.reading import DamagedFileError, is_regular, read_regular, sha256_of
from core.records import canonical_hash, read_record, seal
from data.images import Crop, to_unit_range
from data.sources import Source, load_images
from evaluation.features.extractor import Features
from evaluation.kept import Sha256, unless_damaged
from train.tensor_files import write_tensors

_FORMAT = 2  # of the cached folder
_WEIGHTS, _FACTS = "model.safetensors", "facts.json"
_MOST_BYTES = 2**30  # of its weights
_PIXELS_AT_ONCE = 2**20
_OTHERWISE = "choose other evaluation/features, which are not trained on these images"

Images = tuple[NDArray[np.uint8], NDArray[np.int64]]  # with their labels


@dataclass(frozen=True)
class _Facts:
    """The record of a cached classifier, ``facts.json``."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    identity: Sha256  # of images, labels and hyperparameters
    weights_sha256: Sha256
    classifier_accuracy: Annotated[float, Field(ge=0, le=1)]
    classifier_held_out: Annotated[int, Field(ge=1)]


class SmallClassifier(nn.Module):
    """Two convolutions and two linear maps; the features are the hidden vector after its ReLU."""

    def __init__(self, image_size: int, channels: int, num_classes: int, num_features: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(64 * (image_size // 2) ** 2, num_features)
        self.classes = nn.Linear(num_features, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, C, H, W] in [-1, 1] to features [B, D] and logits [B, num_classes]."""
        features = torch.relu(self.hidden(self.convolutions(images)))
        return features, self.classes(features)


class ClassifierFeatures:
    """A `FeatureExtractor` that trains a classifier on 4/5 of a source's images, or loads it from ``cache``.

    Images are cropped as for encoding. The cached folder's name is a hash of images, labels and hyperparameters; if it
    is damaged, the same classifier is trained again. ``facts["classifier_accuracy"]`` is that on the held-out fifth.
    With a ``test_source``, it trains on all images of ``source``, and the accuracy is that on those of the other.
    Raises ValueError where the two have other classes or channels.
    """

    def __init__(
        self,
        source: Source,
        image_size: int,
        cache: str,
        crop: Crop | None = None,
        apply_exif: bool = False,
        num_features: int = 64,
        epochs: int = 30,
        batch_size: int = 64,
        lr: float = 1e-3,
        seed: int = 0,
        test_source: Source | None = None,
    ) -> None:
        self.title = f"{source.name} classifier features"
        images, labels = load_images(source, image_size, crop, apply_exif, _OTHERWISE)
        num_classes = len(source.class_names)
        options = {"num_features": num_features, "epochs": epochs, "batch_size": batch_size, "lr": lr}
        settings, content = [_FORMAT, options, seed, num_classes], [images.tobytes(), labels.tobytes()]
        test = None
        if test_source is not None:
            loaded = load_images(test_source, image_size, crop, apply_exif, _OTHERWISE)
            test = _test_images(test_source, source, loaded, images.shape[3])
            settings.append("test source")
            content += [part.tobytes() for part in test]
        identity = canonical_hash(settings, spaced=True, then=content)
        self._network = SmallClassifier(image_size, images.shape[3], num_classes, num_features)
        self._channels = images.shape[3]
        folder = Path(cache) / f"classifier-{identity[:16]}"
        with locked(folder.with_suffix(".lock")):  # runs of a sweep wait until the first one has trained it
            facts = unless_damaged(lambda: _read(folder, identity, self._network))
            if facts is None:
                accuracy, held_out = _train(self._network, images, labels, test, epochs, batch_size, lr, seed)
                facts = _write(folder, identity, self._network, accuracy, held_out)
        self._network.eval()
        self.facts = {name: value for name, value in asdict(facts).items() if name.startswith("classifier_")}
        self.hash = facts.weights_sha256

    def to(self, device: torch.device) -> None:
        """Do nothing: the network stays on the CPU, where it is fast enough and exact on every machine."""

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """Map images [B, H, W, C] uint8 to features [B, D] float32 and the most likely classes [B]."""
        if images.shape[3] == 1:  # generated images have one channel, gray images of a source three equal ones
            images = images.repeat(self._channels, axis=3)
        vectors, logits = _in_parts(self._network, to_unit_range(images))
        return Features(vectors.numpy(), logits.argmax(dim=1).numpy())


def _test_images(test_source: Source, source: Source, images: Images, channels: int) -> Images:
    """Return the images of a test source. Raises ValueError where its classes or channels are not those trained on."""
    if list(test_source.class_names) != list(source.class_names):
        raise ValueError(
            f"evaluation.features.test_source has {len(test_source.class_names)} classes, but "
            f"evaluation.features.source {len(source.class_names)}, or of other names; give two splits of one data set."
        )
    if images[0].shape[3] != channels:
        raise ValueError(
            f"evaluation.features.test_source has images of {images[0].shape[3]} channels, but "
            f"evaluation.features.source of {channels}; give two splits of one data set."
        )
    return images


def _read(folder: Path, identity: str, network: SmallClassifier) -> _Facts:
    """Load the weights of a cached folder into the network, and return its record.

    Raises the OSErrors of `open`, and DamagedFileError where a file was changed or belongs to another classifier.
    """
    folder.lstat()
    for name in (_FACTS, _WEIGHTS):
        if not is_regular(folder / name):
            raise DamagedFileError(f"{folder} has no file {name}, or none that can be read.")
    facts, path = read_record(folder / _FACTS, _Facts), folder / _WEIGHTS
    if facts.identity != identity:
        raise DamagedFileError(f"{folder / _FACTS} is of other images or settings: it has identity {facts.identity}.")
    content = read_regular(path, _MOST_BYTES)
    if (found := hashlib.sha256(content).hexdigest()) != facts.weights_sha256:
        raise DamagedFileError(f"{path} is damaged: it has sha256 {found}, but {_FACTS} says {facts.weights_sha256}.")
    try:
        tensors = load(content)
        network.load_state_dict(tensors)
    except (SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise DamagedFileError(f"{path} is damaged: {str(error).splitlines()[0]}.") from None
    if not all(value.dtype == torch.float32 and value.isfinite().all() for value in tensors.values()):
        raise DamagedFileError(f"{path} is damaged: it holds values that are not finite float32 numbers.")
    return facts


def _write(folder: Path, identity: str, network: SmallClassifier, accuracy: float, held_out: int) -> _Facts:
    """Write weights and record as one folder, replacing a folder of this name."""
    with atomic_folder(folder) as aside:
        with open(aside / _WEIGHTS, "wb") as file:
            write_tensors(file, network.state_dict())
        facts = _Facts(identity, sha256_of(aside / _WEIGHTS), accuracy, held_out)
        write_bytes(aside / _FACTS, json.dumps(seal(asdict(facts))).encode())
    return facts


def _train(
    network: SmallClassifier,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    test: Images | None,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> tuple[float, int]:
    """Train the network, and return the accuracy on held-out (or test) images and their number."""
    philox = Philox(seed)
    order = permutation(philox, 0, Purpose.SPLIT, len(images))
    held_out, training = np.split(order, [len(order) // 5 if test is None else 0])
    if test is None and not len(held_out):
        raise ValueError(f"A classifier needs at least 5 images, but there are {len(images)}; choose other features.")
    test_images, test_labels = (images[held_out], labels[held_out]) if test is None else test
    pixels, targets = to_unit_range(images), torch.from_numpy(labels)
    _initialize(network, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=lr)
    for epoch in range(epochs):
        shuffled = training[permutation(philox, epoch + 1, Purpose.SPLIT, len(training))]
        for rows in torch.from_numpy(shuffled).split(batch_size):
            loss = nn.functional.cross_entropy(network(pixels[rows])[1], targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found = _in_parts(network, to_unit_range(test_images))[1].argmax(dim=1)
    return (found == torch.from_numpy(test_labels)).double().mean().item(), len(test_labels)


def _in_parts(network: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Apply the network to parts of the images: the hidden layers of 10,000 images of 28x28 pixels take gigabytes."""
    at_once = max(1, _PIXELS_AT_ONCE // math.prod(images.shape[2:]))
    features, logits = zip(*(network(part) for part in images.split(at_once)), strict=True)
    return torch.cat(features), torch.cat(logits)


def _initialize(network: nn.Module, seed: int) -> None:
    """Initialize weights Kaiming-uniformly from a generator of their own, independent of earlier draws."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
