"""Decode and crop image files, and convert pixels between uint8 and the network's range."""

import io
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from data.unread import LFS_REASON, is_lfs_pointer

# A larger image is treated as a decompression bomb. 23,170 x 23,170; decoded to RGB, 1.6 GB.
MAX_PIXELS = 2**29


class UnreadableImageError(Exception):
    """An image cannot be decoded, for the given reason. A job skips the image and continues."""

    def __init__(self, reason: str, source_id: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.source_id = source_id


Pixels = NDArray[np.uint8] | Image.Image  # an array [H, W, C], or a picture of Pillow's in RGB, which saves a copy


class Crop(Protocol):
    """A function that makes an image of any size square."""

    name: str  # recorded with the latents

    def __call__(self, image: Pixels, size: int) -> NDArray[np.uint8]:
        """Return [size, size, C] of an image [H, W, C]."""
        ...


class CenterCrop:
    """ADM's crop: halve with a box filter while twice too large, resize the shorter side bicubically, cut the center.

    Dhariwal & Nichol 2021, ``center_crop_arr`` in their code: the paper's training images and the reference statistics
    were made this way.
    """

    name = "center"

    def __call__(self, image: Pixels, size: int) -> NDArray[np.uint8]:
        """Return [size, size, C] of an image [H, W, C]; smaller images are enlarged."""
        picture = image if isinstance(image, Image.Image) else _picture_of(image)
        while min(picture.size) >= 2 * size:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        factor = size / min(picture.size)
        width, height = round(picture.width * factor), round(picture.height * factor)
        if width > size:
            # Pillow resizes the rows of a wide image, rounds, and then resizes its columns: here only those that stay.
            wide, left = picture.resize((width, picture.height), Image.Resampling.BICUBIC), (width - size) // 2
            picture = wide.crop((left, 0, left + size, picture.height))
        pixels = np.asarray(picture.resize((size, height), Image.Resampling.BICUBIC))
        top = (height - size) // 2
        return pixels[top : top + size].reshape(size, size, -1)


def _picture_of(image: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


class ExactSize:
    """No crop: the images must already have the right size, as the digits do."""

    name = "none"

    def __call__(self, image: Pixels, size: int) -> NDArray[np.uint8]:
        """Return the image unchanged. Raises ValueError where it is not [size, size, C]."""
        pixels = np.asarray(image)
        height, width = pixels.shape[:2]
        if (height, width) != (size, size):
            square = f"data.image_size={height} or " if height == width else ""
            raise ValueError(f"is {height}x{width}, but data.image_size is {size}; set {square}data/crop=center.")
        return pixels


class Preparation(NamedTuple):
    """The steps that turn a source's image into the square one that an autoencoder or a feature extractor sees."""

    image_size: int  # pixels
    crop: Crop
    apply_exif: bool = False  # rotate the image as its EXIF data say; ADM does not

    def __call__(self, content: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return [image_size, image_size, C] uint8 of an encoded image or of pixels [H, W, C].

        Raises UnreadableImageError where the image cannot be decoded, and ValueError where the crop rejects it.
        """
        pixels = picture_in(content, self.apply_exif) if isinstance(content, bytes) else content
        return self.crop(pixels, self.image_size)


def decode(content: bytes, apply_exif: bool = False) -> NDArray[np.uint8]:
    """Return the pixels [H, W, 3] uint8 of an encoded image. Raises as `picture_in` does."""
    return np.asarray(picture_in(content, apply_exif))


def picture_in(content: bytes, apply_exif: bool = False) -> Image.Image:
    """Return an encoded image in any format as a picture in RGB; of an animation, the first frame.

    Transparency is dropped and CMYK and palettes are converted as Pillow (and so ADM) does; 16-bit gray is scaled to
    8 bits, where Pillow would clip it. Raises UnreadableImageError with the reason.
    """
    if not content:
        raise UnreadableImageError("the file is empty")
    if is_lfs_pointer(content):
        raise UnreadableImageError(f"the file {LFS_REASON}")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES  # Pillow would fill the missing part of an image with gray
    try:
        with Image.open(io.BytesIO(content)) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UnreadableImageError(
                    f"{picture.width}x{picture.height} pixels are more than {MAX_PIXELS}: a decompression bomb"
                )
            picture.load()
            return _as_rgb(ImageOps.exif_transpose(picture) if apply_exif else picture)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, ValueError and more
        raise UnreadableImageError(f"{type(error).__name__}: {error}".replace("\n", " ")) from error


# Pillow has a size limit of its own; `picture_in` checks the size before it decodes a pixel.
Image.MAX_IMAGE_PIXELS = None


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit gray, in 16 or 32 bits
        levels = np.rint(np.asarray(picture).astype(np.float64) / 257).clip(0, 255)
        picture = Image.fromarray(levels.astype(np.uint8))
    elif picture.mode == "F":
        raise UnreadableImageError("float pixels have no known range")
    if picture.mode == "RGB" and picture.format == "JPEG":  # loaded, so that it needs its file no more
        return picture
    return picture.convert("RGB")


def to_unit_range(images: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """Return [B, C, H, W] float32 in [-1, 1] on the device of [B, H, W, C] uint8, without waiting on CUDA."""
    pixels = torch.from_numpy(images)
    if torch.device(device).type == "cuda":  # a copy from unpinned memory would wait for all earlier work
        pixels = pixels.pin_memory()
    return pixels.to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_uint8(images: Tensor) -> NDArray[np.uint8]:
    """Return [B, H, W, C] uint8 of [B, C, H, W] float in [-1, 1], rounded as in the released sampling code."""
    levels = (127.5 * images.float() + 128.0).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()
