"""Weights of each family of programs are recognized by the one list, and never loaded as those of another."""

import functools
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines
from foreign_files import random_model, released_weights, saved
from test_adm import released as adm_weights
from test_foreign_jobs import GAUSSIAN
from test_ldm import golden_weights as ldm_weights
from test_lightningdit import CONFIGURATIONS, HEADS, weights
from test_model import tiny, trained
from torch import Tensor

from diffusion.flow import Flow
from launch.builders.foreign import read_foreign
from launch.builders.training import load_starting_weights
from model.attention import QKNormSelfAttention, RotaryQKRmsNormSelfAttention, RotarySelfAttention
from model.blocks import AdaLNBlock, AdaLNZeroBlock, AdaLNZeroUnshiftedBlock
from model.convert import from_adm, from_ldm, from_sd, to_lightningdit
from model.dit import DiT, DiTConfig
from model.families import FAMILIES, family_of, require_written
from model.family import Facts
from model.ldm_weights import LABELS
from model.mlp import SwiGluMlp
from model.norms import rms_norm
from model.starting import take_over

LIGHTNING = partial(AdaLNZeroBlock, norm=rms_norm, mlp=SwiGluMlp, attention=RotarySelfAttention)
REVERSED = Flow(reversed_time=True)
PROGRAMS = {"reference": "DiT", "lightningdit": "LightningDiT", "adm": "ADM", "ldm": "LDM", "sd": "SD"}
FLOW = ["diffusion=flow", "diffusion.reversed_time=true", "diffusion/sampler=euler"]
MODERN = ["model/norm=rms", "model/mlp=swiglu", "model/attention=rotary"]


@functools.cache
def lightning_digits() -> dict[str, Tensor]:
    """Return LightningDiT's weights of the shape that `TINY_RUN` trains, with no tensor of zeros."""
    model, generator = DiT(DiTConfig(8, 1, 4, 16, 2, 2, 10, LIGHTNING, 1)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return to_lightningdit(model)


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_lightningdits_files_are_recognized_by_the_parts_that_only_it_has(configuration: str, tmp_path: Path) -> None:
    content = {"ema": {f"module.{name}": value for name, value in weights(configuration).items()}, "opt": {}}
    found = read_foreign(str(saved(tmp_path / "a.pt", content)), "ema", Facts(num_heads=HEADS))
    assert (found.family.name, found.family_is_certain) == ("LightningDiT", True)
    assert f"{tmp_path}/a.pt: its weights are of the family LightningDiT." in found.notes
    back = to_lightningdit(found.model)
    assert all(torch.equal(back[name], value) for name, value in weights(configuration).items())


def test_names_that_two_programs_share_are_of_the_one_that_the_file_or_the_user_says() -> None:
    state = released_weights()
    by_name = {family.name: family for family in FAMILIES}
    assert family_of(state, None, None) == (by_name["DiT"], False)
    assert family_of(state, None, by_name["SiT"]) == (by_name["SiT"], True)
    assert family_of(state, "LightningDiT", by_name["SiT"]) == (by_name["LightningDiT"], True)
    assert family_of(weights(CONFIGURATIONS[0]), None, by_name["DiT"]) == (by_name["LightningDiT"], True)


def test_a_file_that_is_asked_for_as_another_family_is_refused_with_both_names(tmp_path: Path) -> None:
    path = str(saved(tmp_path / "a.pt", weights(CONFIGURATIONS[0])))
    for name in ("DiT", "SiT"):
        with pytest.raises(ValueError, match=rf"a.pt: these are weights of the family LightningDiT, but .* is {name};"):
            read_foreign(path, "ema", Facts(family=name))
    with pytest.raises(ValueError, match=r"family is 'dit', but the families of weights are DiT, SiT, LightningDiT"):
        read_foreign(path, "ema", Facts(family="dit"))
    with pytest.raises(
        ValueError, match=r"frequency_shift is 1, but these are .* LightningDiT, and only DiT, SiT have"
    ):
        read_foreign(path, "ema", Facts(frequency_shift=1))


def test_a_run_does_not_start_with_weights_of_another_family(tmp_path: Path) -> None:
    lightning = str(saved(tmp_path / "l.pt", weights(CONFIGURATIONS[0])))
    shape: dict[str, Any] = {"latent_size": 4, "channels": 8, "patch_size": 1, "num_classes": 5}
    dit = tiny(**shape, outputs_per_channel=1)
    with pytest.raises(ValueError, match=r"the family LightningDiT with .*, but this run's network is of DiT with ad"):
        load_starting_weights(dit, lightning, REVERSED)
    released = str(saved(tmp_path / "d.pt", released_weights()))
    for block, name in ((LIGHTNING, "LightningDiT"), (partial(AdaLNZeroBlock, attention=QKNormSelfAttention), r"QK-n")):
        with pytest.raises(ValueError, match=rf"of the family DiT with .*, but this run's network is of .*{name}"):
            load_starting_weights(tiny(block=block), released, GAUSSIAN)
    started = tiny(**shape, outputs_per_channel=1, block=LIGHTNING)
    load_starting_weights(started, lightning, REVERSED)
    back = to_lightningdit(started)
    assert all(torch.equal(back[name], value) for name, value in weights(CONFIGURATIONS[0]).items())


def test_blocks_whose_weights_have_equal_shapes_are_told_apart() -> None:
    """Two blocks with four modulations, or with and without rotation, would load and compute something else."""
    rotary = partial(AdaLNZeroBlock, attention=RotarySelfAttention)
    for one, other in ((AdaLNBlock, AdaLNZeroUnshiftedBlock), (AdaLNZeroBlock, rotary)):
        theirs, ours = (tiny(block=block) for block in (one, other))
        shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (theirs, ours)]
        assert shapes[0] == shapes[1]
        with pytest.raises(ValueError, match=r"run has other blocks than model.block"):
            take_over(ours, theirs, "run")


