"""Define the settings of the section ``data`` of a config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from core.fields import MUST_BE_GIVEN, Settings, free, positive


@dataclass
class DataSettings(Settings):
    """The settings of a data set: its images, and the shards of their latents."""

    section: ClassVar[str] = "data"

    source: Any = free()
    autoencoder: Any = MUST_BE_GIVEN
    crop: Any = MUST_BE_GIVEN
    name: str = MUST_BE_GIVEN
    split: str | None = free(None)  # of a source that has splits: train or test
    image_size: int = positive()  # pixels
    apply_exif: bool = MUST_BE_GIVEN  # rotate images as their EXIF data say
    flip: bool = MUST_BE_GIVEN  # train on mirrored images too
    shards: str = free()  # folder, or a URL to read from: s3://, gs://, http(s)://
    order: Any = None  # of the samples in training
    normalize: bool = False  # bring each channel of the latents to mean 0 and standard deviation 1
    latent_mean: list[float] | None = None  # of unscaled latents, by channel; null: the shards', which a run records
    latent_std: list[float] | None = None  # likewise
    cache: str = free("cache/shards")  # folder on a local disk for shards that are read from a URL
    cache_bytes: int = positive(32 * 2**30, free=True)  # largest size of the cache
    samples_per_shard: int = positive(free=True)
    verify_checksums: bool = free()  # read every shard once at the start

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.split is None or not isinstance(self.source, Mapping):  # a replay's config has no source
            return
        if (own := self.source.get("split")) != self.split:
            found = "has no splits; leave data.split out" if own is None else f"has {own}; leave data.source.split out"
            raise ValueError(f"data.split is {self.split}, but data.source {found}.")
