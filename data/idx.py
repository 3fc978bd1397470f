"""Define the sources of IDX files, the format of MNIST (LeCun et al. 1998), and of Fashion-MNIST, which has it too.

An IDX file is four bytes (two zeros, the type of a value, the number of dimensions), a big-endian 32-bit length per
dimension, and the values; MNIST's files are of unsigned bytes. The files are untrusted: sizes are checked against the
header before values are read, and no file is unpacked beyond the size that its header states.
"""

import gzip
import hashlib
import io
import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from data.files import Files, given
from data.sources import Example
from data.unread import LeftOut, compression

MAX_BYTES = 2**30  # of the values of a file: 1.3 million images of 28x28 pixels
SPLITS = {"train": "train", "test": "t10k"}  # names of files begin with the second
_UNSIGNED_BYTES = 0x0800  # the part of the magic number that states the type of a value
_PIECE_BYTES = 2**20


class IdxImages:
    """A source of gray images in a folder, or at a URL, with MNIST's four files, each packed by gzip or plain.

    ``root`` has ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``; those of the split ``test`` begin with
    ``t10k``. Classes are named by ``class_names``, or by their numbers. Raises ValueError where a file is missing,
    is not an IDX file of its kind, has another number of bytes than its header states, or has no images, and where
    there are not as many labels as images.
    """

    name = "idx"
    way_out: ClassVar[str] = "give the folder that has them as data.source.root"
    block_sizes = None
    left_out: Sequence[LeftOut] = ()
    notes: Sequence[str] = ()

    def __init__(self, root: str | None, split: str = "train", class_names: Sequence[str] | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"data.split is {split!r}, but the splits of IDX files are {', '.join(SPLITS)}; give one.")
        files = self._files_in(given(root, "root"))
        image_file, label_file = (self._file(files, f"{SPLITS[split]}-{kind}") for kind in ("images", "labels"))
        self._images = _values(files, image_file, dimensions=3)[..., np.newaxis]
        self._labels = _values(files, label_file, dimensions=1)
        if len(self._images) != len(self._labels):
            raise ValueError(
                f"{files.place} has {len(self._images)} images in {image_file}, but {len(self._labels)} labels in "
                f"{label_file}; fetch both again."
            )
        numbers = [str(number) for number in range(int(self._labels.max()) + 1)]
        self.class_names = numbers if class_names is None else list(class_names)
        self._split = split
        shape = str(self._images.shape).encode()
        self.fingerprint = hashlib.sha256(shape + self._images.tobytes() + self._labels.tobytes()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> Example:
        return Example(f"{self._split}-{index:05d}", self._images[index], int(self._labels[index]))

    def _files_in(self, root: str) -> Files:
        try:
            return Files(root, recursive=False)
        except ValueError as error:
            raise ValueError(f"{str(error).partition(';')[0].rstrip('.')}; {self.way_out}.") from error

    def _file(self, files: Files, start: str) -> str:
        """Return the name of the file of a split's images or labels."""
        names = list(_names_of(start))
        found = next((name for name in names if name in files.sizes), None)
        if found is None:
            raise ValueError(
                f"There is no IDX file {names[0]} (or {', '.join(names[1:])}) among the {len(files.sizes)} files in "
                f"{files.place}; {self.way_out}."
            )
        return found


class FashionMnist(IdxImages):
    """Fashion-MNIST (Xiao, Rasul & Vollgraf 2017): 60,000 + 10,000 gray images of 28x28 pixels in 10 classes."""

    name = "fashion_mnist"
    way_out = (
        "install Debian's package dataset-fashion-mnist, or fetch the four files of data/fashion in "
        "github.com/zalandoresearch/fashion-mnist and give their folder as data.source.root"
    )
    names: ClassVar[tuple[str, ...]] = (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    )

    def __init__(self, root: str | None, split: str = "train") -> None:
        super().__init__(root, split, self.names)


def _names_of(start: str) -> Iterator[str]:
    """Yield the names that a file has in Debian and at its origin, and in copies that unpacking programs made."""
    kind = "idx3-ubyte" if start.endswith("images") else "idx1-ubyte"
    for separator in "-.":
        for suffix in (".gz", ""):
            yield f"{start}{separator}{kind}{suffix}"


def _values(files: Files, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Return the values of a file, [N, H, W] or [N]. Raises ValueError as `IdxImages` does."""
    where = f"{files.place}/{name}"
    files.refuse_pointer(name)
    if files.sizes[name] > MAX_BYTES:
        raise ValueError(f"{where} has {files.sizes[name]} bytes, but at most {MAX_BYTES} are read of an IDX file.")
    content = files.read(name)
    is_packed = compression(content[:32]) == "gzip"
    header = struct.Struct(f">{1 + dimensions}I")
    start = _unpacked(content, header.size, where) if is_packed else content[: header.size]
    if len(start) < header.size:
        raise ValueError(f"{where} has {len(start)} bytes, but its header has {header.size}; fetch it again.")
    magic, *shape = header.unpack(start)
    if magic != _UNSIGNED_BYTES + dimensions:
        kind = "images" if dimensions == 3 else "labels"
        raise ValueError(
            f"{where} begins with the number {magic}, but an IDX file of {kind} with {_UNSIGNED_BYTES + dimensions}; "
            "fetch it again."
        )
    said, size = "x".join(map(str, shape)), math.prod(shape)
    if not 0 < size <= MAX_BYTES:
        raise ValueError(f"{where} states {said} values of a byte, but 1 to {MAX_BYTES} are read; fetch it again.")
    if is_packed:
        content = _unpacked(content, header.size + size + 1, where)
    if (found := len(content) - header.size) != size:
        more = "at least " if found > size and is_packed else ""
        raise ValueError(
            f"{where} has {more}{found} bytes of values, but its header states {said}, which are {size}; fetch it "
            "again."
        )
    return np.frombuffer(content, np.uint8, offset=header.size).reshape(shape)


def _unpacked(content: bytes, limit: int, where: str) -> bytes:
    """Return at most the first ``limit`` bytes of a gzip file. Memory grows with what is unpacked, not ``limit``."""
    found = bytearray()
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            while len(found) < limit and (piece := file.read(min(_PIECE_BYTES, limit - len(found)))):
                found += piece
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{where} cannot be unpacked after {len(found)} bytes ({error}), of {len(content)} packed ones; fetch it "
            "again."
        ) from error
    return bytes(found)