def test_starting_weights_need_the_same_position_table() -> None:
    tables = ("fixed", "learned", "none")
    for theirs in tables:
        for ours in tables:
            network, found = tiny(position_table=ours), trained(AdaLNZeroBlock)
            found = tiny(position_table=theirs) if theirs != "fixed" else found
            if theirs == ours:
                assert take_over(network, found, "run") == []
                continue
            with pytest.raises(
                ValueError, match=f"position_table {theirs}, but model.position_table is {ours}; set it"
            ):
                take_over(network, found, "run")
    (note,) = take_over(tiny(position_table="none"), tiny(position_table="none", latent_size=4), "run")
    assert note.startswith("run has latents of side 4 and this run of 8")
    with pytest.raises(ValueError, match=r"learned position table for latents of side 4, but model.latent_size is 8"):
        take_over(tiny(position_table="learned"), tiny(position_table="learned", latent_size=4), "run")


def test_a_network_says_its_family_and_the_parts_that_the_paper_does_not_have() -> None:
    qk = partial(AdaLNZeroBlock, norm=rms_norm, mlp=SwiGluMlp, attention=RotaryQKRmsNormSelfAttention)
    unscaled = partial(AdaLNZeroBlock, norm=partial(rms_norm, always_scaled=False))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "DiT"),
        ({"block": AdaLNBlock}, "DiT"),
        ({"block": LIGHTNING}, "LightningDiT"),
        ({"block": qk}, "LightningDiT + QK-RMSNorm"),
        (
            {"block": partial(AdaLNZeroBlock, mlp=SwiGluMlp), "position_table": "none"},
            "DiT + SwiGLU, no position table",
        ),
        ({"block": unscaled, "position_table": "learned"}, "DiT + RMSNorm without scale, learned positions"),
    ]
    assert [tiny(**changes).facts()["family"] for changes, _ in cases] == [family for _, family in cases]


