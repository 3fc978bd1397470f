"""Folders of diffusers with Stable Diffusion's U-Net are read and written bit for bit, or refused by their settings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import InProcess
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from foreign_files import change_json, random_model, saved
from test_foreign_jobs import GAUSSIAN
from test_model import tiny
from test_sd_unet import OF_32, inputs, random_network
from torch import Tensor

from diffusion.diffusers_samplers import DPMSolverPP
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.predictions import PredictV
from diffusion.process import GaussianDiffusion
from diffusion.schedules import ScaledLinearSchedule
from diffusion.variances import FixedSmallVariance
from launch.builders.foreign import is_foreign, read_foreign
from launch.builders.foreign_process import notes_on_process
from launch.builders.training import load_starting_weights
from model.convert import to_sd
from model.diffusers_weights import to_diffusers
from model.family import Facts
from model.sd_diffusers import to_unet_folder

PROCESS = GaussianDiffusion(ScaledLinearSchedule(), FixedSmallVariance())
OF_DIFFUSERS: dict[str, Any] = {  # two levels, with transformers at the second
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "version 1": {},
    "version 2": {"attention_head_dim": [2, 4], "use_linear_projection": True, "upcast_attention": True},
    "settings of each level": {
        "sample_size": [8, 8],
        "layers_per_block": [2, 2],
        "cross_attention_dim": [12, 12],
        "only_cross_attention": [False, False],
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "dropout": 0.1,
    },
    "no size, variance": {"sample_size": None, "out_channels": 8, "time_embedding_dim": 64},
}
# Settings by which a folder says nothing of the network.
UNSAID = {"_diffusers_version", "_name_or_path", "_use_default_values"}


def of_diffusers(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**(OF_DIFFUSERS | changes)).eval()


def folder_of(network: UNet2DConditionModel, folder: Path) -> Path:
    """Write a pipeline's folder with this network alone."""
    network.save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    return folder


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_diffusers_computes_its_outputs_and_is_written_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    theirs = of_diffusers(**KINDS[kind])
    where = folder_of(theirs, tmp_path / "a")
    read = read_foreign(str(where), "ema", Facts())
    ours = read.model
    assert (read.family.name, ours.facts()["family"], ours.num_classes) == ("SD", "SD", 0)
    x_t, t, condition = inputs(ours)  # type: ignore[arg-type]
    mask, unmasked = condition["text_mask"], {"text_mask": torch.ones(2, 5, dtype=torch.bool)}
    for given, of_theirs in ((condition, {"encoder_attention_mask": mask}), (condition | unmasked, {})):
        expected = theirs(x_t, t, condition["text"], **of_theirs).sample
        torch.testing.assert_close(ours(x_t, t, given), expected, rtol=0, atol=1e-6)
    to_unet_folder(ours, tmp_path / "b")
    back = UNet2DConditionModel.from_pretrained(tmp_path / "b/unet")
    assert same(back.state_dict(), theirs.state_dict())
    assert torch.equal(back(x_t, t, condition["text"]).sample, theirs(x_t, t, condition["text"]).sample)
    if kind in ("version 1", "version 2"):
        found, given = ({k: v for k, v in one.config.items() if k not in UNSAID} for one in (back, theirs))
        assert found == given | {"upcast_attention": False}
    assert same(read_foreign(str(tmp_path / "b"), "ema", Facts()).model.state_dict(), ours.state_dict())


