"""Jobs sample from, measure, start from and export SiT's weights, and refuse those of the other direction of time."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines
from foreign_files import HEADS, saved
from sit import sit_flow, sit_network
from test_foreign_jobs import digits_model
from test_model import tiny
from test_sit import sit_weights
from torch import Tensor

from core.draws import Philox, Purpose, draw_noise
from data.images import to_uint8
from diffusion.flow import Flow
from diffusion.ode_samplers import Dopri5, HeunOde
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from launch.builders.build import require_runtime
from launch.builders.training import load_starting_weights
from model.convert import from_sit, to_sit
from model.released import to_reference

SAMPLE = ["sample", "runtime=cpu", "num_images=3", "data.autoencoder.channels=4", HEADS, "out=x"]
HEUN = ["diffusion=sit", "diffusion/sampler=heun_ode", "sampler.steps=3"]
EDM_HALF = "diffusion.sigma_data=0.5"
SIT = Flow(reversed_time=True, outputs_per_channel=2)
GAUSSIAN = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
TRAINED = argparse.Namespace(model="SiT-XL/2", path_type="Linear", prediction="velocity", num_classes=7)


def images(path: Path) -> np.ndarray:
    found: np.ndarray = np.load(path, allow_pickle=False)["arr_0"]
    return found


def expected_images() -> np.ndarray:
    """Return the images of seed 0 by the network itself, in SiT's time."""
    noise = torch.from_numpy(draw_noise(Philox(0), np.arange(3), 0, (4, 8, 8), Purpose.SAMPLING))
    with torch.no_grad():
        latents = HeunOde(3)(
            sit_network(), sit_flow("Linear", "velocity"), lambda _: noise, {"label": torch.tensor([0, 1, 2])}
        )
    return to_uint8(latents)


@pytest.mark.parametrize("form", ["table", "trained"])
def test_released_weights_are_sampled_from_as_they_are(form: str, tmp_path: Path, in_process: InProcess) -> None:
    content = sit_weights() if form == "table" else {"ema": sit_weights(), "opt": {}, "args": TRAINED}
    saved(tmp_path / "SiT-XL-2-256x256.pt", content)
    in_process(*SAMPLE, *HEUN, "checkpoint=SiT-XL-2-256x256.pt")
    assert np.array_equal(images(tmp_path / "x.npz"), expected_images())
    assert len(np.unique(expected_images())) > 50


def test_released_weights_are_measured_as_they_are(tmp_path: Path, in_process: InProcess, digits: Path) -> None:
    model = digits_model(outputs_per_channel=2)
    saved(tmp_path / "SiT-digits.pt", to_sit(model))
    words = ["evaluate", "checkpoint=SiT-digits.pt", "runtime=cpu", "foreign.num_heads=2", f"data.shards={digits}"]
    words += [*HEUN, "evaluation.num_images=10", "evaluation.features.epochs=1", "metrics=[frechet,nll]"]
    words += ["evaluation.likelihood_steps=4", "diffusion/guidance=classifier_free"]
    in_process(*words)
    in_process(*words)
    one, two = json_lines(tmp_path / "SiT-digits-evaluations.jsonl")
    assert (one["foreign"], one["network_calls"], one["likelihood_by"]) == ("SiT-digits.pt", 6, "ode")
    assert one["frechet_distance"] == two["frechet_distance"] > 0
    assert one["bits_per_dimension"] == two["bits_per_dimension"]
    shown = in_process(*words[:3], "foreign.num_heads=2", f"data.shards={digits}", expect=2)
    assert "SiT-digits.pt has weights of SiT, whose time runs from noise (0) to data (1)" in shown
    assert not (tmp_path / "chunks").exists()


