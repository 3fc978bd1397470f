"""Networks train on captions: one of a sample's captions on each visit, the empty one where it is dropped."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines, prepared_by
from safetensors.torch import load_file
from small_text_encoders import write_small_clip

from core.draws import Philox
from data.batches import TrainingBatches
from data.conditions import Prompts, Samples, with_dropped
from data.order import WindowedOrder
from data.shards import MappedShards
from data.text_conditions import TOKEN_IDS, TextCondition
from data.text_encoders import CLIPText, TextEncoder
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from model.autoencoder import IdentityAutoencoder
from model.text_embedding import MASK, POOLED, TOKENS

TEXT = ["data/condition=text", "class_dropout=0.3", "train/ema=short_run"]
TRAINED = ["total_steps=6", "checkpoint_every=3", "log_every=1", *TEXT]
IN_CONTEXT = ["model/block=in_context", "+model/embedding=text"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a text encoder, and captioned digits with stored embeddings of it."""
    folder = tmp_path_factory.mktemp("captioned")
    write_small_clip(folder / "clip")
    encoder = ["data/text_encoder=clip", f"text_encoder.folder={folder / 'clip'}", "text_embeddings=true"]
    prepared_by(
        "encode", "data.shards=shards", "data/captions=digits", *encoder, "data.samples_per_shard=600", cwd=folder
    )
    return folder


@pytest.fixture(scope="module")
def shards(place: Path) -> MappedShards:
    return MappedShards(place / "shards")


def source(encoder: TextEncoder, **settings: Any) -> TextCondition:
    """Return a source whose encoder lies on the CPU."""
    made = TextCondition(**settings)
    made.prepare(lambda module: module, lambda: encoder)
    return made


def test_a_caption_is_drawn_on_each_visit_from_seed_and_position_alone(place: Path, shards: MappedShards) -> None:
    texts, rows = source(CLIPText(str(place / "clip"))), np.full(400, 7)
    positions = np.arange(400) + 12345
    seen = texts.of_samples(Samples(shards, rows, positions, Philox(3)))
    ids = CLIPText(str(place / "clip")).tokenize(shards.captions_of(7)).ids
    which = [int(np.flatnonzero((ids == row).all(axis=1))[0]) for row in seen[TOKEN_IDS].numpy()]
    assert len(Counter(which)) == len(shards.captions_of(7)) > 1
    assert max(Counter(which).values()) < 1.5 * len(rows) / len(ids)
    backwards = texts.of_samples(Samples(shards, rows, positions[::-1], Philox(3)))
    assert torch.equal(backwards[TOKEN_IDS].flip(0), seen[TOKEN_IDS])
    assert not torch.equal(texts.of_samples(Samples(shards, rows, positions, Philox(4)))[TOKEN_IDS], seen[TOKEN_IDS])
    first = texts.of_samples(Samples(shards, rows))  # where nothing is drawn
    assert (first[TOKEN_IDS].numpy() == ids[0]).all()


def test_a_dropped_caption_is_the_empty_caption_however_it_is_read(place: Path, shards: MappedShards) -> None:
    clip, rows = CLIPText(str(place / "clip")), np.array([4, 5, 6, 7])
    x_0, dropped = torch.zeros(4, 1, 8, 8), np.array([False, True, False, True])
    found = []
    for stored in (False, True):
        texts = source(clip, stored=stored)
        condition = with_dropped(texts, texts.of_samples(Samples(shards, rows)), dropped)
        found.append(texts.embedded(texts.whole(condition, shards, x_0)))
    empty = clip.tokenize([""])
    of_encoder = clip.encode(torch.from_numpy(empty.ids), torch.from_numpy(empty.mask))
    null = source(clip).null({name: torch.zeros_like(value) for name, value in found[0].items()})
    for name, value in zip((TOKENS, MASK, POOLED), of_encoder, strict=True):
        kept = value if name == MASK else value.half()
        for condition in (*found, null):
            torch.testing.assert_close(condition[name][1:2], kept, rtol=2e-3, atol=1e-6)
        assert not torch.equal(found[0][name][0], found[0][name][1])
        torch.testing.assert_close(found[0][name], found[1][name], rtol=2e-3, atol=1e-6)


