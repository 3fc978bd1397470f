"""Every job takes an LDM, and checkpoints of latent diffusion, whichever of its tables is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import InProcess, json_lines
from foreign_files import saved
from test_foreign_jobs import GAUSSIAN
from test_ldm import SMALL, golden_weights
from test_model import tiny
from torch import Tensor

from launch.builders.foreign import read_foreign
from launch.builders.training import load_starting_weights
from model.convert import to_ldm, to_reference
from model.family import Facts
from model.ldm import LDM, LDMConfig
from model.ldm_weights import LABELS

# The shape of model=ldm_digits on digits, with the noise alone as its output.
DIGITS = SMALL | {"channels": 1, "num_classes": 10, "width": 32, "head_dim": 16, "num_groups": 32, "context_dim": 32}
LDM_RUN = [
    *("train", "model=ldm_digits", "diffusion=ldm", "runtime=cpu", "precision=fp32", "train/ema=short_run"),
    *("batch_size=8", "checkpoint_every=2", "log_every=2", "sample_every=null", "evaluate_every=null"),
    *("train/logger=none", "optimizer.eps=1.0e-6"),
]
SHAPE = ["foreign.head_dim=16", "foreign.latent_size=8"]
FEW = ["diffusion=ldm", "sampler.steps=2", "runtime=cpu", "data.autoencoder.channels=1"]


def of_digits() -> dict[str, Tensor]:
    """Return weights of that shape under the program's names, with no tensor of zeros."""
    network, generator = LDM(LDMConfig(**DIGITS, outputs_per_channel=1)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return to_ldm(network)


def checkpoint(weights: dict[str, Tensor], averages: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the content of a checkpoint of Lightning with tensors and plain values alone."""
    state = {**weights, "first_stage_model.decoder.conv_in.weight": torch.ones(3)}
    if averages is not None:
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
        names = {name: name.removeprefix("model.").replace(".", "") for name in averages if name != LABELS}
        state |= {f"model_ema.{plain}": averages[name] for name, plain in names.items()}
    return {"epoch": 3, "global_step": 100, "pytorch-lightning_version": "1.4.2", "state_dict": state}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_a_run_of_an_ldm_continues_bit_for_bit_and_is_sampled_and_measured(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    words = [*LDM_RUN, f"data.shards={digits}"]
    in_process(*words, "total_steps=4", "run_dir=whole")
    in_process(*words, "total_steps=2", "run_dir=run")
    in_process(*words, "total_steps=4", "run_dir=run", "resume.allow=[total_steps]")
    whole, again = (tmp_path / name / "checkpoints/step_00000004" for name in ("whole", "run"))
    for name in ("model", "ema", "optimizer"):
        assert (whole / f"{name}.safetensors").read_bytes() == (again / f"{name}.safetensors").read_bytes()
    in_process("sample", "checkpoint=run", "num_images=3", "sampler.steps=2", "runtime=cpu", "out=x")
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (3, 8, 8, 1)
    few = ["evaluation.num_images=10", "evaluation.features.epochs=1", "metrics=[frechet]", "sampler.steps=2"]
    in_process("evaluate", "checkpoint=run", *few, "runtime=cpu")
    (record,) = json_lines(tmp_path / "run/evaluations.jsonl")
    assert (record["family"], record["width"], record["levels"]) == ("LDM", 32, 2)


def test_jobs_sample_from_start_from_and_export_checkpoints_of_latent_diffusion(
    tmp_path: Path, in_process: InProcess, digits: Path
) -> None:
    weights = of_digits()
    averages = {name: value + 0.01 for name, value in weights.items()}
    saved(tmp_path / "model.ckpt", checkpoint(weights, averages))
    given = ["sample", "checkpoint=model.ckpt", *FEW, "num_images=3", "out=x"]
    shown = in_process(*given, expect=2)
    assert "do not contain their number of heads, and their shape is neither LDM-4's nor LDM-8's; give foreign" in shown
    shown = in_process(*given, *SHAPE)
    assert "table 'state_dict/model_ema.diffusion_model' is used" in shown
    with np.load(tmp_path / "x.npz") as file:
        assert file["arr_0"].shape == (3, 8, 8, 1)
    measure = ["evaluation.num_images=20", "evaluation.features.epochs=1"]
    in_process("evaluate", "checkpoint=model.ckpt", *FEW, *SHAPE, *measure)
    (record,) = json_lines(tmp_path / "model-evaluations.jsonl")
    assert (record["family"], record["levels"]) == ("LDM", 2)
    shown = in_process(*given, *SHAPE, "diffusion=gaussian", expect=2)
    assert "The objective needs 2 output channels, but model.ckpt has 1" in shown
    run = [
        *LDM_RUN,
        f"data.shards={digits}",
        "model.num_groups=32",
        "total_steps=2",
        "optimizer.lr=0",
        "init_from=model.ckpt",
    ]
    in_process(*run, "run_dir=run")
    in_process("export", "checkpoint=run", "to=ldm", "out=back.ckpt", "weights=model")
    assert same(
        torch.load(tmp_path / "back.ckpt", weights_only=True)["state_dict"], averages | {LABELS: weights[LABELS]}
    )
    shown = in_process("export", "checkpoint=run", "to=diffusers", "out=no", expect=2)
    assert "writes weights of the family DiT or SD, but run has a network of the family LDM; give to=ldm" in shown
    assert not (tmp_path / "no").exists()


def test_the_averages_of_a_checkpoint_come_with_the_label_table(tmp_path: Path) -> None:
    weights = golden_weights()
    averages = {name: value * 2 for name, value in weights.items()}
    facts = Facts(head_dim=16)
    path = str(saved(tmp_path / "a.ckpt", checkpoint(weights, averages)))
    labels = {LABELS: weights[LABELS]}
    assert same(to_ldm(read_foreign(path, "ema", facts).model), averages | labels)
    assert same(to_ldm(read_foreign(path, "state_dict/model.diffusion_model", facts).model), weights)
    with pytest.raises(ValueError, match=r"has 2 tables of weights .* but 'other' does not identify one"):
        read_foreign(path, "other", facts)
    alone = read_foreign(str(saved(tmp_path / "b.ckpt", checkpoint(weights))), "ema", facts)
    assert same(to_ldm(alone.model), weights)
    assert any(
        "1 other tensors next to it are not used; the first is first_stage_model" in note for note in alone.notes
    )


class Callback:
    """Stands for a class of Lightning, by which its checkpoints name their callbacks."""


def test_a_checkpoint_with_classes_of_other_programs_is_refused_in_one_sentence(tmp_path: Path) -> None:
    content = checkpoint(golden_weights()) | {"callbacks": {Callback: {"best": 1.0}}}
    path = str(saved(tmp_path / "a.ckpt", content))
    with pytest.raises(ValueError, match=r"a.ckpt is refused: besides tensors and plain values it has .*Callback, and"):
        read_foreign(path, "ema", Facts(head_dim=16))


def test_weights_of_an_ldm_and_of_other_families_are_not_taken_for_each_other(tmp_path: Path) -> None:
    ldm = str(saved(tmp_path / "ldm.ckpt", checkpoint(golden_weights())))
    dit = str(saved(tmp_path / "dit.pt", to_reference(tiny())))
    with pytest.raises(ValueError, match=r"these are weights of the family LDM, but foreign.family is ADM"):
        read_foreign(ldm, "ema", Facts(family="ADM"))
    with pytest.raises(ValueError, match=r"weights of the family DiT, but foreign.family is LDM"):
        read_foreign(dit, "ema", Facts(family="LDM"))
    network = LDM(LDMConfig(**SMALL))
    with pytest.raises(ValueError, match="init_from has weights of the family DiT, but this run's network is of the"):
        load_starting_weights(network, dit, GAUSSIAN)
    with pytest.raises(ValueError, match="init_from has weights of the family LDM, but this run's network is of the"):
        load_starting_weights(tiny(), ldm, GAUSSIAN)
    with pytest.raises(ValueError, match=r"frequency_shift is 1, but these are weights of the family LDM"):
        read_foreign(ldm, "ema", Facts(frequency_shift=1, head_dim=16))
