"""Write grids of samples as PNGs."""

import io
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from core.atomic import write_bytes

SHOWN_SIDE = 64  # smaller images are enlarged to about this many pixels, each pixel a square
GAP = 2


def columns_of(num_images: int, num_classes: int = 0) -> int:
    """Return the number of columns of a grid: one for each class that comes in turn, or else 10, and at most 10."""
    return min(num_classes or 10, 10, num_images)


def save_grid(path: Path, images: NDArray[np.uint8], columns: int) -> None:
    """Write images [num_images, H, W, C] uint8 row by row as one PNG."""
    save_picture(path, grid_of(images, columns))


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture [height, width, 3] or [height, width] uint8 as a PNG."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    write_bytes(path, content.getvalue())


def grid_of(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Return images [num_images, H, W, C] uint8 row by row as one picture uint8.

    It is [height, width, 3] of their first 3 channels, or [height, width] of the first of fewer.
    """
    images = images[..., : 3 if images.shape[3] >= 3 else 1]
    count, height, width, channels = images.shape
    factor = max(1, SHOWN_SIDE // height)
    rows = math.ceil(count / columns)
    cell_height, cell_width = height * factor + GAP, width * factor + GAP
    canvas = np.full((rows * cell_height + GAP, columns * cell_width + GAP, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top = GAP + number // columns * cell_height
        left = GAP + number % columns * cell_width
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        canvas[top : top + height * factor, left : left + width * factor] = enlarged
    return canvas.squeeze(2) if channels == 1 else canvas
