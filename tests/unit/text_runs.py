"""Train a small network on the digits with captions, for the tests of jobs with prompts."""

from pathlib import Path

from conftest import TINY_RUN, prepared_by
from small_text_encoders import write_small_clip

CONDITION = ["data/condition=text", "model/block=in_context", "+model/embedding=text"]


def write_text_run(folder: Path, *more: str) -> Path:
    """Return the run ``run`` of 4 steps in a folder, beside its text encoder ``clip`` and its shards ``shards``."""
    encoder = encoder_words(write_small_clip(folder / "clip"))
    prepared_by("encode", "data.shards=shards", "data/captions=digits", *encoder, cwd=folder)
    prepared_by(*training_words(folder), *encoder, "run_dir=run", *more, cwd=folder)
    return folder / "run"


def encoder_words(clip: Path) -> list[str]:
    """Return the words of a command that name a text encoder."""
    return ["data/text_encoder=clip", f"text_encoder.folder={clip}"]


def training_words(folder: Path) -> list[str]:
    """Return the words that train on the shards in a folder, without the text encoder and the run's folder."""
    words = ["train", *TINY_RUN, *CONDITION, f"data.shards={folder / 'shards'}", "total_steps=4", "checkpoint_every=4"]
    return [*words, "optimizer.lr=1e-2", "sampler.steps=3", "diffusion.schedule.num_steps=100", "log_every=4"]
