"""ADM has the paper's size and cost, computes what OpenAI's program computes, and trains as every network does."""

import functools
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import InProcess, json_lines
from foreign_files import saved
from torch import Tensor, nn

from core.reading import sha256_of
from data.low_resolution import LowResolution
from data.shards import MappedShards
from launch.builders.components import build
from launch.builders.foreign import read_foreign
from launch.command.app import CONF
from model.adm import ADM, ADMConfig
from model.convert import from_adm, to_adm
from model.family import Facts
from model.flops import multiply_adds, num_parameters, weightless
from model.network import compile_each_unit
from model.starting import take_over
from model.unet import UNet

# Parameters and giga multiply-adds, of 1,000 classes.
ADMS = {
    "adm256": (553_838_086, 1119.83),
    "adm64": (295_904_454, 109.68),
    "adm_upsampler": (311_795_910, 631.64),
    "adm512": (558_997_638, 1982.33),
}
GOLDEN = Path(__file__).parents[1] / "golden/adm_unet_tiny.npz"


@functools.cache
def adm_of(name: str) -> ADM:
    """Return a network of ``conf/model`` on the meta device."""
    section = yaml.safe_load((CONF / f"model/{name}.yaml").read_text())
    del section["defaults"]
    section["num_classes"] = 1000
    section |= {"latent_size": 8, "channels": 1} if section["latent_size"] is None else {}
    found: ADM = weightless(lambda: build(section))
    return found


def tiny(**changes: Any) -> ADM:
    """Return an ADM of two levels for the digits, without a tensor of zeros."""
    shape = {"latent_size": 8, "channels": 1, "num_classes": 10, "width": 16, "multipliers": (1, 2), "layers": 1}
    heads = {} if "num_heads" in changes else {"head_dim": 16}
    model = ADM(ADMConfig(**{**shape, "attention_at": (2,), "num_groups": 4, **heads, **changes}))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


@functools.cache
def golden() -> dict[str, Tensor]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return {name: torch.from_numpy(np.array(file[name])) for name in file}


def released() -> dict[str, Tensor]:
    """Return the golden network's weights under guided-diffusion's names."""
    return {name.removeprefix("weights/"): value.float() for name, value in golden().items() if "weights/" in name}


def outputs(model: ADM) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(golden()["x"], golden()["t"], {"label": golden()["y"]})
    return found


@pytest.mark.parametrize("name", ADMS)
def test_parameters_and_multiply_adds_are_the_published_ones(name: str) -> None:
    model = adm_of(name)
    assert num_parameters(model) == ADMS[name][0]
    assert round(multiply_adds(model) / 1e9, 2) == ADMS[name][1]


def test_the_pair_of_figure_2_costs_what_the_paper_says_and_plan_takes_each_networks_own_images(
    in_process: InProcess,
) -> None:
    costs = [multiply_adds(adm_of(name)) / 1e9 for name in ("adm64", "adm_upsampler")]
    assert round(sum(costs), 2) == 741.32
    shown = in_process("plan", "model=adm64", "model.width=64", "model.layers=1")
    small = weightless(lambda: ADM(replace(adm_of("adm64").config, width=64, layers=1)))
    assert "latents 64x64x3" in shown
    assert f"{multiply_adds(small) / 1e9:14.3f}  {num_parameters(small) / 1e6:8.1f} " in shown


def test_outputs_are_those_of_guided_diffusion() -> None:
    torch.testing.assert_close(outputs(from_adm(released())), golden()["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("new_order", [False, True])
def test_weights_come_in_and_go_out_bit_for_bit_in_either_order_of_queries_keys_and_values(new_order: bool) -> None:
    model, weights = from_adm(released(), new_order, num_heads=2), released()
    back = to_adm(model, new_order)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], value) for name, value in weights.items())
    other = from_adm(to_adm(model, not new_order), not new_order, num_heads=2)
    assert torch.equal(outputs(other), outputs(model))
    assert new_order == ((outputs(model) - golden()["out"]).abs().max() > 1e-3).item()