def test_a_run_starts_from_sits_weights_and_is_exported_for_sits_program(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    model = digits_model(outputs_per_channel=2)
    saved(
        tmp_path / "SiT-digits.pt",
        {"ema": to_sit(model), "args": argparse.Namespace(**{**vars(TRAINED), "num_classes": 10})},
    )
    started = digits_model(outputs_per_channel=2)
    started.initialize(5)
    load_starting_weights(started, str(tmp_path / "SiT-digits.pt"), SIT)
    assert all(torch.equal(value, started.state_dict()[name]) for name, value in model.state_dict().items())
    words = ["train", *TINY_RUN, f"data.shards={digits}", "runtime=cpu", "total_steps=10", "run_dir=run"]
    in_process(*words, "diffusion=sit", "diffusion/sampler=euler", "init_from=SiT-digits.pt")
    in_process("export", "checkpoint=run", "to=sit", "out=back.pt")
    content = torch.load(tmp_path / "back.pt", weights_only=True)
    assert content["args"] == {"model": "SiT", "path_type": "Linear", "prediction": "velocity"}
    assert content["ema"].keys() == to_sit(model).keys()
    in_process("export", "checkpoint=back.pt", "to=sit", "out=again.pt", "foreign.num_heads=2")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    assert again["args"] == content["args"]
    assert all(torch.equal(again["ema"][name], value) for name, value in content["ema"].items())
    for to in ("reference", "diffusers"):
        for where in ("run", "back.pt"):
            shown = in_process("export", f"checkpoint={where}", f"to={to}", "out=no", "foreign.num_heads=2", expect=2)
            assert "has weights of SiT, whose time runs the other way than that of the program" in shown
    shown = in_process(*words[:-1], "run_dir=other", "init_from=run", expect=2)
    assert "init_from run was trained with a time that runs from noise to data, as SiT's (diffusion=sit)" in shown
    flow = ["diffusion=flow", "diffusion/sampler=euler", "diffusion.outputs_per_channel=2"]
    shown = in_process(*words[:-1], *flow, "run_dir=other", "init_from=run", expect=2)
    assert "this job's objective, diffusion=flow, runs from data to noise" in shown
    guide = ["diffusion/guidance=autoguidance", "guidance.guide=run"]
    in_process(*words[:-1], *flow, "run_dir=ours")
    shown = in_process("sample", "checkpoint=ours", *flow[1:2], "runtime=cpu", *guide, "num_images=2", expect=2)
    assert "guidance.guide run was trained with a time that runs from noise to data" in shown
    shown = in_process("export", "checkpoint=ours", "to=sit", "out=no", expect=2)
    assert "to=sit needs a network that sees SiT's time, trained with diffusion=sit, but this one is of" in shown


def test_sits_weights_are_exported_bit_for_bit(tmp_path: Path, in_process: InProcess) -> None:
    weights = sit_weights()
    saved(tmp_path / "SiT-tiny.pt", {"ema": weights, "args": TRAINED})
    in_process("export", "checkpoint=SiT-tiny.pt", "to=sit", "out=back.pt", HEADS)
    back: dict[str, Tensor] = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("x.pt", {"model": "SiT-XL/2"}, []),
        ("x.pt", {"path_type": "Linear"}, []),
        ("SiT-XL-2-256x256.pt", None, []),
        ("x.pt", {"model": "SiT-XL/2"}, ["diffusion=flow", "diffusion/sampler=euler"]),
    ],
)
def test_sits_weights_are_refused_as_dits_where_the_file_says_it(
    name: str, arguments: dict[str, str] | None, words: list[str], tmp_path: Path, in_process: InProcess
) -> None:
    content = sit_weights() if arguments is None else {"ema": sit_weights(), "args": argparse.Namespace(**arguments)}
    saved(tmp_path / name, content)
    shown = in_process(*SAMPLE, f"checkpoint={name}", *words, expect=2)
    assert f"{name} has weights of SiT, whose time runs from noise (0) to data (1), but the objective is" in shown
    assert "set diffusion=sit" in shown
    with pytest.raises(ValueError, match="has weights of SiT"):
        load_starting_weights(from_sit(sit_weights(), 4), str(tmp_path / name), GAUSSIAN)