def test_a_negative_prompt_takes_the_place_of_the_empty_caption_in_guidance_alone(place: Path) -> None:
    texts = source(CLIPText(str(place / "clip")), prompts=["a drawing of a three", "digit seven"])
    against = texts.prompted(None, "digit seven", "run")
    condition = texts.embedded(texts.in_turn(4))
    for name, value in against.null(condition).items():
        assert torch.equal(value[0], value[3])
        torch.testing.assert_close(value[0], condition[name][1], rtol=2e-3, atol=1e-6)
    assert not torch.equal(texts.null(condition)[TOKENS], against.null(condition)[TOKENS])
    assert texts.texts(texts.in_turn(3)) == ["a drawing of a three", "digit seven", "a drawing of a three"]
    assert (
        against.prompted(Prompts(("three",)), None, "run")
        .null(condition)[TOKENS]
        .equal(against.null(condition)[TOKENS])
    )


@pytest.mark.parametrize("stable_diffusion", [False, True])
def test_the_tokens_behind_a_captions_end_are_masked_unless_padding_is_attended_to(
    place: Path, stable_diffusion: bool
) -> None:
    texts = source(CLIPText(str(place / "clip")), prompts=["three"], attend_to_padding=stable_diffusion)
    assert bool(texts.embedded(texts.in_turn(1))[MASK].all()) is stable_diffusion


def test_a_batch_over_several_windows_of_the_order_has_the_captions_of_its_rows(place: Path) -> None:
    clip = CLIPText(str(place / "clip"))
    found = []
    for stored in (False, True):
        texts, opened = source(clip, stored=stored), MappedShards(place / "shards")
        order, autoencoder = WindowedOrder(0, opened.counts, 1), IdentityAutoencoder(1)
        settings = {"seed": 0, "batch_size": 700, "class_dropout": 0.2, "flip": False}
        times = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance()).times
        batch = TrainingBatches(opened, order, autoencoder, texts, times=times, **settings).batch(0)
        found.append(texts.embedded(batch.condition))
        opened.close()
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=2e-3, atol=1e-6)
    assert len(found[0][POOLED].unique(dim=0)) > 10


