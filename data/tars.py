"""Read webdataset tars: index the samples in one pass over the headers, then read any sample by its offset.

The sources of images and of latents that another program encoded are at the end.
"""

import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from core.reading import DamagedFileError
from core.records import canonical_hash
from data.captions import captions_in
from data.files import MAX_FILE_BYTES, given
from data.images import UnreadableImageError
from data.named_files import named_files
from data.sources import Example, required_captions
from data.tar_members import Member, read_tar
from data.unread import LFS_REASON, LeftOut, is_lfs_pointer

READ_AHEAD_BYTES = 4 * 2**20  # for a remote tar, whose headers lie between the images
_MOST_CAPTION_BYTES = 2**20  # of a member with a caption; img2dataset's .json has the image's EXIF data too


class TarIndex:
    """The samples ``KEY.SUFFIX`` with labels ``KEY.cls`` of every tar of ``tars``, in order.

    Where the suffix of a ``caption`` is given, they have that in place of a label, and each label is 0.
    ``tars`` is a folder, one tar, or a pattern with braces or ``*`` as in webdataset
    (``s3://bucket/train-{0000..1023}.tar``). Raises ValueError that names the tar and the key where a label is missing
    or not a number, a key is duplicated, or a tar is missing, compressed or damaged.
    """

    def __init__(self, tars: str, suffixes: Sequence[str], caption: str | None = None) -> None:
        self._caption = caption
        self._files, names, beside = named_files(tars, ".tar")
        self.members: list[Member] = []
        self.left_out: list[LeftOut] = list(beside)
        for name in names:
            with self._files.open(name, READ_AHEAD_BYTES) as file:
                members, left_out = read_tar(file, name, suffixes, caption)
            self.members += members
            self.left_out += left_out
        if not self.members:
            why = [f"; {entry.source_id} is left out: {entry.reason}" for entry in self.left_out if entry.is_image]
            raise ValueError(
                f"There are no samples ({', '.join(suffixes)}) in the {len(names)} tars of {tars}{''.join(why[:1])}."
            )
        listing = [(name, self._files.sizes[name]) for name in names]
        identity = [listing, list(suffixes), *([] if caption is None else [caption])]
        self.fingerprint = canonical_hash(identity, spaced=True)

    @property
    def num_classes(self) -> int:
        """Return one more than the largest label."""
        return max(member.label for member in self.members) + 1

    def read(self, member: Member) -> bytes:
        """Return a sample's content. Raises UnreadableImageError where it is too large."""
        if member.size > MAX_FILE_BYTES:
            raise UnreadableImageError(f"it has {member.size} bytes, more than {MAX_FILE_BYTES}", member.source_id)
        return self._files.read(member.tar, member.offset, member.offset + member.size)

    def captions(self, member: Member) -> tuple[str, ...]:
        """Return a sample's captions, none where captions are not read. Raises UnreadableImageError for a bad one."""
        if member.caption is None or self._caption is None:
            return ()
        offset, size = member.caption
        name = f"its {self._caption}"
        if size > _MOST_CAPTION_BYTES:
            raise UnreadableImageError(f"{name} has {size} bytes, more than {_MOST_CAPTION_BYTES}", member.source_id)
        try:
            texts = captions_in(self._files.read(member.tar, offset, offset + size), self._caption, name)
        except DamagedFileError as error:
            raise UnreadableImageError(str(error).rstrip("."), member.source_id) from error
        return required_captions(texts, member.source_id)


class TarSamples:
    """A `Source` of ``KEY.SUFFIX`` and ``KEY.cls`` in tars, local or at a URL; subclasses define the suffixes.

    ``tars`` is a folder, a tar or a pattern. Without ``class_names``, the classes are named by their numbers. With
    ``caption``, samples need no label: they form one class, named ``images``, and have the caption in ``KEY.txt``, or
    in ``"caption"`` of ``KEY.json``, as img2dataset writes both. Raises ValueError as `TarIndex` does.
    """

    name: str
    suffixes: tuple[str, ...]
    block_sizes = None
    notes = ()

    def __init__(
        self,
        tars: str | None,
        class_names: list[str] | None = None,
        caption: Literal["txt", "json"] | None = None,
    ) -> None:
        if caption not in (None, "txt", "json"):
            raise ValueError(f"data.source.caption is {caption!r}, but captions are read from txt or json; give one.")
        self._index = TarIndex(given(tars, "tars"), self.suffixes, caption and f".{caption}")
        numbered = ["images"] if caption else [str(number) for number in range(self._index.num_classes)]
        self.class_names = class_names or numbered
        self.fingerprint, self.left_out = self._index.fingerprint, self._index.left_out

    def __len__(self) -> int:
        return len(self._index.members)

    def __getitem__(self, index: int) -> Example:
        member = self._index.members[index]
        content = self.decoded(self._index.read(member), member.source_id)
        return Example(member.source_id, content, member.label, self._index.captions(member))

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
