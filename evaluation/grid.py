"""Write grids of samples, with their captions, as PNGs."""

import io
import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from core.atomic import write_bytes

SHOWN_SIDE = 64  # smaller images are enlarged to about this many pixels, each pixel a square
GAP = 2
_FONT_SIZE, _LINES = 12, 4  # pixels; lines of a caption, which is shortened to these
_MORE = "\u2026"


def columns_of(num_images: int, num_classes: int = 0) -> int:
    """Return the number of columns of a grid: one for each class that comes in turn, or else 10, and at most 10."""
    return min(num_classes or 10, 10, num_images)


def save_grid(path: Path, images: NDArray[np.uint8], columns: int, captions: Sequence[str] | None = None) -> None:
    """Write images [num_images, H, W, C] uint8 row by row as one PNG, with the caption of each, if there are any."""
    save_picture(path, grid_of(images, columns, captions))


def save_picture(path: Path, picture: NDArray[np.uint8]) -> None:
    """Write a picture [height, width, 3] or [height, width] uint8 as a PNG."""
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG")
    write_bytes(path, content.getvalue())


def grid_of(images: NDArray[np.uint8], columns: int, captions: Sequence[str] | None = None) -> NDArray[np.uint8]:
    """Return images [num_images, H, W, C] uint8 row by row as one picture uint8, with captions [num_images] above them.

    It is [height, width, 3] of their first 3 channels, or [height, width] of the first of fewer. A caption that all
    images have is drawn once, and so is one that all images of a column have.
    """
    grid = _grid(images, columns)
    if captions is None:
        return grid
    if len(set(captions)) == 1:
        return np.concatenate([_strip(captions[:1], 1, grid), grid])
    if all(caption == captions[number % columns] for number, caption in enumerate(captions)):
        return np.concatenate([_strip(captions[:columns], columns, grid), grid])
    parts = []
    for first in range(0, len(images), columns):
        of_row = slice(first, first + columns)
        parts += [_strip(captions[of_row], columns, grid), _grid(images[of_row], columns)]
    return np.concatenate(parts)


def _grid(images: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Return images row by row as one picture, as `grid_of` does, without captions."""
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


def _strip(captions: Sequence[str], columns: int, grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a picture of captions, one for each of ``columns`` parts of the width, in the form of the ``grid``."""
    font, cell = _font(), (grid.shape[1] - GAP) // columns
    texts = [lines_of(caption, cell - 2 * GAP) for caption in captions]
    line_height = sum(font.getmetrics())
    height = 2 * GAP + line_height * max(len(lines) for lines in texts)
    picture = Image.new("L", (grid.shape[1], height), 255)
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(texts):
        for number, line in enumerate(lines):
            draw.text((2 * GAP + column * cell, GAP + number * line_height), line, fill=0, font=font)
    pixels = np.asarray(picture)
    return pixels if grid.ndim == 2 else pixels[:, :, np.newaxis].repeat(grid.shape[2], axis=2)


def lines_of(caption: str, width: int) -> list[str]:
    """Return a caption in lines of at most ``width`` pixels, shortened where it needs more than a few."""
    rest = " ".join("".join(letter if letter.isprintable() else " " for letter in caption).split())
    lines: list[str] = []
    while rest:
        if len(lines) == _LINES:
            lines[-1] = lines[-1][: _num_fitting(lines[-1], width - math.ceil(_font().getlength(_MORE)))] + _MORE
            break
        fitting = _num_fitting(rest, width)
        end = fitting if fitting == len(rest) else rest.rfind(" ", 0, fitting + 1)
        end = end if end > 0 else fitting  # a word that is longer than a line
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    return lines


def _num_fitting(text: str, width: int) -> int:
    """Return how many letters of a text are at most ``width`` pixels wide, at least 1."""
    most = min(len(text), max(1, width))  # each letter is a pixel wide or more
    return max(1, bisect_right(range(1, most + 1), float(width), key=lambda count: _font().getlength(text[:count])))


@cache
def _font() -> ImageFont.FreeTypeFont:
    """Return the font that comes with Pillow. It has Latin letters without accents; others are drawn as boxes."""
    font = ImageFont.load_default(_FONT_SIZE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow returns it where a size is given"
    return font
