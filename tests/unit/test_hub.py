"""Weights are read by their name on the Hugging Face hub, from its cache in the hub library's layout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import InProcess, command, run_process
from foreign_files import COMMIT, assert_same_weights, hub_cache, hub_cache_of, random_model, saved
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects
from small_text_encoders import write_small_clip
from test_foreign_jobs import SAMPLE, digits_model, images, train
from test_text_networks import pipeline_in

from launch.builders.foreign import read_foreign
from launch.builders.hub import PATTERNS, TEXT_PATTERNS, require_whole
from model.diffusers_weights import to_diffusers
from model.family import Facts

NAME = "facebook/DiT-XL-2-256"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache of the hub, with access to the hub switched off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert constants.HF_HUB_OFFLINE
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_sampling_and_training_take_a_name_of_the_hub(
    digits: Path, tmp_path: Path, cache: Path, in_process: InProcess
) -> None:
    hub_cache(cache, NAME, random_model())
    shown = in_process(*SAMPLE, f"checkpoint={NAME}", "foreign.frequency_shift=0")
    assert f"note: {NAME} is its commit {COMMIT[:12]} on the Hugging Face hub." in shown
    (written,) = (tmp_path / "samples").glob("*.npz")  # here, and not in the cache
    assert written.name.startswith("DiT-XL-2-256-seed0-ddpm2")
    to_diffusers(random_model(), tmp_path / "own")
    in_process(*SAMPLE, "checkpoint=own", "foreign.frequency_shift=0", "out=own_images")
    assert np.array_equal(images(str(written.with_suffix(""))), images("own_images"))
    hub_cache(cache, "someone/digits", digits_model())
    shown = train(in_process, digits, "init_from=someone/digits", "run_dir=run")
    assert f"note: someone/digits is its commit {COMMIT[:12]} on the Hugging Face hub." in shown


def test_a_fresh_process_finds_the_cache_by_its_variable(tmp_path: Path) -> None:
    hub_cache(tmp_path / "hub", NAME, random_model())
    words = [*SAMPLE, f"checkpoint={NAME}", "out=x"]
    run_process(command(*words), tmp_path, 0, {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"})
    assert (tmp_path / "x.npz").is_file()


def test_a_local_path_wins_over_a_name_of_the_hub(tmp_path: Path, cache: Path, in_process: InProcess) -> None:
    hub_cache(cache, NAME, random_model())
    (tmp_path / "facebook").mkdir()
    saved(tmp_path / NAME, {"state_dict": {}})
    assert f"{NAME} has no table of weights: nothing in it is named x_embedder" in in_process(
        *SAMPLE, f"checkpoint={NAME}", "out=x", expect=2
    )


@pytest.mark.parametrize("job", ["sample", "train", "export"])
def test_a_name_that_is_neither_here_nor_in_the_cache_is_refused_in_both_readings(
    cache: Path, digits: Path, job: str, in_process: InProcess
) -> None:
    if job == "train":
        shown = train(in_process, digits, "init_from=runs/mistyped", "run_dir=x", expect=2)
    else:
        shown = in_process(job, "checkpoint=runs/mistyped", "out=x", *(["to=diffusers"] * (job == "export")), expect=2)
    assert (
        "runs/mistyped is neither a file or folder here nor a model of the Hugging Face hub that can be read" in shown
    )
    assert f"the hub is switched off by HF_HUB_OFFLINE, and its cache {cache} does not have it" in shown
    assert "give a path that exists, or a name that the hub or its cache has" in shown
    assert len([line for line in shown.splitlines() if "error:" in line]) == 1


def test_what_the_cache_holds_of_a_name_must_be_a_dit_in_safetensors(cache: Path) -> None:
    repository = hub_cache(cache, NAME, random_model())
    inner = repository / "snapshots" / COMMIT / "transformer"
    weights = inner / "diffusion_pytorch_model.safetensors"
    blob = weights.resolve()
    weights.rename(inner / "diffusion_pytorch_model.bin")  # a pickle, as far as the name goes
    with pytest.raises(
        ValueError, match=r"has diffusion_pytorch_model.bin, but no diffusion_pytorch_model.safetensors"
    ):
        read_foreign(NAME, "ema", Facts())
    (inner / "diffusion_pytorch_model.bin").rename(weights)
    blob.rename(blob.with_suffix(".incomplete"))  # as an interrupted download leaves it
    with pytest.raises(ValueError, match="holds no network of diffusers in safetensors"):
        read_foreign(NAME, "ema", Facts())
    (inner / "config.json").unlink()
    with pytest.raises(ValueError, match=r"is not the folder of a diffusers DiT or U-Net: it has no config.json"):
        read_foreign(NAME, "ema", Facts())


def test_a_flipped_bit_in_the_cache_is_found_in_weights_and_configs(cache: Path) -> None:
    """Flip bits, since the cache names each file by its hash."""
    repository = hub_cache(cache, NAME, random_model())
    inner = repository / "snapshots" / COMMIT / "transformer"
    assert_same_weights(read_foreign(NAME, "ema", Facts(frequency_shift=0)).model, random_model())
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        blob = (inner / name).resolve()
        whole = blob.read_bytes()
        damaged = bytearray(whole)
        damaged[-20] ^= 4
        blob.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name} is damaged: its hash is \w+, but the hub's is {blob.name}"):
            read_foreign(NAME, "ema", Facts())
        blob.write_bytes(whole)
    require_whole(inner / "config.json")


def test_nothing_is_fetched_that_could_run_code_or_is_another_part() -> None:
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    others = [
        "README.md",
        "pipeline.py",
        "transformer/diffusion_pytorch_model.bin",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/model.py",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.py",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=PATTERNS)) == wanted
    of_text = [
        "config.json",
        "merges.txt",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "spiece.model",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer.json",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "vocab.json",
    ]
    others += ["flax_model.msgpack", "model.fp16.safetensors", "pytorch_model.bin", "tf_model.h5", "v1-5.safetensors"]
    others += ["text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "tokenizer/tokenization.py"]
    others += ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"]
    assert list(filter_repo_objects([*of_text, *others], allow_patterns=TEXT_PATTERNS)) == of_text


CLIP = "openai/clip-vit-large-patch14"
OF_TEXT = ["data.shards=shards", "data/captions=digits", "data/text_encoder=clip"]


def test_a_text_encoder_of_the_hub_is_pinned_by_encode_and_used_by_training_and_sampling(
    tmp_path: Path, cache: Path, in_process: InProcess
) -> None:
    repository = hub_cache_of(cache, CLIP, write_small_clip(cache / "written"))
    in_process("encode", *OF_TEXT, f"text_encoder.folder={CLIP}")
    pinned = f"{CLIP}@{COMMIT}"
    assert json.loads(Path("shards/data.json").read_text())["encode"]["text_encoder"]["folder"] == pinned
    (repository / "refs/main").write_text("f" * 40)  # the hub has a later commit now
    words = ["data.shards=shards", "data/condition=text", "model/block=in_context", "+model/embedding=text"]
    words += ["model.width=16", "model.depth=2", "model.num_heads=2", "total_steps=1", "batch_size=4", "runtime=cpu"]
    words += ["sample_every=null", "evaluate_every=null", "train/logger=none", "precision=fp32", "run_dir=run"]
    in_process("train", *words)
    sample = [*SAMPLE[:4], "prompts=digit seven"]
    in_process(*sample, "checkpoint=run", "out=a")
    in_process(*sample, "checkpoint=run", "data/text_encoder=clip", f"text_encoder.folder={pinned}", "out=b")
    assert np.array_equal(images("a"), images("b"))
    shown = in_process("encode", *OF_TEXT, "text_encoder.folder=models/mistyped", expect=2)
    assert "models/mistyped is neither a file or folder here nor a model of the Hugging Face hub that can be" in shown
    blob = (repository / "snapshots" / COMMIT / "model.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    shown = in_process(*sample, "checkpoint=run", "out=c", expect=2)
    assert "model.safetensors is damaged: its hash is" in shown


def test_a_pipeline_of_the_hub_has_the_text_encoder_of_its_own_commit(cache: Path, in_process: InProcess) -> None:
    shutil.copytree(pipeline_in(cache / "written", channels=1), "here")
    hub_cache_of(cache, "someone/stable-diffusion", cache / "written")
    words = ["diffusion=sd", "data.autoencoder.channels=1", "prompts=digit seven", "num_images=2"]
    for name, out in (("someone/stable-diffusion", "a"), ("here", "b")):
        shown = in_process(*SAMPLE[:-1], *words, f"checkpoint={name}", f"out={out}")
        own = f"someone/stable-diffusion@{COMMIT}" if out == "a" else "here/text_encoder"
        assert f"note: {name}: its own text encoder is used, {own}." in shown
    assert np.array_equal(images("a"), images("b"))
    in_process(*SAMPLE[:-1], *words, f"checkpoint=someone/stable-diffusion@{COMMIT}", "out=c")
    assert np.array_equal(images("a"), images("c"))
