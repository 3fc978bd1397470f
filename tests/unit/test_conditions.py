"""Conditions are trees that only their source and their embedding read; an empty one is unconditional."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, InProcess, json_lines, resealed
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_model import tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from core.batch import Batch, Condition, mapped, micro_batches_of
from data.conditions import ClassLabels, Unconditional, rows_of, with_dropped
from diffusion.guidance import ClassifierFreeGuidance
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDPM
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from model.blocks import AdaLNZeroBlock, CrossAttentionBlock, InContextBlock
from model.embeddings import Embedded, LabelEmbedding

WORDS = [*TINY_RUN, "run_dir=run", "total_steps=8", "log_every=2", "checkpoint_every=4"]


def test_a_batch_is_moved_and_split_whatever_its_condition_is() -> None:
    text = {"tokens": torch.arange(24).view(4, 3, 2), "mask": torch.ones(4, 3, dtype=torch.bool)}
    batch = Batch(torch.zeros(4, 1, 2, 2), torch.ones(4, 1, 2, 2), torch.arange(4), text)
    parts = micro_batches_of(batch, 2)
    assert [part.condition["tokens"].shape for part in parts] == [(2, 3, 2)] * 2
    assert torch.equal(torch.cat([part.condition["tokens"] for part in parts]), text["tokens"])
    assert all(leaf.is_meta for leaf in tree_leaves(mapped(batch, lambda tensor: tensor.to("meta"))))


def test_dropped_rows_have_the_null_condition_and_the_others_their_own() -> None:
    labels = ClassLabels(10)
    condition = labels.of_labels(np.array([3, 4, 5]))
    assert with_dropped(labels, condition, np.array([False, True, False]))["label"].tolist() == [3, 10, 5]
    assert with_dropped(Unconditional(), {}, np.array([False, True, False])) == {}
    assert rows_of(condition, np.array([2, 0, 0]))["label"].tolist() == [5, 3, 3]


@pytest.mark.parametrize("block", [AdaLNZeroBlock, CrossAttentionBlock, InContextBlock])
def test_a_network_without_classes_sees_the_time_alone(block: type[AdaLNZeroBlock]) -> None:
    model = tiny(block=block, num_classes=0)
    assert not any("label" in name for name in model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
        x = torch.ones(2, 4, 8, 8)
        one, other = model(x, torch.tensor([0, 0]), {}), model(x, torch.tensor([0, 500]), {})
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


def test_a_sampler_takes_the_number_of_images_from_the_noise() -> None:
    model = tiny(num_classes=0)
    guided = ClassifierFreeGuidance(model, Unconditional().null, 4, scale=2.0)
    process = GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())
    with torch.no_grad():
        assert DDPM(2)(guided, process, lambda _: torch.ones(3, 4, 8, 8), {}).shape == (3, 4, 8, 8)


def test_unconditional_training_resumes_samples_and_evaluates(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [*WORDS, f"data.shards={digits}", "data/condition=none", "sample_every=4"]
    in_process("train", *words)
    in_process("train", *[word.replace("run_dir=run", "run_dir=two") for word in words], "total_steps=4")
    in_process("train", *[word.replace("run_dir=run", "run_dir=two") for word in words], "resume.allow=[total_steps]")
    weights = [load_file(tmp_path / run / "checkpoints/step_00000008/model.safetensors") for run in ("run", "two")]
    assert not any("label" in name for name in weights[0])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    in_process("sample", "checkpoint=run", "num_images=5", "sampler.steps=2", "out=x")
    with np.load(tmp_path / "x.npz") as file:
        assert {name: file[name].shape for name in file} == {"arr_0": (5, 8, 8, 1)}
    shown = in_process("sample", "checkpoint=run", "num_images=5", "labels=[3]", "out=y", expect=2)
    assert "labels is given, but" in shown
    shown = in_process("sample", "checkpoint=run", "diffusion/guidance=classifier_free", "out=y", expect=2)
    assert "Guidance needs a condition, but this model is trained without one; use diffusion/guidance=none." in shown
    in_process(
        "evaluate", "checkpoint=run", "evaluation.num_images=8", "sampler.steps=2", "evaluation.features.epochs=1"
    )
    assert json_lines(tmp_path / "run/evaluations.jsonl")[-1]["recognized_fraction"] is None


class LabelAndParity(ClassLabels):
    """A source of conditions with two parts."""

    def of_labels(self, labels: NDArray[np.int64]) -> Condition:
        label = torch.from_numpy(labels)
        return {"label": label, "parity": label % 2}

    def null(self, condition: Condition) -> Condition:
        return {**super().null(condition), "parity": torch.full_like(condition["parity"], 2)}

    def in_turn(self, num_images: int, num_groups: int | None = None) -> Condition:
        return self.of_labels(super().in_turn(num_images, num_groups)["label"].numpy())


class ParityEmbedding(LabelEmbedding):
    """An embedding that uses both parts."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__(num_classes, width)
        self.parity = nn.Embedding(3, width)

    def embed(self, timestep: Tensor, condition: Mapping[str, Tensor]) -> Embedded:
        return super().embed(timestep + self.parity(condition["parity"]), condition)

    def example(self, batch: int, device: torch.device) -> dict[str, Tensor]:
        label = super().example(batch, device)["label"]
        return {"label": label, "parity": label.clone()}


def named(made: type) -> str:
    return f"{{_target_:{__name__}.{made.__name__},_partial_:true}}"


def test_a_condition_of_two_parts_trains_where_the_network_embeds_both_and_is_refused_where_not(
    digits: Path, tmp_path: Path, in_process: InProcess
) -> None:
    words = [
        *WORDS,
        f"data.shards={digits}",
        "sample_every=8",
        "~data/condition",
        f"+condition={named(LabelAndParity)}",
    ]
    shown = in_process("train", *words, expect=2)
    assert "The network DiT embeds label, but conditions of data/condition have label, parity; choose" in shown
    in_process("train", *words, f"+model.embedding={named(ParityEmbedding)}")
    weights = load_file(tmp_path / "run/checkpoints/step_00000008/model.safetensors")
    assert weights["label_embedding.weight"].shape == (11, 16)
    assert weights["label_embedding.parity.weight"].shape == (3, 16)


def test_a_run_of_an_earlier_version_had_class_labels(digits: Path, tmp_path: Path, in_process: InProcess) -> None:
    """Remove ``condition`` and the block factories from config and checkpoints, and add ``model.learn_sigma``."""
    words = [*WORDS, f"data.shards={digits}"]
    in_process("train", *words, "total_steps=4")
    run = tmp_path / "run"
    (run / "config.yaml").unlink()  # the checkpoint's stands in for it
    state = run / "checkpoints/step_00000004/state.json"
    config = json.loads(state.read_text())["config"]
    del config["condition"]
    config["model"]["learn_sigma"] = True
    del config["model"]["block"]["norm"], config["model"]["block"]["mlp"]
    resealed(state, config=config)
    in_process("sample", "checkpoint=run", "num_images=4", "labels=[3]", "sampler.steps=2", "out=x")
    assert "continues from step 4" in in_process("train", *words, "resume.allow=[total_steps]")
    shown = in_process("train", *words, "data/condition=none", "total_steps=8", expect=2)
    assert "condition" in shown
