"""``ditscale sample``: generate a PNG grid and an ADM-format ``.npz`` from a checkpoint."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from core.batch import Condition
from core.npz import write_npz
from core.progress import ProgressBar
from core.records import canonical_hash
from evaluation.grid import columns_of, save_grid
from evaluation.image_files import write_prompts
from launch.builders.build import LoadedCheckpoint
from launch.builders.components import build, target_of
from launch.builders.conditioned import conditioned
from launch.builders.foreign import is_foreign, load_foreign
from launch.command.settings import SampleSettings
from launch.jobs import start
from runtime.protocol import Devices

GRID_IMAGES = 100  # a grid with more images is too large to look at


def sample_job(config: SampleSettings, progress: ProgressBar) -> None:
    """Write ``{out}.png`` and ``{out}.npz`` and, with prompts, ``{out}.jsonl``, whose line i is the prompt of image i.

    The ``.npz`` has ``arr_0`` uint8 [num_images, H, W, C] and, with classes, the labels ``arr_1`` int64 [num_images].
    """
    runtime: Devices = build(config.runtime, precision=config.precision.value)
    if is_foreign(config.checkpoint):
        checkpoint = load_foreign(config, runtime)
    else:
        checkpoint = LoadedCheckpoint.load(config.checkpoint, config.weights, runtime, config.text_encoder)
    checkpoint = conditioned(checkpoint, config, runtime)
    count, conditions = config.num_images, checkpoint.conditions
    condition = _condition(config, checkpoint)
    if runtime.is_main:
        for note in _notes(config, checkpoint, condition):
            print(f"note: {note}", file=sys.stderr)
    generator = checkpoint.generator(config, config.seed, runtime)
    parts = []
    with progress("sample", 0, count, "img") as bar:
        for indices, images in generator.batches(condition, count, config.batch_size):
            parts.append(images)
            bar.update(len(indices) * runtime.data_world)
    images = runtime.gather(_concatenate(parts, checkpoint))
    if not runtime.is_main:
        return
    classes, texts = conditions.classes(condition), conditions.texts(condition)
    out = Path(config.out or checkpoint.run_dir / "samples" / _name(config, checkpoint, texts))
    labels = {} if classes is None else {"arr_1": classes}
    # ADM's evaluator expects these names.
    write_npz(out.with_name(out.name + ".npz"), {"arr_0": images, **labels}, zip64=True)
    if texts is not None:
        write_prompts(out.with_name(out.name + ".jsonl"), texts, classes)
    shown = images[:GRID_IMAGES]
    has_columns = config.labels is None and (texts is None or conditions.num_groups > 1)
    columns = columns_of(len(shown), conditions.num_groups if has_columns else 0)
    save_grid(out.with_name(out.name + ".png"), shown, columns, None if texts is None else texts[:GRID_IMAGES])
    which = f" ({config.weights} weights)" if checkpoint.step else ""
    print(f"{count} images of {checkpoint.path}{which}: {out}.npz and {out}.png")


def _condition(config: SampleSettings, checkpoint: LoadedCheckpoint) -> Condition:
    """Return the conditions of the images: classes in turn, or those asked for, and images that are enlarged."""
    knows_null, path = checkpoint.class_dropout > 0, str(checkpoint.path)
    if config.labels is None:
        return checkpoint.conditions.in_turn(config.num_images)
    return checkpoint.conditions.asked_for(config.labels, config.num_images, checkpoint.class_names, knows_null, path)


def _notes(config: SampleSettings, checkpoint: LoadedCheckpoint, condition: Condition) -> list[str]:
    """Return sentences on the weights and the conditions."""
    notes = [] if checkpoint.note is None else [checkpoint.note]
    num_prompts = checkpoint.conditions.num_groups if config.prompts is not None else 0
    if num_prompts > config.num_images:
        unused = num_prompts - config.num_images
        notes.append(f"{unused} of {num_prompts} prompts get no image; set num_images={num_prompts} for one of each.")
    return notes + checkpoint.conditions.notes(condition)


def _name(config: SampleSettings, checkpoint: LoadedCheckpoint, texts: Sequence[str] | None) -> str:
    """Return a file name that says how the images were generated."""
    source = [f"step_{checkpoint.step:08d}", config.weights] if checkpoint.step else [checkpoint.path.stem]
    sampler = f"{target_of(config.sampler).name}{config.sampler.get('steps', '')}"  # one that adapts has no steps
    parts = [*source, f"seed{config.seed}", sampler]
    if "scale" in config.guidance:
        parts.append(f"guidance{config.guidance['scale']}")
    if config.labels is not None:
        parts.append("labels" + "_".join(re.sub(r"\W", "", str(label)) for label in config.labels[:10]))
    if texts is not None and (config.prompts is not None or config.negative_prompt):
        hash_ = canonical_hash([*dict.fromkeys(texts), config.negative_prompt])
        parts += [re.sub(r"\W+", "_", texts[0])[:40], hash_[:8]]
    if config.low_resolution is not None:
        parts.append(f"of_{Path(config.low_resolution).stem}")
    return "-".join(parts)


def _concatenate(parts: list[np.ndarray], checkpoint: LoadedCheckpoint) -> np.ndarray:
    """Return the images [num_images, H, W, C] of this process; num_images is 0 where it has no share."""
    side, channels = checkpoint.spec.image_size, checkpoint.spec.channels
    return np.concatenate(parts) if parts else np.empty((0, side, side, channels), np.uint8)


if __name__ == "__main__":
    start("sample")
