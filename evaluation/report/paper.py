"""The paper's own points, and when they may stand beside ours."""

from collections.abc import Mapping
from typing import Any

from evaluation.inception_features import SHA256 as INCEPTION_SHA256

# (width, depth) of table 1.
SIZES = {(384, 12): "S", (768, 12): "B", (1024, 24): "L", (1152, 28): "XL"}

# Gflops (giga multiply-adds) and FID-50K after 400K steps without guidance: table 4, as public re-statements of it
# agree; not checked against the PDF here, which every picture says.
TABLE_4 = {
    "S/8": (0.36, 153.60),
    "S/4": (1.41, 100.41),
    "S/2": (6.06, 68.40),
    "B/8": (1.42, 122.74),
    "B/4": (5.56, 68.38),
    "B/2": (23.01, 43.47),
    "L/8": (5.01, 118.87),
    "L/4": (19.70, 45.64),
    "L/2": (80.71, 23.33),
    "XL/8": (7.39, 106.41),
    "XL/4": (29.05, 43.01),
    "XL/2": (118.64, 19.47),
}
SOURCE = "paper, table 4 (recalled, not checked against the PDF)"
WITHOUT_BASELINES = (
    "This is the left panel of the paper's figure. The right one, the best model beside ADM and LDM, is missing: it "
    "shows published FIDs of those systems, which no run of this program measures and of which there is no checked "
    "copy here."
)


def shares_the_papers_protocol(record: Mapping[str, Any]) -> bool:
    """Whether a record was measured as table 4 was.

    FID-50K of the EMA at 400K steps of batch 256, 250 DDPM steps, no guidance, Inception's public weights, ADM's
    reference at 256 px (by the name of its file), the paper's decoder.
    """
    sampler, guidance = record["sampler"], record["guidance"]
    return (
        "fid" in record
        and record["weights"] == "ema"
        and (record["step"], record["images_seen"]) == (400_000, 400_000 * 256)
        and record["num_images"] == 50_000
        and sampler.get("name") == "ddpm"
        and sampler.get("steps") == 250
        and guidance.get("name") == "unguided"
        and record["feature_extractor_hash"] == INCEPTION_SHA256
        and "VIRTUAL_imagenet256_labeled" in record["reference"]
        and record["decoder"].startswith("sd-vae-ft-mse")
    )
