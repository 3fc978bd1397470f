"""Every kind of image file becomes the square RGB image that ADM would make of it, or is refused with a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from pictures import encoded, photo
from PIL import Image

from data.images import CenterCrop, ExactSize, Preparation, UnreadableImageError, decode


def test_lossless_pixels_arrive_as_they_are() -> None:
    np.testing.assert_array_equal(decode(encoded(photo(1), "PNG")), photo(1))


@pytest.mark.parametrize("mode", ["CMYK", "P", "L", "1", "LA", "RGBA", "YCbCr", "I;16", "I"])
def test_every_colour_mode_becomes_rgb_close_to_the_original(mode: str) -> None:
    grey = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :], 16, axis=0)
    source = Image.fromarray(np.stack([grey] * 3, axis=-1))
    if mode.startswith("I"):
        picture = Image.fromarray(grey.astype(np.uint16) * 257)
        picture = picture.convert("I") if mode == "I" else picture
    else:
        picture = source.convert(mode, palette=Image.Palette.ADAPTIVE) if mode == "P" else source.convert(mode)
    file = io.BytesIO()
    picture.save(file, {"CMYK": "JPEG", "YCbCr": "JPEG", "I": "TIFF"}.get(mode, "PNG"), quality=100)
    found = decode(file.getvalue())
    assert found.shape == (16, 64, 3)
    assert found.dtype == np.uint8
    tolerance = 255 if mode == "1" else 8 if mode == "P" else 3
    assert np.abs(found.astype(int) - np.asarray(source).astype(int)).max() <= tolerance
    assert abs(found.mean() - np.asarray(source).mean()) < 3


def test_the_first_frame_of_an_animation_is_taken() -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (10, 200)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    assert (decode(file.getvalue()) == 10).all()


def test_the_cameras_orientation_is_ignored_unless_asked_for() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    content = encoded(photo(0, width=40, height=32), "PNG", exif=exif)
    np.testing.assert_array_equal(decode(content), photo(0))
    np.testing.assert_array_equal(decode(content, apply_exif=True), np.rot90(photo(0), k=3))


def bomb(width: int, height: int) -> bytes:
    """Return a PNG whose header declares far more pixels than it has bytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is no image", "cannot identify"),
        (encoded(photo(0))[:-200], "Truncated"),
        (encoded(photo(0), "PNG")[:-200], "truncated|incomplete|broken|read"),
        (encoded(photo(0))[:100], "."),
        (bomb(100_000, 100_000), "100000x100000 pixels are more than"),
        (bomb(2_000, 2_000), "truncated|incomplete|broken|read"),
        (encoded(np.zeros((4, 4), np.float32), "TIFF"), "float pixels"),
    ],
)
def test_what_is_no_sound_image_is_set_aside_with_a_reason(content: bytes, reason: str) -> None:
    with pytest.raises(UnreadableImageError, match=reason):
        decode(content)


def test_an_image_of_the_right_size_is_not_touched() -> None:
    image = photo(2, width=32, height=32)
    np.testing.assert_array_equal(CenterCrop()(image, 32), image)


def test_a_large_image_is_averaged_in_blocks_before_it_is_resized() -> None:
    blocks = np.random.default_rng(0).integers(0, 63, (16, 16, 3), dtype=np.uint8) * 4
    large = blocks.repeat(4, axis=0).repeat(4, axis=1)
    np.testing.assert_array_equal(CenterCrop()(large, 16), blocks)


@pytest.mark.parametrize(
    ("width", "height", "size"), [(41, 32, 32), (40, 33, 32), (50, 37, 24), (500, 375, 256), (7, 9, 16)]
)
def test_the_crop_is_the_middle_of_the_bicubically_resized_image(width: int, height: int, size: int) -> None:
    """Compare with Pillow's own resize and crop, for images less than twice too large."""
    picture = Image.fromarray(photo(3, width, height))
    short = min(width, height)
    scaled = picture.resize((round(width * size / short), round(height * size / short)), Image.Resampling.BICUBIC)
    left, top = (scaled.width - size) // 2, (scaled.height - size) // 2
    expected = np.asarray(scaled.crop((left, top, left + size, top + size)))
    np.testing.assert_array_equal(CenterCrop()(photo(3, width, height), size), expected)


def as_adm_crops(content: bytes, size: int) -> np.ndarray:
    """Return what ``center_crop_arr`` of Dhariwal & Nichol's code makes of an image that Pillow converted to RGB."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(side // 2 for side in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(tuple(round(side * scale) for side in picture.size), resample=Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def test_an_image_of_any_size_and_kind_becomes_the_bits_of_adms_code() -> None:
    random = np.random.default_rng(0)
    kinds = [("JPEG", {"quality": 40}), ("JPEG", {"quality": 95, "subsampling": 0}), ("JPEG", {"progressive": True})]
    kinds += [("PNG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {})]
    for number in range(150):
        size = (8, 16, 31, 64)[number % 4]
        width, height = (int(side) for side in random.integers(1, 6 * size, 2))
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)  # noise: any difference shows
        kind, options = kinds[number % len(kinds)]
        picture = Image.fromarray(pixels).convert("L" if number % 11 == 0 else "RGB")
        if kind == "JPEG" and number % 5 == 0:
            picture = picture.convert("CMYK")
        content = io.BytesIO()
        picture.save(content, kind, **options)
        found = Preparation(size, CenterCrop())(content.getvalue())
        np.testing.assert_array_equal(found, as_adm_crops(content.getvalue(), size), str((width, height, size)))


def test_a_crop_and_then_a_flip_is_not_a_flip_and_then_a_crop() -> None:
    """Check the reason why orientations are made after the crop: an odd margin shifts the picture by a pixel."""
    image = photo(5, width=41, height=32)
    assert not np.array_equal(CenterCrop()(image, 32)[:, ::-1], CenterCrop()(image[:, ::-1], 32))


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (20_000, 3), (3, 20_000)])
def test_extreme_shapes_give_an_image_of_the_asked_size(shape: tuple[int, int]) -> None:
    content = encoded(np.full((*shape, 3), 77, np.uint8), "PNG")
    image = Preparation(32, CenterCrop())(content)
    assert image.shape == (32, 32, 3)
    assert (image == 77).all()


def test_an_image_of_twenty_thousand_pixels_a_side_is_read() -> None:
    content = io.BytesIO()
    Image.new("L", (20_000, 6_000), 77).save(content, "JPEG")
    assert (Preparation(32, CenterCrop())(content.getvalue()) == 77).all()


def test_grey_pixels_keep_their_one_channel() -> None:
    assert CenterCrop()(np.full((40, 50, 1), 9, np.uint8), 16).shape == (16, 16, 1)


def test_without_a_crop_another_size_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match=r"is 32x40, but data.image_size is 32; .* data/crop=center"):
        ExactSize()(photo(0), 32)
