"""Features of a small classifier that this job trains itself: for data that Inception says nothing of."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.atomic import atomic_folder
from data.images import Crop, to_unit_range
from data.reading import sha256_of
from data.sources import Source, load_images
from diffusion.draws import Philox, Purpose, permutation
from evaluation.features import Features


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
        """[B, C, H, W] in [-1, 1] -> features [B, D] and logits [B, K]."""
        features = torch.relu(self.hidden(self.convolutions(images)))
        return features, self.classes(features)


class ClassifierFeatures:
    """A `FeatureExtractor`: trains a classifier on 4/5 of a source's images, or takes it from ``cache``.

    Images are cropped as for encoding. The cached folder's name is a hash of images, labels and hyperparameters. The
    held-out fifth gives ``facts["classifier_accuracy"]``.
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
    ) -> None:
        self.title = f"{source.name} classifier features"
        images, labels = load_images(source, image_size, crop, apply_exif)
        num_classes = len(source.class_names)
        options = {"num_features": num_features, "epochs": epochs, "batch_size": batch_size, "lr": lr}
        identity = hashlib.sha256(json.dumps([options, seed, num_classes], sort_keys=True).encode())
        identity.update(images.tobytes())
        identity.update(labels.tobytes())
        self._network = SmallClassifier(image_size, images.shape[3], num_classes, num_features)
        folder = Path(cache) / f"classifier-{identity.hexdigest()[:16]}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # runs of a sweep wait for the first to train it
            if not folder.exists():
                _train_into(folder, self._network, images, labels, epochs, batch_size, lr, seed)
        self._network.load_state_dict(load_file(folder / "model.safetensors"))
        self._network.eval()
        self.facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
        self.hash = sha256_of(folder / "model.safetensors")

    def to(self, device: torch.device) -> None:
        """Stays on the CPU: so small that moving it saves nothing, and its numbers are the same on every machine."""

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> Features:
        """[B, H, W, C] uint8 -> [B, D] float32 and the most likely classes."""
        vectors, logits = self._network(to_unit_range(images))
        return Features(vectors.numpy(), logits.argmax(dim=1).numpy())


def _train_into(
    folder: Path,
    network: SmallClassifier,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
) -> None:
    """Train, measure on what was held out, and write weights and facts as one folder."""
    philox = Philox(seed)
    order = permutation(philox, 0, Purpose.SPLIT, len(images))
    held_out, training = np.split(order, [len(order) // 5])
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
        found = network(pixels[held_out])[1].argmax(dim=1)
    accuracy = (found == targets[held_out]).double().mean().item()
    facts: dict[str, Any] = {"classifier_accuracy": accuracy, "classifier_held_out": len(held_out)}
    with atomic_folder(folder) as aside:
        save_file(network.state_dict(), aside / "model.safetensors")
        (aside / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def _initialize(network: nn.Module, seed: int) -> None:
    """Kaiming-uniform weights from one generator, whatever was drawn before in this process."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            nn.init.kaiming_uniform_(parameter, nonlinearity="relu", generator=generator)
        else:
            nn.init.zeros_(parameter)
