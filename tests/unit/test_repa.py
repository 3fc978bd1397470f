"""REPA: its loss reaches what it should, its runs continue exactly, and nothing of it is left for sampling."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from conftest import InProcess, json_lines
from safetensors.torch import load_file
from small_teacher import DIM, TOKENS, encode_with_teacher, small_teacher
from torch import Tensor

from core.batch import FEATURES, WEIGHT
from model.dit import DiT, DiTConfig
from model.flops import multiply_adds, num_parameters
from model.training_head import HEAD
from train.alignment import REPA

SMALL = ["experiment=demo", "model.width=16", "model.depth=2", "model.num_heads=2", "model.patch_size=4"]
SMALL += ["batch_size=8", "log_every=2", "checkpoint_every=4", "sample_every=null", "evaluate_every=null"]
SMALL += ["train/logger=none", "train/ema=shorter_run", "runtime=cpu", "optimizer.lr=4e-3", "data.shards=shards"]
SMALL += ["diffusion=flow", "diffusion/times=logit_normal", "diffusion/sampler=euler", "sampler.steps=2"]
ALIGNED = [*SMALL, "train/alignment=repa", "alignment.block=1", "alignment.hidden=16"]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    encode_with_teacher(folder / "shards", small_teacher(folder / "dinov2"))
    encode_with_teacher(folder / "nine", small_teacher(folder / "dinov2", 42))
    return folder


@pytest.fixture
def shards(encoded: Path, tmp_path: Path) -> Path:
    (tmp_path / "shards").symlink_to(encoded / "shards")
    return tmp_path / "shards"


def network(depth: int = 4) -> DiT:
    """Return a small network with random weights everywhere, since gates of a fresh one are zero."""
    made = DiT(DiTConfig(8, 1, 4, width=16, depth=depth, num_heads=2, num_classes=5))
    generator = torch.Generator().manual_seed(5)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 1, 8, 8, generator=generator)
    return x_t, torch.arange(batch) * 100, {"label": torch.arange(batch)}


def targets(batch: int = 3, weight: float = 1.0) -> dict[str, Tensor]:
    features = torch.randn(batch, TOKENS, DIM, generator=torch.Generator().manual_seed(2)).half()
    return {FEATURES: features, WEIGHT: torch.full((batch,), weight)}


@pytest.mark.parametrize("block", [1, 2, 4])
def test_the_gradient_reaches_the_projector_and_the_blocks_up_to_the_tap_and_no_further(block: int) -> None:
    model, repa = network(), REPA(block=block, hidden=24, dim=DIM)
    repa.attach(model, seed=0)
    _, projected = model(*inputs())
    repa.losses(projected, targets()).mean().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    up_to = {f"blocks.{number}." for number in range(block)}
    beyond = {f"blocks.{number}." for number in range(block, 4)} | {"final_layer."}
    for start in (HEAD, "patch_embedding", "label_embedding", "timestep_embedding", *up_to):
        assert any(name.startswith(start) for name in reached), start
    assert not [name for name in reached if name.startswith(tuple(beyond))]


def test_a_head_changes_no_prediction_and_sees_the_tokens_after_its_block() -> None:
    plain, tapped = network(), network()
    REPA(block=2, hidden=24, dim=DIM).attach(tapped, seed=0)
    prediction, projected = tapped(*inputs())
    assert torch.equal(prediction, plain(*inputs()))
    x_t, t, condition = inputs()
    embedded = plain.embedding.embed(plain.timestep_embedding(t), condition)
    tokens = plain.patch_embedding(plain._patchify(x_t)) + plain.position_embedding
    for block in plain.block_list[:2]:
        tokens = block(tokens, embedded, None)
    assert torch.equal(projected, tapped.get_submodule(HEAD)(tokens))


def test_the_loss_is_minus_the_mean_cosine_of_a_samples_tokens_times_its_weight() -> None:
    repa = REPA(dim=DIM)
    given = targets()
    features = given[FEATURES].float()
    assert torch.allclose(repa.losses(7 * features, given), torch.tensor(-1.0))
    assert torch.allclose(repa.losses(-features, given), torch.tensor(1.0))
    other = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    expected = -torch.stack([F.cosine_similarity(other[i], features[i], dim=-1).mean() for i in range(3)])
    assert torch.allclose(repa.losses(other, given), expected, atol=1e-6)
    half = {**given, WEIGHT: torch.tensor([0.0, 1.0, 0.5])}
    assert torch.allclose(repa.losses(other, half), expected * half[WEIGHT], atol=1e-6)


def test_a_projectors_weights_follow_from_the_seed_and_leave_the_networks_as_they_are() -> None:
    one, same, other = network(), network(), network()
    before = copy.deepcopy(one.state_dict())
    for model, seed in ((one, 0), (same, 0), (other, 1)):
        REPA(block=1, hidden=24, dim=DIM).attach(model, seed)
    weights = [model.get_submodule(HEAD).state_dict() for model in (one, same, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert not torch.equal(weights[0]["0.weight"], weights[2]["0.weight"])
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items() if name in before)


def test_an_aligned_run_that_stops_halfway_ends_with_the_same_bits_and_its_averages_have_no_projector(
    shards: Path, tmp_path: Path, in_process: InProcess
) -> None:
    in_process("train", *ALIGNED, "run_dir=whole", "total_steps=8")
    in_process("train", *ALIGNED, "run_dir=run", "total_steps=4")
    in_process("train", *ALIGNED, "run_dir=run", "total_steps=8", "resume.allow=[total_steps]")
    lines = json_lines(tmp_path / "run/metrics.jsonl")
    assert lines == json_lines(tmp_path / "whole/metrics.jsonl")
    for line in lines:
        assert line["loss"] == pytest.approx(line["objective"] + 0.5 * line["alignment"], rel=1e-5)
    assert lines[-1]["alignment"] < lines[0]["alignment"]
    last = "checkpoints/step_00000008"
    for part in ("model", "ema", "optimizer"):
        name = f"{last}/{part}.safetensors"
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    parts = {part: load_file(tmp_path / "run" / last / f"{part}.safetensors") for part in ("model", "ema", "optimizer")}
    heads = {part: sum(name.startswith(HEAD) for name in tensors) for part, tensors in parts.items()}
    assert heads == {"model": 6, "ema": 0, "optimizer": 18}
    for weights in ("ema", "model"):
        sampler = ["diffusion/sampler=euler", "sampler.steps=2", "runtime=cpu"]
        in_process("sample", "checkpoint=run", *sampler, "num_images=2", f"out={weights}", f"weights={weights}")
        in_process("export", "checkpoint=run", "to=reference", f"out={weights}.pt", f"weights={weights}")
        exported = torch.load(tmp_path / f"{weights}.pt", weights_only=True)
        assert not [name for name in exported if HEAD in name]
    in_process("train", *SMALL, "run_dir=next", "total_steps=2", "init_from=run")


def test_after_stop_after_steps_the_loss_is_the_objectives(shards: Path, tmp_path: Path, in_process: InProcess) -> None:
    in_process("train", *ALIGNED, "run_dir=run", "total_steps=6", "alignment.stop_after=2", "log_every=1")
    lines = json_lines(tmp_path / "run/metrics.jsonl")
    assert [line["alignment"] != 0 for line in lines] == [True, True, False, False, False, False]
    assert [line["loss"] == line["objective"] for line in lines] == [False, False, True, True, True, True]


def test_a_diverged_aligned_run_is_replayed(shards: Path, tmp_path: Path, in_process: InProcess) -> None:
    in_process("train", *ALIGNED, "run_dir=run", "total_steps=6", "optimizer.lr=1e30", "log_every=1", expect=1)
    (dump,) = (tmp_path / "run").glob("nonfinite_*")
    shown = in_process("train", f"replay={dump}")
    assert "alignment" in shown


def test_what_does_not_fit_is_refused_in_one_sentence(
    shards: Path, encoded: Path, sound: Path, in_process: InProcess
) -> None:
    def refused(*words: str) -> str:
        shown = in_process("train", *ALIGNED, "run_dir=run", "total_steps=2", *words, expect=2)
        assert len(shown.replace("(HYDRA_FULL_ERROR=1 shows the traceback)", "").strip().splitlines()) == 1, shown
        return shown

    assert f"needs features of a teacher, but {sound} has none" in refused(f"data.shards={sound}")
    shown = refused(f"data.shards={encoded / 'nine'}")
    assert "The network has 4 tokens, but the teacher's features in the shards have 9" in shown
    assert "alignment.block is 3, but the network has 2 blocks; choose one from 1 to 2" in refused("alignment.block=3")
    assert "alignment.block is 0, but it must be at least 1" in refused("alignment.block=0")
    assert "alignment.coefficient is 0, but it must be above 0" in refused("alignment.coefficient=0")
    assert "alignment.dim is 5, but the features in" in refused("alignment.dim=5")


def test_a_run_is_refused_with_both_numbers_where_the_teachers_width_has_changed(
    shards: Path, tmp_path: Path, in_process: InProcess
) -> None:
    in_process("train", *ALIGNED, "run_dir=run", "total_steps=4")
    encode_with_teacher(tmp_path / "other", wider(tmp_path / "wide"))
    shown = in_process("train", *ALIGNED, "run_dir=run", "total_steps=4", f"data.shards={tmp_path / 'other'}", expect=2)
    assert "alignment.dim is 32 there and 48 now" in shown


def wider(folder: Path) -> Any:
    from transformers import Dinov2Config, Dinov2Model

    shape = {"num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(hidden_size=48, **shape)).save_pretrained(folder)
    return small_teacher(folder)


def test_a_projector_changes_neither_the_cost_of_sampling_nor_the_parameters_in_records() -> None:
    plain, aligned = network(), network()
    REPA(block=2, hidden=24, dim=DIM).attach(aligned, seed=0)
    assert multiply_adds(aligned) == multiply_adds(plain)
    assert num_parameters(aligned) == num_parameters(plain)


def test_plan_says_what_features_take_on_disk_and_what_the_projector_costs(
    shards: Path, sound: Path, tmp_path: Path, in_process: InProcess
) -> None:
    small = ["model.width=16", "model.depth=2", "model.num_heads=2", "model.patch_size=4", "format=json"]
    repa = ["train/alignment=repa", "alignment.block=2", "alignment.hidden=24"]
    plain, aligned = (json.loads(in_process("plan", *small, "data.shards=shards", *words)) for words in ([], repa))
    without = json.loads(in_process("plan", *small, f"data.shards={sound}"))
    strides = [np.load(folder / "labels.npz")["layout"][0, 1] for folder in (shards, sound)]  # of a sample in a tar
    assert 1e9 * plain["features_gb"] == pytest.approx(50 * (strides[0] - strides[1]))
    assert plain["shards_gb"] - without["shards_gb"] == pytest.approx(plain["features_gb"])
    assert 1e9 * plain["features_gb"] >= 2 * TOKENS * DIM * 2 * 50
    assert "features_gb" not in without
    maps = 16 * 24 + 24 * 24 + 24 * DIM
    assert 1e9 * aligned["projector_gmacs"] == pytest.approx(TOKENS * maps)
    assert 1e6 * aligned["projector_parameters_millions"] == pytest.approx(maps + 24 + 24 + DIM)
    cost = aligned["gmacs"] + aligned["projector_gmacs"]
    assert aligned["training_exaflops"] / plain["training_exaflops"] == pytest.approx(cost / aligned["gmacs"])
    assert aligned["sampling_tmacs"] == plain["sampling_tmacs"]
    assert aligned["ema_gb"] == plain["ema_gb"]
    shown = in_process("plan", *small[:-1], "data.shards=shards", *repa)
    assert "features GB  projector GMACs  its params M" in shown
    folder = [
        "data/teacher=dinov2",
        f"teacher.pretrained={shards.resolve().parent / 'dinov2'}",
        "teacher.image_size=42",
    ]
    planned = json.loads(in_process("plan", *small, *folder, "num_samples=50"))
    assert planned["features_gb"] > plain["features_gb"]
    assert "whose width is not known" in in_process("plan", *folder[:1], "teacher.pretrained=some/vit", expect=2)
    assert "this plan has none" in in_process("plan", *small, *repa, expect=2)
    shown = in_process("plan", *small, *repa, *folder, "model.latent_size=8", expect=2)
    assert "The network has 4 tokens, but the teacher's features in the shards have 9" in shown
