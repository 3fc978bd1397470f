"""Plan which image goes into which shard, before anything is encoded."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from core.draws import Philox, Purpose, permutation
from core.records import canonical_hash
from data.autoencoder_identity import AutoencoderIdentity
from data.images import Preparation
from data.manifest import FORMAT_VERSION, LatentSpec, TeacherSpec, TextSpec
from data.sources import Source
from data.unread import LeftOut
from model.autoencoder import Autoencoder


def identity_of(autoencoder: Autoencoder) -> AutoencoderIdentity:
    """Return the fields of an autoencoder that the spec of its latents records."""
    return AutoencoderIdentity(*(getattr(autoencoder, name) for name in AutoencoderIdentity._fields))


def latent_spec(
    name: str, num_classes: int, autoencoder: Autoencoder, preparation: Preparation, flip: bool
) -> LatentSpec:
    """Return the spec of the latents that this autoencoder makes from the data set ``name``.

    Raises ValueError where the image size is not a multiple of the autoencoder's downscale factor.
    """
    image_size, factor = preparation.image_size, autoencoder.downscale
    if image_size % factor:
        raise ValueError(
            f"data.image_size {image_size} is not a multiple of {factor}, the downscale factor of the autoencoder "
            f"{autoencoder.name}; use {max(1, image_size // factor) * factor}."
        )
    return LatentSpec(
        source=name,
        image_size=image_size,
        autoencoder=autoencoder.name,
        autoencoder_revision=autoencoder.revision,
        scale=autoencoder.scale,
        downscale=autoencoder.downscale,
        channels=autoencoder.channels,
        dtype="float16",
        flip=flip,
        num_classes=num_classes,
        shift=autoencoder.shift,
        precision=autoencoder.precision,
        crop=preparation.crop.name,
        apply_exif=preparation.apply_exif,
    )


@dataclass(frozen=True)
class Plan:
    """An assignment of images to rows, and of rows to shards."""

    spec: LatentSpec
    class_names: list[str]
    order: NDArray[np.int64]  # source index of each row: classes mixed by a fixed permutation
    samples_per_shard: int
    seed: int
    source_fingerprint: str
    left_out: tuple[LeftOut, ...] = ()  # files of the source without a row; not part of the plan's identity
    teacher: TeacherSpec | None = None  # whose features are stored
    text: TextSpec | None = None  # whose token ids of captions are stored
    embeddings: bool = False  # whether its embeddings of captions are stored too

    @classmethod
    def of(
        cls,
        source: Source,
        spec: LatentSpec,
        samples_per_shard: int,
        seed: int,
        teacher: TeacherSpec | None = None,
        text: TextSpec | None = None,
        embeddings: bool = False,
    ) -> "Plan":
        """Return the plan of a source: a function of its listing and of what is stored."""
        order = encoding_order(Philox(seed), len(source), source.block_sizes, samples_per_shard)
        left_out = tuple(source.left_out)
        names, fingerprint = source.class_names, source.fingerprint
        return cls(spec, names, order, samples_per_shard, seed, fingerprint, left_out, teacher, text, embeddings)

    @property
    def hash(self) -> str:
        """Return the identity of the plan; shards of another plan are never reused."""
        content = {"version": FORMAT_VERSION, "spec": asdict(self.spec), "seed": self.seed}
        content |= {"source": self.source_fingerprint, "samples_per_shard": self.samples_per_shard}
        if self.teacher is not None:
            content["teacher"] = asdict(self.teacher)
        if self.text is not None:
            content["text"] = asdict(self.text)
        if self.embeddings:
            content["embeddings"] = True
        return canonical_hash(content, spaced=True)

    @cached_property
    def num_images_left_out(self) -> int:
        """Return the number of images of the source that have no row."""
        return sum(entry.is_image for entry in self.left_out)

    @property
    def num_shards(self) -> int:
        """Return the number of shards; the last may be smaller."""
        return -(-len(self.order) // self.samples_per_shard)

    def rows(self, shard: int) -> range:
        """Return the rows of a shard; a row's number is the key of its sample."""
        return range(shard * self.samples_per_shard, min((shard + 1) * self.samples_per_shard, len(self.order)))


def encoding_order(
    philox: Philox, num_images: int, block_sizes: Sequence[int] | None, samples_per_shard: int
) -> NDArray[np.int64]:
    """Return the source index of each row: a permutation, so that a reader that streams shards gets mixed classes.

    For a source that is read in blocks, the blocks are permuted, and then the images within runs of blocks of about a
    shard's size. A shard thus needs few blocks and still mixes the images of several.
    """
    if block_sizes is None:
        return permutation(philox, 0, Purpose.ENCODING_ORDER, num_images)
    firsts = np.concatenate([[0], np.cumsum(block_sizes)])
    windows: list[list[NDArray[np.int64]]] = [[]]
    for block in permutation(philox, 0, Purpose.ENCODING_ORDER, len(block_sizes)):
        if sum(map(len, windows[-1])) >= samples_per_shard:
            windows.append([])
        windows[-1].append(np.arange(firsts[block], firsts[block + 1]))
    mixed = []
    for number, window in enumerate(windows):
        rows = np.concatenate(window) if window else np.empty(0, dtype=np.int64)
        mixed.append(rows[permutation(philox, number + 1, Purpose.ENCODING_ORDER, len(rows))])
    return np.concatenate(mixed)


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:06d}.tar"
