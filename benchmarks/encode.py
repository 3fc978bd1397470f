"""Compare the encode job with its bare encoder: ``python -m benchmarks.encode`` prints one JSON line.

First it prepares images, in turns with the released code's lines on Pillow (``center_crop_arr``), on one thread.

The autoencoder is that of ``--pretrained``, else one with random weights: of the paper's size on a GPU, a small one
elsewhere. JPEGs of ImageNet's usual size are decoded, cropped, encoded in both orientations and written to shards; the
bare encoder gets the same batches from memory. A ratio of 1.0 means that reading, decoding and writing cost nothing.
"""

import argparse
import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.commit import current_commit
from benchmarks.turns import Seconds, cpu, in_turns
from data.encode import Workers, encode
from data.encodings import EncodeImages
from data.image_folder import ImageFolder
from data.images import CenterCrop, Preparation
from model.autoencoder_kl import DiffusersAutoencoder


@contextmanager
def no_progress(*_: Any) -> Iterator[Any]:
    class Bar:
        def update(self, n: int = 1) -> None: ...

    yield Bar()


def make_images(root: Path, count: int) -> None:
    """Write noisy 500x375 JPEGs of about 100 KB, like ImageNet's, in 4 classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = root / f"class{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 256, (94, 125, 3), dtype=np.uint8)).resize((500, 375))
        content = io.BytesIO()
        rough.save(content, "JPEG", quality=90)
        (folder / f"{number:05d}.JPEG").write_bytes(content.getvalue())


SIZES = {  # settings of an AutoencoderKL that downscales by 8
    "paper": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
    "small": {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8},  # 1% of the work
}


def make_autoencoder(folder: Path, size: str) -> str:
    """Save an autoencoder with random weights, and return its folder."""
    torch.manual_seed(0)
    stages = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**stages, **SIZES[size]).save_pretrained(folder)
    return str(folder)


def as_released(content: bytes, size: int = 256) -> np.ndarray:
    """Decode and crop as the released code and ADM do."""
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    while min(*picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(picture)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def preparation(count: int = 50) -> dict[str, dict[str, Seconds]]:
    """Return the milliseconds of an image, ours and the released code's, by the image's size."""
    found, prepare, random = {}, Preparation(256, CenterCrop()), np.random.default_rng(0)
    for width, height in ((500, 375), (375, 500), (1024, 768)):
        small = random.integers(0, 256, (count, height // 4, width // 4, 3), dtype=np.uint8)
        contents = [io.BytesIO() for _ in range(count)]
        for pixels, content in zip(small, contents, strict=True):
            Image.fromarray(pixels).resize((width, height)).save(content, "JPEG", quality=90)
        images = [content.getvalue() for content in contents]
        assert all((prepare(image) == as_released(image)).all() for image in images)
        works = {"ours": lambda: [prepare(image) for image in images]}  # noqa: B023
        works["pillow"] = lambda: [as_released(image) for image in images]  # noqa: B023
        seconds = in_turns(works)
        of_one = {name: value if "/" in name else [1000 * s / count for s in value] for name, value in seconds.items()}
        found[f"{width}x{height}"] = {name: [round(s, 3) for s in value] for name, value in of_one.items()}
    return found


def bare_images_per_second(encoding: EncodeImages, batch: np.ndarray, repeats: int) -> float:
    encoding.moments(batch).cpu()
    started = time.perf_counter()
    for _ in range(repeats):
        encoding.moments(batch).cpu()
    return repeats * len(batch) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pretrained", help="an AutoencoderKL; default: a small random one")
    parser.add_argument("--images", type=int, default=384)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) - 1))
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # the other cores decode
    prepared = preparation()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_images(root / "images", options.images)
        size = "paper" if device.type == "cuda" else "small"
        pretrained = options.pretrained or make_autoencoder(root / "autoencoder", size)
        precision = "bf16" if device.type == "cuda" else "fp32"
        autoencoder = DiffusersAutoencoder("benchmark", pretrained, 0.18215, precision=precision)
        encoding = EncodeImages(autoencoder, Preparation(256, CenterCrop()), True, device)
        source = ImageFolder(str(root / "images"))
        batch = np.stack([encoding.prepare(source, index).values for index in range(options.batch)])
        repeats = max(2, options.images // options.batch // 4)
        bare = bare_images_per_second(encoding, batch, repeats)
        started = time.perf_counter()
        encode(
            source,
            encoding,
            root / "shards",
            name="benchmark",
            samples_per_shard=128,
            batch_size=options.batch,
            seed=0,
            progress=no_progress,
            workers=Workers(threads=options.threads),
        )
        pipeline = options.images / (time.perf_counter() - started)
        bare = (bare + bare_images_per_second(encoding, batch, repeats)) / 2  # before and after: speed may drift
    result = {
        "benchmark": "encode",
        "milliseconds_to_decode_and_crop": prepared,
        "bare_encoder_images_per_sec": round(bare, 1),
        "pipeline_images_per_sec": round(pipeline, 1),
        "pipeline_to_bare_encoder": round(pipeline / bare, 3),
        "autoencoder": options.pretrained or f"random, {SIZES[size]['block_out_channels']} channels",
        "image_size": 256,
        "batch_size": options.batch,
        "decode_threads": options.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        **cpu(),
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
