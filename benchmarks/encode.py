"""Compare the encode job with its bare encoder: ``python -m benchmarks.encode`` prints one JSON line.

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
import torch
from diffusers import AutoencoderKL
from PIL import Image

from benchmarks.commit import current_commit
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
        "bare_encoder_images_per_sec": round(bare, 1),
        "pipeline_images_per_sec": round(pipeline, 1),
        "pipeline_to_bare_encoder": round(pipeline / bare, 3),
        "autoencoder": options.pretrained or f"random, {SIZES[size]['block_out_channels']} channels",
        "image_size": 256,
        "batch_size": options.batch,
        "decode_threads": options.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "torch": torch.__version__,
        "commit": current_commit(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
