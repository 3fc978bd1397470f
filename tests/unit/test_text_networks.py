"""Networks of text of other programs draw prompts, are trained, and are exported with their text encoder named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fast_hydra
import numpy as np
import pytest
import torch
from conftest import InProcess, json_lines, prepared_by
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from foreign_files import change_json
from omegaconf import OmegaConf
from small_text_encoders import LENGTH, write_small_clip
from test_house import composed
from test_sd_folders import OF_DIFFUSERS, PROCESS, folder_of, same
from torch import Tensor

from data.manifest import TextSpec
from data.text_encoders import CLIPText
from launch.builders.build import LoadedCheckpoint
from launch.builders.components import build
from launch.builders.conditioned import conditioned
from launch.builders.foreign import load_foreign, read_foreign
from launch.builders.named_encoder import NamedEncoder
from launch.builders.saved_networks import model_at
from launch.builders.text_folder import write_text_folder
from launch.command.settings import SampleSettings
from model.diffusers_weights import scheduler_settings, write_config
from model.family import Facts, PipelineParts

PROMPTS = ["a drawing of a three", "digit seven"]
NEGATIVE = "the number of numbers"
OF_SAMPLE = ["diffusion=sd", "runtime=cpu", "diffusion/sampler=ddim", "sampler.steps=ddim10", "num_images=2"]


def pipeline_in(folder: Path, channels: int = 4) -> Path:
    """Write a pipeline of Stable Diffusion in diffusers' layout, small and random, without an autoencoder."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"cross_attention_dim": 16, "in_channels": channels, "out_channels": channels}
    shape |= {"block_out_channels": [32, 32], "norm_num_groups": 32}  # the groups of CompVis' program
    folder_of(UNet2DConditionModel(**(OF_DIFFUSERS | shape)).eval(), folder)
    clip = write_small_clip(folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt"):
        (clip / name).rename(folder / "tokenizer" / name)
    settings = scheduler_settings(PROCESS.tables.betas.tolist())
    write_config(folder / "scheduler/scheduler_config.json", "DDIMScheduler", settings)
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline_in(tmp_path_factory.mktemp("sd") / "pipeline")


def loaded(*words: str) -> tuple[SampleSettings, LoadedCheckpoint]:
    """Return the settings of `sample` with these words, and its foreign checkpoint with the prompts."""
    config: Any = OmegaConf.to_object(fast_hydra.composed("sample", *OF_SAMPLE, *words))
    runtime = build(config.runtime, precision="fp32")
    return config, conditioned(load_foreign(config, runtime), config, runtime)


@torch.no_grad()
def latents_of(noise: Tensor, *words: str) -> Tensor:
    """Return what `sample` makes of noise, before it is decoded."""
    config, checkpoint = loaded(f"prompts={json.dumps(PROMPTS)}", "data.autoencoder.channels=4", *words)
    generator = checkpoint.generator(config, 0, build(config.runtime, precision="fp32"))
    condition = checkpoint.conditions.embedded(checkpoint.conditions.in_turn(len(noise)))
    return generator.sampler(generator.denoiser, checkpoint.objective, lambda draw: noise, condition)


def of_diffusers(folder: Path, noise: Tensor, **settings: Any) -> Tensor:
    """Return the latents of diffusers' own pipeline by DDIM at the steps of `ddim10`."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    # Here embeddings are rounded to float16, as shards store them; guidance multiplies the difference.
    encoder.register_forward_hook(lambda module, given, made: (made.last_hidden_state.half().float(),))
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    parts: dict[str, Any] = {"text_encoder": encoder, "tokenizer": tokenizer, "vae": None, "safety_checker": None}
    parts["unet"] = UNet2DConditionModel.from_pretrained(folder / "unet")
    parts["scheduler"] = DDIMScheduler.from_pretrained(folder / "scheduler", steps_offset=1)
    theirs = StableDiffusionPipeline(**parts, feature_extractor=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    # The pipeline itself sets an offset of 1, with steps 1, 101, ...; here they are those of `ddim10`.
    theirs.scheduler = DDIMScheduler.from_config(theirs.scheduler.config, steps_offset=0, set_alpha_to_one=True)
    made: Tensor = theirs(PROMPTS, latents=noise, num_inference_steps=10, output_type="latent", **settings).images
    return made


def test_a_pipelines_prompts_give_the_latents_of_diffusers_own_loop(pipeline: Path) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    guided = ["diffusion/guidance=classifier_free", "guidance.scale=4"]
    plain = latents_of(noise, f"checkpoint={pipeline}")
    torch.testing.assert_close(plain, of_diffusers(pipeline, noise, guidance_scale=1.0), rtol=0, atol=1e-4)
    ours = latents_of(noise, f"checkpoint={pipeline}", *guided)
    torch.testing.assert_close(ours, of_diffusers(pipeline, noise, guidance_scale=4.0), rtol=0, atol=1e-4)
    away = latents_of(noise, f"checkpoint={pipeline}", *guided, f"negative_prompt={NEGATIVE}")
    theirs = of_diffusers(pipeline, noise, guidance_scale=4.0, negative_prompt=[NEGATIVE] * 2)
    torch.testing.assert_close(away, theirs, rtol=0, atol=1e-4)
    assert min(*((one - other).abs().max() for one, other in ((plain, ours), (ours, away)))) > 1e-3


def test_a_file_a_part_and_a_folder_of_a_pipeline_take_the_encoder_that_is_given_or_their_own(
    pipeline: Path, tmp_path: Path, in_process: InProcess
) -> None:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = latents_of(noise, f"checkpoint={pipeline}")
    given = ["data/text_encoder=clip", f"text_encoder.folder={pipeline / 'text_encoder'}"]
    assert torch.equal(latents_of(noise, f"checkpoint={pipeline / 'unet'}"), expected)
    shown = in_process("export", f"checkpoint={pipeline}", "to=sd", "out=a.ckpt")
    assert "is for captions by" not in shown  # nothing states it
    of_file = ["checkpoint=a.ckpt", "foreign.num_heads=2", "foreign.latent_size=8"]
    assert torch.equal(latents_of(noise, *of_file, *given), expected)
    job = ["sample", *OF_SAMPLE, "data.autoencoder.channels=4", "out=x"]
    shown = in_process(*job, *of_file, f"prompts={PROMPTS[1]}", expect=2)
    assert "whose text encoder is not given; give it as data/text_encoder=clip" in shown
    assert 'give them as prompts="..."' in in_process(*job, f"checkpoint={pipeline}", expect=2)
    assert "labels is given" in in_process(*job, f"checkpoint={pipeline}", "labels=[3]", expect=2)
    write_small_clip(tmp_path / "other", hidden_size=24)
    wide = ["data/text_encoder=clip", "text_encoder.folder=other"]
    shown = in_process(*job, f"checkpoint={pipeline}", *wide, f"prompts={PROMPTS[1]}", expect=2)
    assert "tokens of 24" in shown
    assert "16" in shown
    (tmp_path / "damaged").mkdir()
    shutil.copytree(pipeline, tmp_path / "damaged", dirs_exist_ok=True)
    (tmp_path / "damaged/text_encoder/model.safetensors").write_bytes(b"no weights")
    shown = in_process(*job, "checkpoint=damaged", f"prompts={PROMPTS[1]}", expect=2)
    assert "damaged/text_encoder/model.safetensors does not hold a readable CLIP" in shown


TRAIN = ["train", "data.shards=shards", "data/condition=text", "total_steps=2", "batch_size=4", "log_every=1"]
TRAIN += ["sample_every=null", "evaluate_every=null", "train/logger=none", "runtime=cpu", "precision=fp32"]
ENCODER = ["data/text_encoder=clip", "text_encoder.folder=clip"]
SAMPLE = ["sample", "runtime=cpu", "num_images=2", "sampler.steps=3", "prompts=[a drawing of a three,digit seven]"]
SAMPLE += ["diffusion/guidance=classifier_free", "model/autoencoder=identity_grey"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the digits' shards, their captions' encoder, and a small network for such latents."""
    where = tmp_path_factory.mktemp("captioned")
    write_small_clip(where / "clip")
    pipeline_in(where / "pipeline", channels=1)
    prepared_by("encode", "data.shards=shards", "data/captions=digits", *ENCODER, cwd=where)
    return where


@pytest.fixture
def here(shards: Path, tmp_path: Path, in_process: InProcess) -> InProcess:
    """Return a function that runs the command in a folder with the shards and the networks."""
    for name in ("shards", "clip", "pipeline"):
        (tmp_path / name).symlink_to(shards / name)
    return in_process


def drawn(name: str) -> np.ndarray:
    found: np.ndarray = np.load(f"{name}.npz", allow_pickle=False)["arr_0"]
    return found


def test_a_run_starts_from_a_pipelines_network_and_its_exports_name_the_text_encoder(here: InProcess) -> None:
    words = ["model=sd_unet_digits", "model.multipliers=[1,1]", "model.num_groups=32", "diffusion=sd"]
    words += ["+model.num_heads=2", "model.head_dim=null", "condition.attend_to_padding=true"]
    words += ["init_from=pipeline", "run_dir=run"]
    here(*TRAIN, *words)
    own = here("sample", "checkpoint=run", *SAMPLE[1:-1], "out=own")
    assert "2 images of run" in own
    shown = here("export", "checkpoint=run", "to=diffusers", "out=folder")
    spec = str(CLIPText("clip").spec())
    assert f"note: it is for captions by the text encoder {spec}, which is not exported" in shown
    assert "attends to padding" not in shown
    named = json.loads(Path("folder/text_encoder.json").read_text())
    assert (named["encoder"]["layer"], named["encoder"]["length"]) == ("last", LENGTH)
    assert here("export", "checkpoint=run", "to=sd", "out=file.ckpt").count("which is not exported") == 1
    of_file = ["foreign.num_heads=2", "foreign.latent_size=8"]
    for name, more in (("folder", []), ("file.ckpt", of_file)):
        here(*SAMPLE, f"checkpoint={name}", "diffusion=sd", *ENCODER, *more, "out=again")
        assert np.array_equal(drawn("again"), drawn("own"))
        here("export", f"checkpoint={name}", *more, "to=diffusers", "out=copy")  # keeps the name
        assert Path("copy/text_encoder.json").read_bytes() == Path("folder/text_encoder.json").read_bytes()
        shutil.rmtree("copy")
    write_small_clip(Path("other"), num_hidden_layers=2)
    words = ["diffusion=sd", "data/text_encoder=clip", "text_encoder.folder=other", "out=x"]
    shown = here(*SAMPLE, "checkpoint=folder", *words, expect=2)
    assert f"but the captions were tokenized for {spec}; give the folder" in shown
    change_json(Path("folder/text_encoder.json"), class_dropout=0.5)
    shown = here(*SAMPLE, "checkpoint=folder", "diffusion=sd", *ENCODER, "out=x", expect=2)
    assert "text_encoder.json is damaged: its content has sha256" in shown


@pytest.mark.parametrize("block", ["in_context", "adaln_zero"])
def test_a_dit_of_text_is_exported_and_read_back_bit_for_bit(here: InProcess, block: str) -> None:
    size = ["model.width=16", "model.depth=2", "model.num_heads=2", "model.patch_size=4"]
    embedding = "pooled_text" if block == "adaln_zero" else "text"
    network = [*size, f"model/block={block}", f"+model/embedding={embedding}"]
    here(*TRAIN, *network, "run_dir=run")
    shown = here("export", "checkpoint=run", "to=diffusers", "weights=model", "out=folder")
    assert "note: diffusers has no class for this network, so it cannot load the folder" in shown
    assert "note: it is for captions by the text encoder clip_text sha256:" in shown
    assert json.loads(Path("folder/model_index.json").read_text())["_class_name"] == "DitscaleTextPipeline"
    found = read_foreign("folder", "ema", Facts()).model
    (checkpoint,) = Path("run/checkpoints").iterdir()
    assert same(found.state_dict(), model_at(checkpoint, "model").state_dict())
    here("sample", "checkpoint=run", *SAMPLE[1:-1], "weights=model", "out=own")
    here(*SAMPLE, "checkpoint=folder", *ENCODER, "out=again")
    assert np.array_equal(drawn("again"), drawn("own"))
    assert "which is not given" not in here(*TRAIN, *network, "init_from=folder", "run_dir=next", "total_steps=1")
    for to in ("reference", "diffusers"):
        shown = here("export", "checkpoint=folder", f"to={to}", "out=x", expect=2)
        assert "The released DiT has only networks with labels; keep this one in our format" in shown
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config["model"].update(_target_="os.system"), "which a checkpoint may not ask for"),
        (lambda config: config["model"].update(width="${oc.env:HOME}"), "without interpolations"),
        (lambda config: config["model"].update(width=32), "folder/transformer: These are not this network's weights"),
        (lambda config: config["model"].update(width=2**40), "cannot be built"),
        (lambda config: config.update(outputs_per_channel=10**9), "outputs_per_channel is 1000000000"),
        (lambda config: config.update(more=1), "has a field more"),
        (lambda config: config["model"].pop("embedding"), "is of a network without text"),
    ],
    ids=["code", "interpolation", "another width", "too large", "outputs", "unknown", "no text"],
)
def test_a_config_that_asks_for_anything_else_is_refused(
    exported: Path, tmp_path: Path, change: Callable[[Any], object], words: str
) -> None:
    shutil.copytree(exported, tmp_path / "folder")
    path = tmp_path / "folder/transformer/config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="transformer") as caught:
        read_foreign(str(tmp_path / "folder"), "ema", Facts())
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an exported folder of a DiT of text."""
    parts = ["model/block=in_context", "+model/embedding=text", "model.width=16", "model.depth=2", "model.num_heads=2"]
    section: Any = composed("train", *parts)["model"]
    section |= {"latent_size": 8, "channels": 1, "num_classes": 0}
    section["embedding"] |= {"length": LENGTH, "dim": 16, "pooled_dim": 16}
    named = NamedEncoder(TextSpec("clip_text", "sha256:0", "last", "fp32", LENGTH, 16, 16), False, 0.1)
    folder = tmp_path_factory.mktemp("exported")
    write_text_folder(build(section), section, folder, named, PipelineParts())
    return folder


def test_the_recipes_of_text_train_on_shards_of_captions_and_the_second_resolution_from_the_first(
    here: InProcess,
) -> None:
    small = ["data.shards=shards", "total_steps=1", "batch_size=4", *TRAIN[6:]]
    dit = ["model.width=16", "model.depth=2", "model.num_heads=2"]
    unet = ["model.width=32", "model.multipliers=[1,1]", "model.attention_at=[2]", "model.context_dim=16"]
    unet += ["model.channels=1", "model.context_length=12", "model.layers=1"]
    for recipe, network in (("pixart_like", dit), ("sd_unet", unet)):
        here("train", f"experiment=recipes/{recipe}", *small, *network, "run_dir=run")
        shown = here("train", f"experiment=recipes/{recipe}_512", *small, *network, "init_from=run", "run_dir=next")
        assert "error" not in shown
        for name in ("run", "next"):
            assert json.loads(Path(name, "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1
            shutil.rmtree(name)


def test_a_pipeline_is_measured_with_prompts(here: InProcess) -> None:
    words = ["checkpoint=pipeline", "data=digits", "diffusion=sd", "diffusion/sampler=ddim", "sampler.steps=2"]
    words += ["prompts=[a drawing of a three,digit seven]", "evaluation.num_images=4", "evaluation.features.epochs=1"]
    here("evaluate", *words, "runtime=cpu", "metrics=[frechet]")
    (record,) = json_lines(Path("pipeline").resolve().parent / "pipeline-evaluations.jsonl")
    assert record["num_images"] == 4
    assert record["frechet_distance"] > 0
    assert record["captions_hash"]