def test_weights_of_every_shape_are_read_as_the_network_that_they_were_written_from() -> None:
    shapes = (
        {"num_classes": 0},
        {"multipliers": (0.5, 1, 1), "attention_at": (1, 4), "layers": 2},
        {"multipliers": (2,), "attention_at": (), "outputs_per_channel": 1},
        {"channels": 3, "upscale": 4, "num_heads": 2},
        {"null_class": True},
    )
    for changes in shapes:
        model = tiny(**{"num_groups": 32, "width": 64, "null_class": False, **changes})
        config, weights = model.config, to_adm(model)
        asked = {"latent_size": 8, "head_dim": config.head_dim, "num_heads": config.num_heads}
        found = from_adm(weights, **asked, num_classes=config.num_classes)
        assert found.config == config
        assert all(torch.equal(value, model.state_dict()[name]) for name, value in found.state_dict().items())


def test_weights_that_do_not_fit_are_refused_by_the_names_of_their_tensors() -> None:
    weights = released()
    for name in ("middle_block.1.norm.weight", "input_blocks.3.1.qkv.bias"):
        with pytest.raises(ValueError, match=f"not an ADM's weights: {name} is missing"):
            from_adm({key: value for key, value in weights.items() if key != name})
    with pytest.raises(ValueError, match=r"not an ADM's weights: more is unknown \(1 in all\)"):
        from_adm({**weights, "more": torch.zeros(1)})
    classifier = {name: value for name, value in weights.items() if not name.startswith("output_blocks")}
    with pytest.raises(ValueError, match=r"no output_blocks, as in guided-diffusion's classifiers of noisy images"):
        from_adm(classifier)
    with pytest.raises(ValueError, match=r"group norms of 32 groups, but the model has model.num_groups 4; keep it in"):
        to_adm(tiny())
    with pytest.raises(ValueError, match=r"model.num_heads 5 does not divide the 64 channels"):
        from_adm(weights, num_heads=5)


