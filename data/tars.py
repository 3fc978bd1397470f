"""Read webdataset tars: index the samples in one pass over the headers, then read any sample by its offset.

The sources of images and of latents that another program encoded are at the end.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.records import canonical_hash
from data.files import MAX_FILE_BYTES, given
from data.images import UnreadableImageError
from data.named_files import named_files
from data.sources import Example
from data.tar_members import Member, read_tar
from data.unread import LFS_REASON, LeftOut, is_lfs_pointer

READ_AHEAD_BYTES = 4 * 2**20  # for a remote tar, whose headers lie between the images


class TarIndex:
    """The samples ``KEY.SUFFIX`` with labels ``KEY.cls`` of every tar of ``tars``, in order.

    ``tars`` is a folder, one tar, or a pattern with braces or ``*`` as in webdataset
    (``s3://bucket/train-{0000..1023}.tar``). Raises ValueError that names the tar and the key where a label is missing
    or not a number, a key is duplicated, or a tar is missing, compressed or damaged.
    """

    def __init__(self, tars: str, suffixes: Sequence[str]) -> None:
        self._files, names, beside = named_files(tars, ".tar")
        self.members: list[Member] = []
        self.left_out: list[LeftOut] = list(beside)
        for name in names:
            with self._files.open(name, READ_AHEAD_BYTES) as file:
                members, left_out = read_tar(file, name, suffixes)
            self.members += members
            self.left_out += left_out
        if not self.members:
            why = [f"; {entry.source_id} is left out: {entry.reason}" for entry in self.left_out if entry.is_image]
            raise ValueError(
                f"There are no samples ({', '.join(suffixes)}) in the {len(names)} tars of {tars}{''.join(why[:1])}."
            )
        listing = [(name, self._files.sizes[name]) for name in names]
        self.fingerprint = canonical_hash([listing, list(suffixes)], spaced=True)

    @property
    def num_classes(self) -> int:
        """Return one more than the largest label."""
        return max(member.label for member in self.members) + 1

    def read(self, member: Member) -> bytes:
        """Return a sample's content. Raises UnreadableImageError where it is too large."""
        if member.size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"it has {member.size} bytes, more than {MAX_FILE_BYTES}", member.source_id)
        return self._files.read(member.tar, member.offset, member.offset + member.size)


class TarSamples:
    """A `Source` of ``KEY.SUFFIX`` and ``KEY.cls`` in tars, local or at a URL; subclasses define the suffixes.

    ``tars`` is a folder, a tar or a pattern. Without ``class_names``, the classes are named by their numbers.
    Raises ValueError as `TarIndex` does.
    """

    name: str
    suffixes: tuple[str, ...]
    block_sizes = None
    notes = ()

    def __init__(self, tars: str | None, class_names: list[str] | None = None) -> None:
        self._index = TarIndex(given(tars, "tars"), self.suffixes)
        self.class_names = class_names or [str(number) for number in range(self._index.num_classes)]
        self.fingerprint, self.left_out = self._index.fingerprint, self._index.left_out

    def __len__(self) -> int:
        return len(self._index.members)

    def __getitem__(self, index: int) -> Example:
        member = self._index.members[index]
        return Example(member.source_id, self.decoded(self._index.read(member), member.source_id), member.label)

    def decoded(self, content: bytes, source_id: str) -> Any:
        """Return the content of the `Example` for a sample's bytes."""
        return content


class ImageTars(TarSamples):
    """A source of samples ``KEY.jpg`` (.jpeg, .png, .webp, .img) with ``KEY.cls``.

    A key without such an image may have one in another format that Pillow reads.
    """

    name = "image tars"
    suffixes = (".jpg", ".jpeg", ".png", ".webp", ".img")


class LatentTars(TarSamples):
    """A source of samples ``KEY.npy`` ([c, h, w] latents or [2c, h, w] moments) with ``KEY.cls``."""

    name = "latent tars"
    suffixes = (".npy", ".moments.npy", ".latent.npy")

    def decoded(self, content: bytes, source_id: str) -> NDArray[np.generic]:
        """Return the array. Raises UnreadableImageError where the bytes are not an array."""
        if is_lfs_pointer(content):
            raise UnreadableImageError(f"the file {LFS_REASON}", source_id)
        try:
            values = np.load(io.BytesIO(content), allow_pickle=False)
        except Exception as error:  # numpy's parser of headers raises ValueError, TokenError, MemoryError and more
            raise UnreadableImageError(f"{type(error).__name__}: {error}".replace("\n", " "), source_id) from error
        if not isinstance(values, np.ndarray):
            raise UnreadableImageError("it is a collection of arrays, not a single one", source_id)
        return values
