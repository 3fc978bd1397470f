"""Define the paper's own points, and decide which of our records are comparable with them.

The numbers are those of Peebles & Xie, arXiv 2212.09748v2, tables 2, 4 and 6, on which several independent text copies
of the PDF agree. Gflops are giga multiply-adds of one forward pass without guidance.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from evaluation.features.inception import SHA256 as INCEPTION_SHA256

# (width, depth) of table 1.
SIZES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1152, 28): "XL"}
BATCH_SIZE = 256
PAPERS_FAMILY = "DiT"  # of networks, in records
MAIN_BLOCK = "adaLN-Zero"  # of figures 2 and 6 to 10
SWEEP_STEPS = 400_000  # of all twelve models and four blocks


class Point(NamedTuple):
    """A row of table 4 at 256 px: FID-50K without guidance."""

    model: str
    gmacs: float
    fid: float
    step: int = SWEEP_STEPS
    block: str = MAIN_BLOCK

    @property
    def training_gmacs(self) -> float:
        """Return the training compute of figure 9's axis: Gflops x images seen x 3."""
        return self.gmacs * self.step * BATCH_SIZE * 3


class SamplingPoint(NamedTuple):
    """A point of figure 10 that section 5.2 gives in words: FID-10K after 400K training steps."""

    model: str
    sampling_gmacs: float
    fid: float


class System(NamedTuple):
    """A row of table 2, with its Gflops of table 6 (those of the diffusion model alone)."""

    name: str
    gmacs: float
    fid: float
    is_guided: bool


TABLE_4 = (
    Point("S/8", 0.36, 153.60),
    Point("S/4", 1.41, 100.41),
    Point("S/2", 6.06, 68.40),
    Point("B/8", 1.42, 122.74),
    Point("B/4", 5.56, 68.38),
    Point("B/2", 23.01, 43.47),
    Point("L/8", 5.01, 118.87),
    Point("L/4", 19.70, 45.64),
    Point("L/2", 80.71, 23.33),
    Point("XL/8", 7.39, 106.41),
    Point("XL/4", 29.05, 43.01),
    Point("XL/2", 118.64, 19.47),
    Point("XL/2", 119.37, 35.24, block="in-context"),
    Point("XL/2", 137.62, 26.14, block="cross-attention"),
    Point("XL/2", 118.56, 25.21, block="adaLN"),
    Point("XL/2", 118.64, 10.67, 2_352_000),
    Point("XL/2", 118.64, 9.62, 7_000_000),
)
SWEEP = tuple(p for p in TABLE_4 if p.step == SWEEP_STEPS and p.block == MAIN_BLOCK)  # figure 8
TABLE_2 = (
    System("ADM", 1120, 10.94, False),
    System("ADM-U", 742, 7.49, False),
    System("LDM-8", 57, 15.51, False),
    System("LDM-4", 103.6, 10.56, False),
    System("DiT-XL/2", 118.64, 9.62, False),
    System("ADM-G", 1120, 4.59, True),
    System("ADM-G, ADM-U", 742, 3.94, True),
    System("LDM-8-G", 57, 7.76, True),
    System("LDM-4-G", 103.6, 3.60, True),
    System("DiT-XL/2-G", 118.64, 2.27, True),
)
FIGURE_10 = (SamplingPoint("XL/2", 118.64 * 128, 23.7), SamplingPoint("L/2", 80.71 * 1000, 25.9))
TABLE_4_NAME, FIGURE_10_NAME = "paper, table 4", "paper, section 5.2"


def shares_table_2(record: Mapping[str, Any]) -> bool:
    """Return whether a record is comparable with table 2, which includes any way of training and sampling.

    It must be an FID-50K with Inception's public weights against ADM's reference at 256 px (by the name of its file).
    """
    return _is_adms_fid(record, 50_000)


def shares_table_4(record: Mapping[str, Any]) -> bool:
    """Return whether a record was measured like table 4, at any training step.

    It must be comparable with table 2, with EMA weights, batch size 256, 250 DDPM steps, no guidance and the paper's
    decoder.
    """
    return shares_table_2(record) and _is_of_the_sweep(record) and record["sampler"].get("steps") == 250


def shares_figure_8(record: Mapping[str, Any]) -> bool:
    """Return whether a record was measured like table 4, after the same number of steps as the paper's sweep."""
    return shares_table_4(record) and record["step"] == SWEEP_STEPS


def is_guided(record: Mapping[str, Any]) -> bool:
    """Return whether a record's images were sampled with guidance."""
    return bool(record["guidance"].get("name") != "unguided")


def points_of(record: Mapping[str, Any]) -> list[Point]:
    """Return table 4's points of the record's model and block; none if it was measured differently."""
    if not shares_table_4(record) or record["family"] != PAPERS_FAMILY:
        return []
    return [point for point in TABLE_4 if (point.model, point.block) == (_model(record), record.get("block"))]


def sampling_points_of(record: Mapping[str, Any]) -> list[SamplingPoint]:
    """Return figure 10's points of the record's model; none if it was measured differently, apart from the steps."""
    fits = _is_adms_fid(record, 10_000) and _is_of_the_sweep(record) and record["step"] == SWEEP_STEPS
    if not fits or (record["family"], record.get("block")) != (PAPERS_FAMILY, MAIN_BLOCK):
        return []
    return [point for point in FIGURE_10 if point.model == _model(record)]


def _is_adms_fid(record: Mapping[str, Any], num_images: int) -> bool:
    return (
        "fid" in record
        and record["num_images"] == num_images
        and record["feature_extractor_hash"] == INCEPTION_SHA256
        and "VIRTUAL_imagenet256_labeled" in record["reference"]
    )


def _is_of_the_sweep(record: Mapping[str, Any]) -> bool:
    """Return whether a record was measured like the sweep, at any training step and number of sampling steps."""
    return (
        record["weights"] == "ema"
        and record["images_seen"] == record["step"] * BATCH_SIZE
        and record["sampler"].get("name") == "ddpm"
        and not is_guided(record)
        and record["decoder"].startswith("sd-vae-ft-mse")
    )


def _model(record: Mapping[str, Any]) -> str:
    return f"{SIZES.get((record.get('width', 0), record.get('depth', 0)))}/{record.get('patch_size')}"