def test_jobs_sample_from_measure_start_from_and_export_lightningdits_files(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    saved(tmp_path / "a.pt", {"ema": lightning_digits()})
    given = ["checkpoint=a.pt", "foreign.num_heads=2", "runtime=cpu"]
    grey = "data.autoencoder.channels=1"
    shown = in_process("sample", *given, *FLOW, "sampler.steps=2", "num_images=3", grey, "out=x")
    assert "note: a.pt: its weights are of the family LightningDiT." in shown
    images = np.load(tmp_path / "x.npz", allow_pickle=False)["arr_0"]
    assert images.shape == (3, 8, 8, 1)
    for words in ([], ["diffusion=flow", "diffusion/sampler=euler"]):
        shown = in_process("sample", *given, *words, grey, "out=y", expect=2)
        assert (
            "a.pt has weights of LightningDiT, whose time runs from noise (0) to data (1), but the objective" in shown
        )
        assert "set diffusion=flow diffusion.reversed_time=true" in shown
    few = ["sampler.steps=2", "evaluation.num_images=10", "evaluation.features.epochs=1", f"data.shards={digits}"]
    in_process("evaluate", *given, *FLOW, *few, "metrics=[frechet]")
    (record,) = json_lines(tmp_path / "a-evaluations.jsonl")
    assert (record["foreign"], record["family"], record["block"]) == ("a.pt", "LightningDiT", "adaLN-Zero")
    run = ["train", *TINY_RUN, f"data.shards={digits}", "runtime=cpu", "total_steps=10", *FLOW, *MODERN]
    in_process(*run, "init_from=a.pt", "run_dir=run", "optimizer.lr=0")
    in_process("export", "checkpoint=run", "to=lightningdit", "out=back.pt", "weights=model")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back["args"] == {"model": "LightningDiT", "path_type": "Linear", "prediction": "velocity"}
    assert back["ema"].keys() == lightning_digits().keys()
    assert all(torch.equal(back["ema"][name], value) for name, value in lightning_digits().items())
    shown = in_process("export", "checkpoint=back.pt", "foreign.num_heads=2", "to=reference", "out=no", expect=2)
    assert "has weights of LightningDiT, whose time runs the other way" in shown


def test_what_lightningdit_does_not_have_is_not_written_for_it(tmp_path: Path, in_process: InProcess) -> None:
    saved(tmp_path / "d.pt", {"ema": released_weights(), "args": {"model": "DiT-XL/2"}})
    shown = in_process("export", "checkpoint=d.pt", "foreign.num_heads=4", "to=lightningdit", "out=no", expect=2)
    assert "d.pt has weights of DiT, whose time runs the other way" in shown
    assert not (tmp_path / "no").exists()
    plain = read_foreign(str(saved(tmp_path / "p.pt", released_weights())), "ema", Facts(num_heads=4))
    assert (plain.family.name, plain.certain_family) == ("DiT", None)
    assert FAMILIES[0].write(random_model()).keys() == released_weights().keys()


def test_weights_of_each_class_of_networks_are_refused_by_the_others_with_both_names(tmp_path: Path) -> None:
    files = {"DiT": released_weights(), "LightningDiT": weights(CONFIGURATIONS[0]), "ADM": adm_weights()}
    files["LDM"] = ldm_weights()
    files["SD"] = {name: value for name, value in ldm_weights().items() if name != LABELS}  # captions in their place
    networks = {"DiT": tiny(), "ADM": from_adm(adm_weights()), "LDM": from_ldm(ldm_weights())}
    networks["SD"] = from_sd(files["SD"], head_dim=16)
    for theirs, state in files.items():
        path = str(saved(tmp_path / f"{theirs}.pt", state))
        for ours, network in networks.items():
            if ours in theirs:
                continue
            with pytest.raises(ValueError, match=rf"weights of the family {theirs}, but .* is of the family {ours};"):
                load_starting_weights(network, path, GAUSSIAN)
            with pytest.raises(ValueError, match=rf"weights of the family {theirs}, but foreign.family is {ours};"):
                read_foreign(path, "ema", Facts(family=ours))
            with pytest.raises(ValueError, match=r"init_from run has weights of the family .*, but this run's network"):
                take_over(network, next(other for name, other in networks.items() if name != ours), "run")
    for ours, network in networks.items():
        for program, family in PROGRAMS.items():
            if ours in family:
                require_written(program, network, "run")
                continue
            with pytest.raises(ValueError, match=rf"weights of the family {family}, but run has .* {ours}; give to="):
                require_written(program, network, "run")


def test_a_hostile_file_is_refused_in_one_sentence_whatever_family_it_claims(tmp_path: Path) -> None:
    for configuration in CONFIGURATIONS:
        given = weights(configuration)
        for name in (FAMILIES[0].anchor, "pos_embed", "blocks.0.adaLN_modulation.1.bias", "feat_rope.freqs_cos"):
            if name not in given:
                continue
            for value in (torch.tensor(1.0), torch.zeros(0), torch.zeros(2, 2, 2, 2, 2)):
                path = str(saved(tmp_path / "h.pt", {"ema": {**given, name: value}, "args": {"model": [1]}}))
                with pytest.raises(ValueError, match=r"h\.pt: (These are not a DiT's weights|foreign)"):
                    read_foreign(path, "ema", Facts(num_heads=HEADS))
    content = {"ema": released_weights(), "args": {"num_classes": torch.zeros(3), "model": None}}
    assert read_foreign(str(saved(tmp_path / "h.pt", content)), "ema", Facts(num_heads=HEADS)).model.num_classes == 10