def test_hostile_shapes_are_refused_in_one_sentence() -> None:
    names = ("time_embed.0.weight", "label_emb.weight", "input_blocks.0.0.weight", "out.2.weight")
    names += ("output_blocks.0.0.out_layers.3.weight", "output_blocks.0.1.qkv.weight", "middle_block.1.qkv.weight")
    for name in names:
        for shape in ((), (0,), (7,), (0, 0), (3, 1), (0, 0, 0, 0), (1, 1, 1, 1), (1,) * 6):
            with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
                from_adm({**released(), name: torch.zeros(shape)})
    many = {f"output_blocks.{step}.1.in_layers.2.weight": torch.zeros(1) for step in range(5000)}
    with pytest.raises(ValueError, match=r"blocks of the way up"):
        from_adm({**released(), **many})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"latent_size": 10, "multipliers": (1, 1, 2)},
            r"latent size is 10, which is not a multiple of 4, the factor that a U-Net of 3 levels downsamples by; ",
        ),
        ({"head_dim": 12}, r"model.head_dim 12 does not divide the 32 channels of a level with attention; choose a "),
        ({"num_heads": 3}, r"model.num_heads 3 does not divide the 32 channels"),
        ({"num_heads": 2, "head_dim": 16}, r"head_dim is 16 and model.num_heads is 2, but exactly one"),
        ({"num_groups": 6}, r"model.num_groups 6 does not divide the 16 channels of a level; choose a divisor of 16"),
        ({"multipliers": (1, 1.3)}, r"model.width 16 times 1.3 of model.multipliers is 20.8, but"),
        ({"multipliers": ()}, r"model.multipliers has 0 levels, but a U-Net has 1 to 12"),
        ({"attention_at": (4,)}, r"model.attention_at has 4, but the levels of this network are downsampled by 1, 2;"),
        ({"layers": 0}, r"model.layers is 0, but it must be a whole number from 1 to 64"),
        ({"width": 2**20}, r"model.width is 1048576, but it must be a whole number from 1 to 16384"),
        ({"upscale": 3}, r"model.upscale is 3, but it must divide the latent size 8"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_both(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_latents_of_another_size_are_refused_with_both_shapes() -> None:
    x_t, t, condition = tiny().example_inputs(2)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 4\), but this model was built for \(1, 8, 8\)"):
        tiny()(x_t[:, :, :4, :4], t, condition)


def test_new_weights_follow_from_the_seed_alone_and_the_last_layer_of_each_part_is_zero() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    model = ADM(tiny().config)
    assert torch.equal(torch.get_rng_state(), before)
    drawn = {name: value.clone() for name, value in model.state_dict().items()}
    torch.nn.init.constant_(model.unet.get_parameter("conv_out.weight"), 7)
    model.initialize(0)
    assert all(torch.equal(value, drawn[name]) for name, value in model.state_dict().items())
    model.initialize(1)
    differ = {name for name, value in model.state_dict().items() if not torch.equal(value, drawn[name])}
    zero = {name for name, value in drawn.items() if name.endswith("weight") and not value.any()}
    assert {name.rsplit(".", 1)[0].rsplit(".", 1)[-1] for name in zero} == {"conv2", "0", "conv_out"}
    assert len(zero) == len(model.units()) + 1
    assert differ == {name for name in drawn if "norm" not in name} - zero - {
        f"{name.removesuffix('weight')}bias" for name in zero
    }
    assert not model(*model.example_inputs(2)).any()


def test_units_hold_all_attention_and_residual_blocks_and_none_holds_another() -> None:
    model = tiny()
    units = model.units()
    inside = {id(part) for unit in units for part in unit.modules()}
    assert len(inside) == sum(len(list(unit.modules())) for unit in units)
    outside = [name for name, part in model.named_modules() if id(part) not in inside and not list(part.children())]
    layers = {"time_proj", "time_embedding", "class_embedding", "conv_in", "conv_norm_out", "conv_act", "conv_out"}
    assert {name.split(".")[1] for name in outside} == layers


def test_units_of_many_shapes_all_compile_without_breaks_and_equal_ones_share_a_compilation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    model = tiny()
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([0, 5]), {"label": torch.tensor([1, 10])}
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        expected = model(*inputs)
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager", fullgraph=True))
        compile_each_unit(model)
        torch.testing.assert_close(model(*inputs), expected, rtol=1e-5, atol=1e-5)
    assert 8 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < len(model.units())


def test_an_upsampler_sees_the_small_image_and_an_unconditional_network_no_label() -> None:
    model = tiny(upscale=4)
    x_t, t, condition = model.example_inputs(2)
    assert {name: value.shape for name, value in condition.items()} == {"label": (2,), "low_resolution": (2, 1, 2, 2)}
    small = torch.randn(2, 1, 2, 2)
    large = nn.functional.interpolate(small, scale_factor=4, mode="bilinear")
    seen: list[Tensor] = []
    model.unet.conv_in.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    model(x_t, t, {**condition, "low_resolution": small})
    assert torch.equal(seen[0], torch.cat([x_t, large], dim=1))
    assert tiny(num_classes=0).example_inputs(2)[2] == {}


def test_the_order_in_which_attending_levels_are_given_does_not_matter() -> None:
    one, other = (tiny(attention_at=levels) for levels in ([2, 1], [1, 2]))
    assert one.config == other.config
    assert take_over(one, other, "there") == []


def test_a_run_starts_with_weights_whatever_their_classes_and_null_class() -> None:
    found, where = tiny(null_class=False), "there"
    (note,) = take_over(network := tiny(), found, where)
    assert "has no null class: its row of the label table starts anew" in note
    table = "unet.class_embedding.weight"
    assert torch.equal(network.state_dict()[table][:10], found.state_dict()[table])
    (note,) = take_over(backwards := tiny(null_class=False), network, where)
    assert "has a null class and this run has none" in note
    assert torch.equal(backwards.state_dict()[table], found.state_dict()[table])
    (note,) = take_over(tiny(num_classes=3), found, where)
    assert "has 10 classes and this run 3" in note
    with pytest.raises(ValueError, match=r"has head_dim 16, but model.head_dim is 8; set it to 16"):
        take_over(tiny(head_dim=8), found, where)


def test_openais_files_are_read_with_the_facts_that_they_do_not_state(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "model.pt", released()))
    found = read_foreign(path, "ema", Facts())
    torch.testing.assert_close(outputs(found.model), golden()["out"], rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    assert any("older order" in note and "new_attention_order=true" in note for note in found.notes)
    assert any("heads of 32 channels" in note and "foreign.num_heads=4" in note for note in found.notes)
    assert any("5 rows, which are read as 5 classes" in note and "num_classes=4" in note for note in found.notes)
    newer = read_foreign(path, "ema", Facts(new_attention_order=True, num_heads=2))
    assert not torch.allclose(outputs(newer.model), golden()["out"])  # type: ignore[arg-type]
    assert not any("order" in note for note in newer.notes)
    with pytest.raises(ValueError, match=r"num_classes is 7, but its label table has 5 rows: .* set it to 4 or 5"):
        read_foreign(path, "ema", Facts(num_classes=7))
    with pytest.raises(ValueError, match=r"frequency_shift is 1, but these are weights of the family ADM"):
        read_foreign(path, "ema", Facts(frequency_shift=1))


SMALL = ["model=adm_digits", "batch_size=8", "log_every=2", "checkpoint_every=2", "sample_every=null"]
SMALL += ["evaluate_every=null", "train/logger=none", "train/ema=shorter_run", "runtime=cpu", "precision=fp32"]
SMALL += ["model.width=16", "model.num_groups=4"]
UPSAMPLER = ["data/condition=low_resolution"]
FEW = ["evaluation.num_images=20", "evaluation.features.epochs=1", "sampler.steps=2", "runtime=cpu"]


def test_jobs_train_resume_sweep_sample_and_evaluate_an_adm_and_openais_file(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*SMALL, f"data.shards={digits}"]
    in_process("train", "-m", *words, "sweep_dir=runs", "seed=0,1", "total_steps=4")
    runs = sorted(path.name for path in (tmp_path / "runs").glob("adm_digits*"))
    assert runs == ["adm_digits-w16-seed0", "adm_digits-w16-seed1"]
    in_process("train", *words, "run_dir=run", "total_steps=2")
    in_process("train", *words, "run_dir=run", "total_steps=4", "resume.allow=[total_steps]")
    last = "checkpoints/step_00000004/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (tmp_path / "runs" / runs[0] / last).read_bytes()
    in_process("evaluate", "checkpoint=run", *FEW, "diffusion/guidance=classifier_free")
    record = json_lines(tmp_path / "run/evaluations.jsonl")[-1]
    assert (record["family"], record["size"]) == ("ADM", "16 channels, 2 levels")
    saved(tmp_path / "openai.pt", to_adm(tiny(null_class=False, num_groups=32, width=32)))
    given = ["checkpoint=openai.pt", "runtime=cpu", "sampler.steps=2"]
    shown = in_process("sample", *given, "num_images=2", "data.autoencoder.channels=1", "out=x")
    assert "is read" in shown
    in_process("evaluate", *given, "data.autoencoder.channels=1", *FEW[:2], "foreign.latent_size=8")
    (record,) = json_lines(tmp_path / "openai-evaluations.jsonl")
    assert (record["family"], record["size"]) == ("ADM", "32 channels, 2 levels")
    in_process("export", "checkpoint=openai.pt", "to=adm", "out=again.pt")
    again, first = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("again", "openai"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], value) for name, value in first.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.null_class=false"], "the network's label table has 10 rows for as many classes and none for dropped"),
        (["model.multipliers=[1,1,1,1,1]"], "The latent size is 8, which is not a multiple of 16"),
        (["model.upscale=4"], "embeds label, low_resolution, but conditions of data/condition have label; choose"),
        (
            ["model.upscale=2", *UPSAMPLER],
            "(1, 4, 4), but data/condition makes (1, 2, 2)",
        ),
        (["model.upscale=4", *UPSAMPLER, "sample_every=2"], "set sample_every=null and evaluate_every=null"),
        (["model.upscale=4", *UPSAMPLER, "data.normalize=true"], "an upsampler enlarges images, whose pixels are not"),
        (["diffusion/guidance=classifier"], "would need a classifier of noisy images, as ADM-G does, which is out of"),
        (["+model.depth=3"], "model.adm.ADM has no setting model.depth"),
    ],
)
def test_runs_that_cannot_be_trained_are_refused(
    words: list[str], message: str, digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    shown = in_process("train", *SMALL, *words, f"data.shards={digits}", "total_steps=2", "run_dir=run", expect=2)
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_an_upsampler_trains_on_means_of_the_images_and_enlarges_those_of_another_network(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    source = LowResolution(10, 4)
    pixels = torch.arange(64.0).view(1, 1, 8, 8)
    opened = MappedShards(digits)
    condition = source.whole({"label": torch.tensor([3])}, opened, pixels)
    opened.close()
    assert condition["low_resolution"].tolist() == [[[[13.5, 17.5], [45.5, 49.5]]]]
    assert condition["low_resolution"].shape[1:] == source.seen(pixels)["low_resolution"]
    assert source.null(condition)["label"].tolist() == [10]
    assert source.null(condition)["low_resolution"] is condition["low_resolution"]

    words = [*SMALL, *UPSAMPLER, "model.upscale=4", f"data.shards={digits}"]
    in_process("train", *words, "run_dir=run", "total_steps=2")
    small = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 1), np.uint8)
    np.savez(tmp_path / "small.npz", arr_0=small, arr_1=np.array([7, 8, 9]))
    given = ["sample", "checkpoint=run", "weights=model", "sampler.steps=2", "num_images=4", "runtime=cpu"]
    in_process(*given, "low_resolution=small.npz", "diffusion/guidance=classifier_free", "out=x")
    with np.load(tmp_path / "x.npz") as file:
        assert (file["arr_0"].shape, file["arr_1"].tolist()) == ((4, 8, 8, 1), [7, 8, 9, 7])
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((1, 8, 8, 1), np.uint8))
    np.savez(tmp_path / "labels.npz", arr_0=small, arr_1=np.array([7]))
    for more, message in (
        ([], "is an upsampler; give the images that it enlarges as low_resolution=FILE.npz"),
        (["low_resolution=large.npz"], "has images (1, 8, 8, 1) of uint8, but the upsampler takes [N, 2, 2, 1]"),
        (["low_resolution=labels.npz"], "has 3 images, but its labels arr_1 are (1,) of int64"),
        (["low_resolution=absent.npz"], "There is no file absent.npz"),
    ):
        assert message in in_process(*given, *more, "out=y", expect=2)