@pytest.mark.parametrize(("name", "arguments"), [("x.pt", {"model": "DiT-XL/2"}), ("DiT-XL-2-256x256.pt", None)])
def test_dits_weights_are_refused_as_sits_where_the_file_says_it(
    name: str, arguments: dict[str, str] | None, tmp_path: Path, in_process: InProcess
) -> None:
    content = sit_weights() if arguments is None else {"ema": sit_weights(), "args": argparse.Namespace(**arguments)}
    saved(tmp_path / name, content)
    shown = in_process(*SAMPLE, *HEUN, f"checkpoint={name}", expect=2)
    assert f"{name} has weights of DiT, whose time runs from data to noise, but the objective's network sees" in shown
    shown = in_process("export", f"checkpoint={name}", "to=sit", "out=no", HEADS, expect=2)
    assert "has weights of DiT, whose time runs the other way" in shown
    for words in (["diffusion=flow", *HEUN[1:]], ["diffusion=edm", "diffusion/sampler=edm_heun", EDM_HALF]):
        shown = in_process(*SAMPLE, *words, f"checkpoint={name}", expect=2)
        assert f"{name} has weights of DiT, whose objective is diffusion=gaussian, but this job's is" in shown


def test_a_path_or_prediction_that_the_file_contradicts_is_refused(tmp_path: Path, in_process: InProcess) -> None:
    for arguments, words in (({"path_type": "GVP"}, "path=gvp"), ({"path_type": "VP"}, "path=vp")):
        saved(tmp_path / "x.pt", {"ema": sit_weights(), "args": argparse.Namespace(**arguments)})
        shown = in_process(*SAMPLE, *HEUN, "checkpoint=x.pt", expect=2)
        assert f"x.pt was trained with {words.replace('=', ' ')}, but the objective has diffusion/path=linear" in shown
        in_process(*SAMPLE, *HEUN, "checkpoint=x.pt", f"diffusion/{words}")
    saved(tmp_path / "x.pt", {"ema": sit_weights(), "args": {"path_type": "Linear", "prediction": "score"}})
    shown = in_process(*SAMPLE, *HEUN, "checkpoint=x.pt", expect=2)
    assert "x.pt was trained with prediction score, but the objective has diffusion/prediction=velocity" in shown


def test_networks_with_one_output_per_channel_name_the_setting(tmp_path: Path, in_process: InProcess) -> None:
    saved(tmp_path / "x.pt", to_reference(tiny(outputs_per_channel=1)))
    shown = in_process(*SAMPLE, *HEUN, "checkpoint=x.pt", expect=2)
    assert "The objective needs 8 output channels, but x.pt has 4; set diffusion.outputs_per_channel=1" in shown
    in_process(*SAMPLE, *HEUN, "checkpoint=x.pt", "diffusion.outputs_per_channel=1")
    saved(tmp_path / "y.pt", to_reference(tiny(outputs_per_channel=2)))
    words = ["diffusion=edm", "diffusion/sampler=edm_heun", EDM_HALF]
    shown = in_process(*SAMPLE, *words, "checkpoint=y.pt", expect=2)
    assert "needs 4 output channels, but y.pt has 8; give weights that were trained with diffusion=edm." in shown


def test_an_adaptive_sampler_samples_and_is_measured_and_is_refused_where_it_cannot_decide_its_steps(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    saved(tmp_path / "SiT-digits.pt", to_sit(digits_model(outputs_per_channel=2)))
    how = ["checkpoint=SiT-digits.pt", "foreign.num_heads=2", "diffusion=sit", "diffusion/sampler=dopri5"]
    in_process("sample", "runtime=cpu", *how, "num_images=4", "data.autoencoder.channels=1")
    assert (tmp_path / "samples/SiT-digits-seed0-dopri5.npz").exists()
    few = ["evaluation.num_images=10", "evaluation.features.epochs=1", f"data.shards={digits}"]
    in_process("evaluate", "runtime=cpu", *how, *few)
    (record,) = json_lines(tmp_path / "SiT-digits-evaluations.jsonl")
    assert record["network_calls"] > 6
    assert record["sampling_gmacs"] == pytest.approx(record["network_calls"] * record["gmacs"])
    assert record["sampler"] == {"name": "dopri5", "atol": 1e-6, "rtol": 1e-3}
    with pytest.raises(ValueError, match=r"sampler dopri5 chooses its steps in each process .* use .*=heun_ode"):
        require_runtime(Dopri5(), {"mode": "fsdp"}, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"sampler dopri5 chooses its steps by reading .* use .*=heun_ode"):
        require_runtime(Dopri5(), {}, torch.device("xla"))
    for sampler, mode in ((HeunOde(), "fsdp"), (Dopri5(), "replicated")):
        require_runtime(sampler, {"mode": mode}, torch.device("cpu"))
