"""An exported folder is a diffusers pipeline that generates the same images as this program."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from conftest import TINY_RUN, InProcess
from diffusers import AutoencoderKL, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler
from foreign_files import assert_same_weights, random_model
from pictures import make_autoencoder, make_image_folder
from test_foreign_jobs import train
from torch import Tensor

from data.conditions import ClassLabels
from diffusion.diffusers_samplers import DPMSolverPP
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDIM, Sampler
from diffusion.schedules import CosineSchedule, LinearSchedule
from diffusion.variances import LearnedRangeVariance
from launch.builders.diffusers_folder import read_class_names, read_diffusers_folder
from launch.command.app import CONF
from model.autoencoder_kl import DiffusersAutoencoder
from model.diffusers_weights import to_diffusers
from model.dit import DiT
from model.starting import replace_label_table

PROCESS = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
AUTOENCODER = {"block_out_channels": (8,), "norm_num_groups": 4, "latent_channels": 4, "sample_size": 8}


def opened(folder: Path, **parts: Any) -> DiTPipeline:
    pipeline = DiTPipeline.from_pretrained(folder, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pixels() -> SimpleNamespace:
    """Stand in for the decoder of a network in pixel space, as docs/model.md has it."""
    return SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0), decode=lambda z: SimpleNamespace(sample=z))


def of_pipeline(pipeline: DiTPipeline, labels: list[int], steps: int, guidance: float = 1.0) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    return pipeline(
        labels, guidance_scale=guidance, generator=noise, num_inference_steps=steps, output_type="pt"
    ).images


def of_ours(model: Any, labels: list[int], sampler: Sampler, process: GaussianDiffusion = PROCESS) -> Tensor:
    noise = torch.randn(len(labels), 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = sampler(model, process, lambda draw: noise, {"label": torch.tensor(labels)})
    return (latents / 2 + 0.5).clamp(0, 1)


def test_the_pipeline_makes_the_images_of_ddim_with_its_own_steps(tmp_path: Path) -> None:
    model = random_model(frequency_shift=1)
    to_diffusers(model, tmp_path)
    pipeline = opened(tmp_path, vae=None)
    pipeline.vae = pixels()
    ours = of_ours(model, [3, 7], DDIM("ddim50"))
    torch.testing.assert_close(of_pipeline(pipeline, [3, 7], 50), ours, rtol=0, atol=2e-4)
    spaced_evenly = of_ours(model, [3, 7], DDIM(50))
    assert (of_pipeline(pipeline, [3, 7], 50) - spaced_evenly).abs().max() > 1e-3  # other steps, other images


def test_a_scheduler_swapped_in_takes_its_own_steps_which_are_ours(tmp_path: Path) -> None:
    """Check that the steps are not those of the DDIM that the scheduler was made from."""
    model = random_model(frequency_shift=1)
    to_diffusers(model, tmp_path)
    pipeline = opened(tmp_path, vae=None)
    pipeline.vae = pixels()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert pipeline.scheduler.config.timestep_spacing == "linspace"
    ours = of_ours(model, [3, 7], DPMSolverPP(25))
    torch.testing.assert_close(of_pipeline(pipeline, [3, 7], 25), ours, rtol=0, atol=2e-4)
    ancestral = DDPMScheduler.from_config(pipeline.scheduler.config, timestep_spacing="linspace")
    ancestral.set_timesteps(250)
    assert ancestral.timesteps.tolist() == sorted(np.linspace(0, 999, 250).round().astype(int).tolist(), reverse=True)


def test_guidance_of_the_pipeline_is_right_for_a_thousand_classes(tmp_path: Path) -> None:
    model = replace_label_table(random_model(frequency_shift=1), 1000)
    to_diffusers(model, tmp_path)
    pipeline = opened(tmp_path, vae=None)
    pipeline.vae = pixels()
    guided = ClassifierFreeGuidance(model, ClassLabels(1000).null, 4, scale=4.0)
    ours = of_ours(guided, [3, 7], DDIM("ddim10"))
    torch.testing.assert_close(of_pipeline(pipeline, [3, 7], 10, guidance=4.0), ours, rtol=0, atol=1e-3)


def test_the_pipeline_has_the_process_that_the_weights_were_trained_with(tmp_path: Path) -> None:
    model = random_model(frequency_shift=1)
    process = GaussianDiffusion(CosineSchedule(500), LearnedRangeVariance())
    to_diffusers(model, tmp_path, betas=process.tables.betas.tolist())
    pipeline = opened(tmp_path, vae=None)
    pipeline.vae = pixels()
    ours = of_ours(model, [3, 7], DDIM("ddim50"), process)
    torch.testing.assert_close(of_pipeline(pipeline, [3, 7], 50), ours, rtol=0, atol=1e-3)
    to_diffusers(model, tmp_path / "paper", betas=PROCESS.tables.betas.tolist())
    scheduler = json.loads((tmp_path / "paper/scheduler/scheduler_config.json").read_text())
    assert (scheduler["beta_schedule"], scheduler["beta_start"], scheduler["beta_end"]) == ("linear", 1e-4, 2e-2)


def test_the_whole_pipeline_opens_with_autoencoder_and_names_of_classes(tmp_path: Path) -> None:
    names = [f"class {number}, also {number}" for number in range(10)]
    to_diffusers(random_model(frequency_shift=1), tmp_path, AutoencoderKL(**AUTOENCODER), names)
    pipeline = opened(tmp_path)
    assert pipeline.get_label_ids(["class 3", "also 7"]) == [3, 7]
    images = pipeline([3, 7], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert_same_weights(read_diffusers_folder(tmp_path)[0], random_model(frequency_shift=1))


def test_the_documented_snippets_run_as_they_stand(tmp_path: Path) -> None:
    """Run both snippets on FOLDER: the first opens a pipeline with an autoencoder, the second one in pixel space."""
    section = (CONF.parent / "docs/model.md").read_text().split("### A pipeline of diffusers")[1]
    place = str(tmp_path / "folder")
    first, second = (part.split("```")[0].replace("FOLDER", place) for part in section.split("```python")[1:3])
    names = ["tench", *map(str, range(9))]
    to_diffusers(random_model(frequency_shift=1), tmp_path / "folder", AutoencoderKL(**AUTOENCODER), names)
    found: dict[str, Any] = {}
    exec(first.replace("steps=50", "steps=2"), found)
    assert found["labels"] == [0]
    assert found["images"][0].size == (8, 8)
    shutil.rmtree(tmp_path / "folder")
    to_diffusers(random_model(frequency_shift=1), tmp_path / "folder")
    exec(second, found)
    assert of_pipeline(found["pipeline"], [1], 2).shape == (1, 4, 8, 8)


def test_exporting_a_run_of_latents_writes_a_pipeline_that_opens_and_decodes(
    tmp_path: Path, in_process: InProcess
) -> None:
    make_image_folder(tmp_path / "images", per_class=8)
    folder = make_autoencoder(tmp_path / "autoencoder")
    data = ["data=folder", "data.name=animals", "data.source.root=images", "data.image_size=16", "data.shards=shards"]
    data += ["data.autoencoder.pretrained=autoencoder", "data.autoencoder.precision=fp32", "data.autoencoder.scale=0.5"]
    in_process("encode", *data)
    trained = [word for word in TINY_RUN if word != "experiment=demo" and not word.startswith("total_steps")]
    trained += ["total_steps=2", "checkpoint_every=2", "model.frequency_shift=1", "runtime=cpu", "precision=fp32"]
    in_process("train", *trained, *data, "run_dir=run")
    shown = in_process("export", "checkpoint=run", "to=diffusers", "out=pipeline")
    assert [line for line in shown.splitlines() if line.startswith("note:")] == [
        "note: DiTPipeline uses class 1000 as the null class, which is 3 here: give it guidance_scale=1."
    ]
    pipeline = opened(tmp_path / "pipeline")
    assert pipeline.vae.config.scaling_factor == 0.5
    assert pipeline.get_label_ids(["cat"]) == [2]
    latent = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample
    torch.testing.assert_close(theirs, DiffusersAutoencoder("small", str(folder), 0.5).decode(latent))
    images = pipeline([0, 2], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    (tmp_path / "autoencoder/config.json").unlink()
    shown = in_process("export", "checkpoint=run", "to=diffusers", "out=parts")
    assert "the autoencoder sd-vae-ft-ema is no longer at autoencoder" in shown
    assert "so the folder has no autoencoder: give yours as DiTPipeline.from_pretrained(FOLDER, vae=...)." in shown
    assert opened(tmp_path / "parts", vae=AutoencoderKL(**AUTOENCODER)).labels == pipeline.labels
    in_process("export", "checkpoint=parts", "to=diffusers", "out=again")
    assert read_class_names(tmp_path / "again", 3) == ("ant", "bee", "cat")
    words = ["diffusion/sampler=ddim", "sampler.steps=2", "num_images=2", "runtime=cpu", "data.autoencoder.channels=4"]
    for name, label in (("a", "cat"), ("b", "2")):
        in_process("sample", "checkpoint=again", *words, f"labels=[{label}]", f"out={name}")
    with np.load(tmp_path / "a.npz") as one, np.load(tmp_path / "b.npz") as other:
        assert one["arr_1"].tolist() == [2, 2]
        assert np.array_equal(one["arr_0"], other["arr_0"])


def test_exporting_a_run_in_pixel_space_says_that_the_pipeline_has_no_decoder(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    train(in_process, digits, "run_dir=run")
    shown = in_process("export", "checkpoint=run", "to=diffusers", "out=pipeline")
    assert "its latents are images, for which a DiTPipeline has no decoder: open it with vae=None." in shown
    assert "diffusers' DiT spaces the timestep's frequencies differently, so its outputs differ slightly." in shown
    pipeline = opened(tmp_path / "pipeline", vae=None)
    assert (pipeline.vae, pipeline.labels["7"]) == (None, 7)
    assert isinstance(read_diffusers_folder(tmp_path / "pipeline", 0)[0], DiT)