def test_an_upsampler_is_measured_on_the_images_that_it_makes_of_given_ones(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*SMALL, *UPSAMPLER, "model.upscale=4", f"data.shards={digits}"]
    in_process("train", *words, "run_dir=run", "total_steps=2")
    draws = np.random.default_rng(0)
    for name in ("small", "other"):
        np.savez(tmp_path / f"{name}.npz", arr_0=draws.integers(0, 256, (3, 2, 2, 1), np.uint8), arr_1=[7, 8, 9])
    measure = ["evaluate", "checkpoint=run", "weights=model", *FEW]
    kept = ["evaluation/image_file=npz", "evaluation.image_file.path=measured.npz"]
    in_process(*measure, *kept, "low_resolution=small.npz")
    in_process(*measure, "low_resolution=other.npz")
    one, other = json_lines(tmp_path / "run/evaluations.jsonl")
    assert one["sampler"] == {**other["sampler"], "low_resolution": sha256_of(tmp_path / "small.npz")}
    assert other["sampler"]["low_resolution"] == sha256_of(tmp_path / "other.npz")
    assert one["frechet_distance"] != other["frechet_distance"]
    given = ["sample", "checkpoint=run", "weights=model", "sampler.steps=2", "num_images=5", "runtime=cpu"]
    in_process(*given, "low_resolution=small.npz", "out=x")
    with np.load(tmp_path / "measured.npz") as measured, np.load(tmp_path / "x.npz") as sampled:
        assert sampled["arr_1"].tolist() == [7, 8, 9, 7, 8]
        assert np.abs(measured["arr_0"][:5].astype(int) - sampled["arr_0"]).max() <= 1
        assert sampled["arr_0"].std() > 1
    for more, message in (
        ([], "is an upsampler; give the images that it enlarges as low_resolution=FILE.npz"),
        (["low_resolution=small.npz", "metrics=[nll]"], "metrics has nll, which upsamplers do not have here"),
    ):
        assert message in in_process(*measure, *more, expect=2)


def test_openais_upsampler_is_sampled_from_its_file(tmp_path: Path, in_process: InProcess) -> None:
    weights = to_adm(tiny(channels=3, upscale=4, null_class=False, num_groups=32, width=32))
    saved(tmp_path / "upsampler.pt", weights)
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((1, 4, 4, 3), np.uint8))  # two levels: images of 16 px
    given = ["checkpoint=upsampler.pt", "runtime=cpu", "sampler.steps=2", "num_images=2", "out=x"]
    in_process("sample", *given, "low_resolution=small.npz")
    with np.load(tmp_path / "x.npz") as file:
        assert (file["arr_0"].shape, file["arr_1"].tolist()) == ((2, 16, 16, 3), [0, 1])


def test_both_u_nets_share_one_base_class() -> None:
    assert issubclass(ADM, UNet)