def test_a_part_of_a_folder_stands_for_the_whole_and_half_precision_is_read(tmp_path: Path) -> None:
    network = of_diffusers()
    where = folder_of(network, tmp_path)
    expected = read_foreign(str(where), "ema", Facts()).model.state_dict()
    inner = where / "unet"
    weights = inner / "diffusion_pytorch_model.safetensors"
    for part in (inner, weights):
        assert is_foreign(str(part))
        assert same(read_foreign(str(part), "ema", Facts()).model.state_dict(), expected)
    facts = Facts(family="SD", num_heads=2, latent_size=8)
    assert same(read_foreign(str(where), "ema", facts).model.state_dict(), expected)
    for facts, words in (
        (Facts(num_heads=4), "foreign.num_heads is 4, but the config of .* says 2"),
        (Facts(latent_size=16), "foreign.latent_size is 16, but the config of .* says 8"),
        (Facts(num_classes=10), "foreign.num_classes is 10, but these are weights of the family SD"),
        (Facts(family="DiT"), "has weights of the family SD, but foreign.family is DiT"),
    ):
        with pytest.raises(ValueError, match=words):
            read_foreign(str(where), "ema", facts)
    network.half().save_pretrained(inner)
    half = read_foreign(str(where), "ema", Facts()).model.state_dict()
    assert all(torch.equal(value, expected[name].half().float()) for name, value in half.items())
    weights.rename(tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone.safetensors has diffusers' names, which need a config.json"):
        read_foreign(str(tmp_path / "alone.safetensors"), "ema", Facts())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"class_embed_type": "timestep"}, "has 'class_embed_type' 'timestep', but Stable Diffusion's U-Net has False"),
        ({"addition_embed_type": "text_time"}, "has 'addition_embed_type' 'text_time'"),
        ({"num_class_embeds": 10}, "has 'num_class_embeds' 10"),
        ({"act_fn": "gelu"}, "has 'act_fn' 'gelu', but Stable Diffusion's U-Net has 'silu'"),
        ({"time_cond_proj_dim": 256}, "has 'time_cond_proj_dim' 256"),
        ({"transformer_layers_per_block": [1, 2]}, "has 'transformer_layers_per_block' [1, 2]"),
        ({"only_cross_attention": True}, "has 'only_cross_attention' True"),
        ({"dual_cross_attention": True}, "has 'dual_cross_attention' True"),
        ({"center_input_sample": True}, "has 'center_input_sample' True"),
        ({"flip_sin_to_cos": False}, "has 'flip_sin_to_cos' False"),
        ({"norm_eps": 1e-6}, "has 'norm_eps' 1e-06"),
        ({"encoder_hid_dim_type": "text_proj"}, "has 'encoder_hid_dim_type' 'text_proj'"),
        ({"mid_block_type": "UNetMidBlock2D"}, "has 'mid_block_type' 'UNetMidBlock2D'"),
        ({"a_setting_of\x07later": {"versions": 1}}, r"has 'a_setting_of\x07later' {'versions': 1}, but"),
        ({"down_block_types": ["DownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "Its config has down_block_types"),
        ({"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "Its config has up_block_types ['UpBlock2D', 'UpBlock2D']"),
        ({"block_out_channels": [16]}, "Its config has down_block_types"),
        ({"time_embedding_dim": 32}, "Its config has time_embedding_dim 32, but the network here has 64"),
        ({"attention_head_dim": [2, 2, 2]}, "Its config has attention_head_dim [2, 2, 2]"),
        ({"attention_head_dim": [2, 8]}, "Its config has attention_head_dim [2, 8]"),
        ({"attention_head_dim": 3}, "model.num_heads 3 does not divide the 32 channels"),
        ({"in_channels": 9}, "Its config has 9 input and 4 output channels"),
        ({"cross_attention_dim": 8}, "attn2.to_k.weight is (32, 12), not (32, 8)"),
        ({"sample_size": 7}, "latent size is 7, which is not a multiple of 2"),
        ({"layers_per_block": 10**6}, "model.layers is 1000000"),
        ({"layers_per_block": 10**60}, "layers_per_block is 1"),
        ({"block_out_channels": [16, 10**9]}, "block_out_channels"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"use_linear_projection": "yes"}, "use_linear_projection is 'yes'"),
        ({"use_linear_projection": True}, "proj_in.weight is (32, 32, 1, 1), not (32, 32)"),
    ],
    ids=str,
)
def test_a_setting_that_means_another_network_is_refused_by_its_name(
    a_folder: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    config = json.loads((a_folder / "unet/config.json").read_text()) | change
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps(config))
    weights = "diffusion_pytorch_model.safetensors"
    (tmp_path / "unet" / weights).symlink_to(a_folder / "unet" / weights)
    with pytest.raises(ValueError, match="unet") as caught:
        read_foreign(str(tmp_path), "ema", Facts())
    assert words in str(caught.value)


@pytest.fixture(scope="module")
def a_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(of_diffusers(), tmp_path_factory.mktemp("sd"))


def test_levels_that_diffusers_cannot_express_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"as channels at the first level, 32, but the model has model.width 16"):
        to_unet_folder(random_network(multipliers=(2, 2)), tmp_path)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_the_pipeline_denoises_as_this_program_does(tmp_path: Path, prediction: str) -> None:
    process = PROCESS
    if prediction == "v":
        process = GaussianDiffusion(ScaledLinearSchedule(), FixedSmallVariance(), prediction=PredictV())
    network = random_network(channels=4)
    to_unet_folder(network, tmp_path, betas=process.tables.betas.tolist(), prediction=prediction)
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert [scheduler[name] for name in ("beta_schedule", "beta_start", "beta_end")] == ["scaled_linear", 8.5e-4, 0.012]
    assert notes_on_process(tmp_path, {}, process) == []
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path, vae=None, text_encoder=None, tokenizer=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.steps_offset == 1
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    x_t, _, condition = inputs(network)
    whole, empty = torch.ones(2, 5, dtype=torch.bool), torch.zeros(2, 5, 12)
    theirs = pipeline(
        prompt_embeds=condition["text"],
        negative_prompt_embeds=empty,
        latents=x_t,
        num_inference_steps=10,
        guidance_scale=4.0,
        output_type="latent",
    ).images
    guided = ClassifierFreeGuidance(network, lambda given: given | {"text": empty}, 4, scale=4.0, channels="all")
    ours = DPMSolverPP(10)(guided, process, lambda draw: x_t, condition | {"text_mask": whole})
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)


