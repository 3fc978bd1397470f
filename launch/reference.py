"""``ditscale reference``: compute the statistics of real images that generated images are compared with."""

from pathlib import Path

from core.atomic import make_folder, require_no_folder
from core.progress import ProgressBar
from core.reading import sha256_of
from evaluation.reference.file import write_reference
from evaluation.reference.image_sets import ImageSet
from launch.builders.build import build_extractor
from launch.builders.components import build
from launch.builders.facts import facts_of_process
from launch.command.settings import ReferenceSettings
from launch.jobs import start
from runtime.protocol import Processes


def reference_job(config: ReferenceSettings, progress: ProgressBar) -> None:
    """Write ``out`` with the statistics of all images, and with some of the images for precision and recall."""
    out = Path(config.out)
    if out.suffix != ".npz":
        raise ValueError(f"out is {out}, but a reference is an .npz file; give it a name that ends in .npz.")
    require_no_folder(out)  # refuse before hours of work
    make_folder(out.parent)
    runtime: Processes = build(config.runtime, precision="fp32")
    runtime.require_same(facts_of_process(config.plain()))
    images: ImageSet = build(config.images)
    images.to(runtime.device)
    extractor = build_extractor(config.evaluation.features, runtime)
    runtime.require_same({"feature extractor": extractor.hash, "images": images.fingerprint})
    write_reference(
        out,
        images,
        extractor,
        num_kept=config.num_kept,
        seed=config.seed,
        batch_size=config.batch_size,
        runtime=runtime,
        progress=progress,
    )
    if runtime.is_main:
        print(f"{len(images)} images of {images.name} in {extractor.title}: {out}, sha256 {sha256_of(out)}")


if __name__ == "__main__":
    start("reference")
