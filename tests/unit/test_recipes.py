"""Published recipes compose to what they say, and their cost is that of `ditscale plan`."""

import json
import re
from typing import Any

import pytest
from conftest import InProcess
from test_house import CONF, composed

from diffusion.objective import LatentFacts, Objective
from diffusion.samplers import Sampler
from diffusion.time_grids import shifted
from launch.builders.components import build
from launch.builders.objectives import settled

RECIPES = sorted(path.stem for path in (CONF / "experiment/recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_a_sampler_that_fits_its_objective_and_the_cost_that_it_says(
    name: str, in_process: InProcess
) -> None:
    config = composed("train", f"experiment=recipes/{name}")
    objective: Objective = build(settled(config["diffusion"], LatentFacts(4096, 0.8)))
    sampler: Sampler = build(config["sampler"])
    sampler.require(objective)
    header = (CONF / f"experiment/recipes/{name}.yaml").read_text(encoding="utf-8")
    (command,) = re.findall(r"`ditscale plan\s(.+?)`", header.replace("\n# ", " "))
    words = [word for word in command.split() if word.split("=")[0] not in ("total_steps", "batch_size")]
    words += [f"{key}={config[key]}" for key in ("total_steps", "batch_size")]
    of_shape = [key for key in ("width", "depth", "num_heads", "patch_size") if key in config["model"]]
    words += [f"model.{key}={config['model'][key]}" for key in of_shape]
    plan: dict[str, Any] = json.loads(in_process("plan", *words, "format=json"))
    (exaflops,) = re.findall(r"\(([\d,]+) EFLOPs", header)
    assert int(exaflops.replace(",", "")) == round(plan["training_exaflops"])
    (hours,) = re.findall(r"about (\d+) hours of training", header)
    assert int(hours) == round(plan["training_hours"])
    for part in ("features_gb", "embeddings_gb"):
        if part in plan:
            assert all(f"{plan[size]:,.0f} GB" in header for size in (part, "shards_gb"))
    assert all(word in header for word in ("Expected", "Not run here", "Hardware and time"))
    assert any(word in header for word in ("FID-50K", "FID-30K"))  # of classes, of captions


def test_recipes_train_what_their_programs_train() -> None:
    sit, edm, repa = (composed("train", f"experiment=recipes/{name}") for name in ("sit_xl2", "edm_xl2", "repa_xl2"))
    assert (sit["total_steps"], sit["batch_size"], sit["class_dropout"]) == (7_000_000, 256, 0.1)
    assert (sit["diffusion"]["path"]["_target_"], sit["sampler"]["steps"]) == ("diffusion.paths.LinearPath", 250)
    assert (sit["sampler"]["last_step"], sit["sampler"]["last_size"]) == ("mean", 0.04)
    assert (edm["total_steps"], edm["batch_size"], edm["diffusion"]["sigma_data"]) == (2_000_000, 1024, 0.5)
    times = edm["diffusion"]["times"]
    assert (times["location"], times["scale"]) == (-1.2, 1.2)
    alignment = repa["alignment"]
    assert (repa["total_steps"], repa["data"]["flip"], repa["max_grad_norm"]) == (4_000_000, False, 1.0)
    assert (alignment["block"], alignment["hidden"], alignment["coefficient"]) == (8, 2048, 0.5)
    assert sit["optimizer"]["lr"] == edm["optimizer"]["lr"] == repa["optimizer"]["lr"] == 1e-4


def test_lightningdits_recipe_has_its_parts_times_guidance_and_shift() -> None:
    found = composed("train", "experiment=recipes/lightningdit_xl1")
    model, diffusion = found["model"], found["diffusion"]
    assert [model[key] for key in ("width", "depth", "num_heads")] == [1152, 28, 16]
    assert [model[key] for key in ("patch_size", "channels", "latent_size")] == [1, 32, 16]
    parts = {name: model["block"][name]["_target_"].rsplit(".", 1)[1] for name in ("norm", "mlp", "attention")}
    assert parts == {"norm": "rms_norm", "mlp": "SwiGluMlp", "attention": "RotarySelfAttention"}
    assert diffusion["times"] == {"_target_": "diffusion.times.LogitNormalTimes", "location": 0.0, "scale": 1.0}
    assert (diffusion["direction_weight"], found["data"]["normalize"], found["batch_size"]) == (1.0, True, 1024)
    assert (found["optimizer"]["lr"], found["optimizer"]["betas"]) == (2e-4, [0.9, 0.95])
    sampler, guidance = found["sampler"], found["guidance"]
    assert (sampler["_target_"], sampler["steps"]) == ("diffusion.ode_samplers.Euler", 250)
    for t in (0.1, 0.5, 0.9):  # its times run from noise to data: t' = 0.3 t / (1 - 0.7 t)
        assert 1 - shifted(1 - t, sampler["shift"]) == pytest.approx(0.3 * t / (1 - 0.7 * t))
    assert (guidance["scale"], guidance["channels"], guidance["t_max"]) == (10.0, 3, pytest.approx(1 - 0.11))


def test_ldms_recipe_has_its_latents_betas_variance_and_sampler() -> None:
    found = composed("train", "experiment=recipes/ldm4")
    model, diffusion = found["model"], found["diffusion"]
    assert [model[key] for key in ("_target_", "latent_size", "channels")] == ["model.ldm.LDM", 64, 3]
    assert found["data"]["autoencoder"]["_target_"] == "model.autoencoder_latents.VQAutoencoder"
    betas = {"_target_": "diffusion.schedules.ScaledLinearSchedule", "beta_start": 0.0015, "beta_end": 0.0195}
    assert diffusion["schedule"] == betas | {"num_steps": 1000}
    assert diffusion["variance"]["_target_"] == "diffusion.variances.FixedSmallVariance"
    assert (found["total_steps"], found["batch_size"], found["optimizer"]["lr"]) == (178_000, 1200, 1e-4)
    assert (found["sampler"]["_target_"], found["sampler"]["steps"]) == ("diffusion.samplers.DDIM", 250)


def test_the_recipes_of_text_are_two_resolutions_each_of_one_network() -> None:
    names = ("pixart_like", "pixart_like_512", "sd_unet", "sd_unet_512")
    found = [composed("train", f"experiment=recipes/{name}") for name in names]
    for small, large in (found[:2], found[2:]):
        assert large["init_from"] == small["run_dir"]
        for section in ("model", "diffusion", "optimizer", "ema", "condition", "sampler", "guidance", "class_dropout"):
            assert small[section] == large[section]
        assert [one["data"]["image_size"] for one in (small, large)] == [256, 512]
        assert small["data"]["autoencoder"]["name"] == "sd-vae-ft-ema"
        assert (small["class_dropout"], small["ema"]["decay"], small["model"]["latent_size"]) == (0.1, 0.9999, None)
    pixart, _, sd, _ = found
    assert pixart["model"]["block"]["_target_"] == "model.blocks.AdaLNZeroSharedCrossBlock"
    assert (pixart["model"]["embedding"]["pooled_dim"], pixart["model"]["embedding"]["timestep_token"]) == (0, False)
    assert [pixart["optimizer"][key] for key in ("lr", "weight_decay", "eps")] == [2e-5, 0.03, 1e-10]
    assert (pixart["max_grad_norm"], pixart["guidance"]["scale"]) == (0.01, 4.5)
    assert sd["model"]["_target_"] == "model.sd_unet.SDUNet"
    assert [sd["diffusion"]["schedule"][key] for key in ("beta_start", "beta_end")] == [0.00085, 0.012]
    assert (sd["optimizer"]["lr"], sd["condition"]["attend_to_padding"], sd["guidance"]["scale"]) == (1e-4, True, 7.5)