def test_jobs_export_folders_and_checkpoints_of_stable_diffusion(tmp_path: Path, in_process: InProcess) -> None:
    theirs = of_diffusers(block_out_channels=[32, 32], norm_num_groups=32)
    folder_of(theirs, tmp_path / "a")
    shown = in_process("export", "checkpoint=a", "to=diffusers", "out=b")
    assert "StableDiffusionPipeline.from_pretrained(FOLDER, ...) needs your own text_encoder, tokenizer, vae" in shown
    assert same(UNet2DConditionModel.from_pretrained(tmp_path / "b/unet").state_dict(), theirs.state_dict())
    in_process("export", "checkpoint=b", "to=sd", "out=c.ckpt")
    state = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
    assert "model.diffusion_model.input_blocks.3.1.transformer_blocks.0.attn2.to_k.weight" in state
    others = {"cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None], "betas": torch.ones(9)}
    names = [name.removeprefix("model.") for name in state]
    weights = {f"model.{name}": torch.zeros_like(state[f"model.{name}"]) for name in names}
    averages = {f"model_ema.{name.replace('.', '')}": state[f"model.{name}"] for name in names}
    saved(tmp_path / "d.ckpt", {"state_dict": weights | averages | others, "epoch": 3})
    shown = in_process("export", "checkpoint=d.ckpt", "to=diffusers", "out=no", expect=2)
    assert "do not contain their number of heads" in shown
    words = ["foreign.num_heads=2", "foreign.latent_size=8"]
    shown = in_process("export", "checkpoint=d.ckpt", *words, "to=diffusers", "out=e")
    assert "note: d.ckpt: its weights are of the family SD." in shown
    assert "its table 'state_dict/model_ema.diffusion_model' is used" in shown
    assert same(UNet2DConditionModel.from_pretrained(tmp_path / "e/unet").state_dict(), theirs.state_dict())
    configs = [json.loads((tmp_path / name / "unet/config.json").read_text()) for name in ("b", "e")]
    assert configs[0] == configs[1]
    for program, family in (("ldm", "LDM"), ("reference", "DiT")):
        shown = in_process("export", "checkpoint=a", f"to={program}", "out=no", expect=2)
        assert (
            f"to={program} writes weights of the family {family}, but a has a network of the family SD; give" in shown
        )
    words = ["checkpoint=a", "diffusion=sd", "runtime=cpu", "data.autoencoder.channels=4", "out=x"]
    assert "is conditioned on texts; give them as prompts=" in in_process("sample", *words, expect=2)
    shown = in_process("sample", *words, "prompts=a", expect=2)  # the folder has no text encoder
    assert "This model is conditioned on captions, whose text encoder is not given; give it as" in shown
    assert not (tmp_path / "no").exists()


def test_a_run_starts_from_a_folder_and_other_networks_do_not(a_folder: Path, tmp_path: Path) -> None:
    read = read_foreign(str(a_folder), "ema", Facts()).model
    network = random_network(**{name: getattr(read.config, name) for name in ("channels", "num_heads", "head_dim")})
    assert load_starting_weights(network, str(a_folder), PROCESS) == []
    assert same(network.state_dict(), read.state_dict())
    with pytest.raises(ValueError, match="weights of the family SD, but this run's network is of the family DiT"):
        load_starting_weights(tiny(), str(a_folder), GAUSSIAN)
    to_diffusers(random_model(), tmp_path / "dit")
    with pytest.raises(ValueError, match="weights of the family DiT, but this run's network is of the family SD"):
        load_starting_weights(network, str(tmp_path / "dit"), PROCESS)
    of_ldm = str(saved(tmp_path / "a.ckpt", {"state_dict": to_sd(random_network(**OF_32))}))
    with pytest.raises(ValueError, match=r"these are weights of the family SD, but foreign.family is LDM"):
        read_foreign(of_ldm, "ema", Facts(family="LDM"))


def test_a_scheduler_that_says_another_quantity_than_the_objective_is_refused(tmp_path: Path) -> None:
    to_unet_folder(random_network(), tmp_path, betas=PROCESS.tables.betas.tolist(), prediction="v")
    with pytest.raises(ValueError, match=r"predicts 'v_prediction', but .* diffusion/prediction=noise; set diffusion"):
        notes_on_process(tmp_path, {}, PROCESS)
    change_json(tmp_path / "scheduler/scheduler_config.json", prediction_type="flow_prediction")
    with pytest.raises(ValueError, match=r"predicts 'flow_prediction', but .*; give other weights"):
        notes_on_process(tmp_path, {}, PROCESS)