def state_of(run: Path) -> dict[str, torch.Tensor]:
    newest = run / "checkpoints/step_00000006"
    return {
        f"{path.stem}/{name}": value
        for path in sorted(newest.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def test_stored_embeddings_and_those_of_the_step_train_the_same_run_and_a_resumed_run_is_the_same_to_the_bit(
    place: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = ["train", *TINY_RUN, f"data.shards={place / 'shards'}", *TRAINED, *IN_CONTEXT, "runtime=cpu"]
    in_process(*words, "run_dir=stored")
    in_process(*words, "run_dir=online", "condition.stored=false")
    losses = [[line["loss"] for line in json_lines(tmp_path / run / "metrics.jsonl")] for run in ("stored", "online")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    stored, online = state_of(tmp_path / "stored"), state_of(tmp_path / "online")
    assert stored.keys() == online.keys()
    for name, value in stored.items():
        if name.startswith(("model/", "ema/")):
            assert (value - online[name]).norm() <= 1e-5 * value.norm(), name
    for kind in ("stored", "online"):
        shutil.copytree(tmp_path / kind, tmp_path / f"again-{kind}")
        shutil.rmtree(tmp_path / f"again-{kind}/checkpoints/step_00000006")
        more = [] if kind == "stored" else ["condition.stored=false"]
        assert "continues from step 3" in in_process(*words, f"run_dir=again-{kind}", *more)
        once, again = state_of(tmp_path / kind), state_of(tmp_path / f"again-{kind}")
        assert all(torch.equal(value, again[name]) for name, value in once.items())


@pytest.mark.parametrize(
    "network",
    [
        ["model/block=adaln", "+model/embedding=pooled_text"],
        ["model/block=adaln_zero", "+model/embedding=pooled_text"],
        ["model/block=cross_attention", "+model/embedding=text"],
        ["model/block=adaln_zero_shared_cross", "+model/embedding=text", "model.embedding.timestep_token=false"],
    ],
    ids=lambda words: words[0].split("=")[1],
)
def test_every_block_trains_on_captions_and_draws_prompts(
    place: Path, tmp_path: Path, in_process: InProcess, network: list[str]
) -> None:
    words = ["train", *TINY_RUN, f"data.shards={place / 'shards'}", *TEXT, *network, "runtime=cpu", "run_dir=run"]
    in_process(*words, "total_steps=2", "checkpoint_every=2", "sample_every=2")
    assert (tmp_path / "run/samples/step_00000002.png").is_file()
    in_process("sample", "checkpoint=run", "prompts=[digit seven,a three]", "num_images=2", "sampler.steps=2", "out=x")
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (2, 8, 8, 1)


def test_a_diverged_run_on_captions_is_replayed(place: Path, tmp_path: Path, in_process: InProcess) -> None:
    words = ["train", *TINY_RUN, f"data.shards={place / 'shards'}", *TRAINED, *IN_CONTEXT, "condition.stored=false"]
    in_process(*words, "run_dir=run", "optimizer.lr=1e30", "runtime=cpu", expect=1)
    (dump,) = tmp_path.glob("run/nonfinite_*")
    shown = in_process("train", f"replay={dump}")
    assert "nonfinite_00000001: step 1, the positions 0 to 15" in shown
    assert "samples: 16 of 16" in shown or "samples: no sample alone" in shown


def test_a_text_encoder_other_than_that_of_the_captions_is_refused_with_both_hashes(
    place: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = ["train", *TINY_RUN, f"data.shards={place / 'shards'}", *TRAINED, *IN_CONTEXT, "runtime=cpu"]
    other = ["data/text_encoder=clip", f"text_encoder.folder={place / 'clip'}", "text_encoder.layer=penultimate"]
    shown = in_process(*words, "condition.stored=false", "run_dir=run", *other, expect=2)
    assert not (tmp_path / "run").exists()
    assert shown.count("sha256:") == 2
    assert "layer penultimate" in shown
    assert "layer last" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["model.embedding.dim=24"], "model.embedding.dim is 24, but that of the shards' text encoder is 16"),
        (["condition.length=77"], "condition.length is 77, but the captions of"),
        (["condition.prompts=[a,b]", "condition.prompt_classes=[1]"], "has 2 texts, but 1 classes"),
        (["data/condition=class_labels"], "set data/condition=text"),
        (["~model.embedding"], "The network DiT embeds nothing, but conditions of data/condition have text"),
    ],
)
def test_settings_that_do_not_fit_the_captions_are_refused(
    place: Path, tmp_path: Path, in_process: InProcess, words: list[str], said: str
) -> None:
    given = ["train", *TINY_RUN, f"data.shards={place / 'shards'}", *TRAINED, *IN_CONTEXT, "run_dir=run"]
    shown = in_process(*given, *words, expect=2)
    assert said in shown
    assert not (tmp_path / "run").exists()


def test_shards_without_token_ids_are_refused(digits: Path, in_process: InProcess) -> None:
    given = ["train", *TINY_RUN, f"data.shards={digits}", *TRAINED, *IN_CONTEXT, "run_dir=run"]
    assert "data/condition=text needs token ids of captions, but" in in_process(*given, expect=2)


def test_stable_diffusions_unet_trains_and_obeys_no_label(place: Path, tmp_path: Path, in_process: InProcess) -> None:
    words = ["train", f"data.shards={place / 'shards'}", *TEXT, "model=sd_unet_digits", "runtime=cpu", "run_dir=run"]
    words += ["condition.attend_to_padding=true", "total_steps=2", "sample_every=2", "batch_size=4", "precision=fp32"]
    in_process(*words, "train/logger=none")
    shown = in_process("sample", "checkpoint=run", "labels=[3]", "num_images=1", expect=2)
    assert "labels is given, but run/checkpoints/step_00000002 is conditioned on texts" in shown
