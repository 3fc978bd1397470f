"""Every mistake of a user is one sentence and exit code 2."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY_RUN, InProcess, needs_torch_xla
from faulty_server import FaultyServer

from launch import cli
from launch.command.app import _sentence
from launch.command.check import check_parameters


def fails(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> str:
    """Run the command in this process; returns the sentence after 'error:'."""
    # Where a mistake is overlooked, the run that starts is a short one.
    short = ["total_steps=1"] if arguments[0] == "train" and "total_steps" not in " ".join(arguments) else []
    monkeypatch.setattr(sys, "argv", ["ditscale", *arguments[:1], *short, *arguments[1:]])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1, lines
    return lines[0].split("error: ", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "There is no job 'trian'; did you mean 'train'?"),
        (["train", "model.widht=3"], "no setting 'model.widht'; did you mean 'model.width'?"),
        (["train", "modle.width=3"], "did you mean 'model.width'?"),
        (["train", "total_stepss=3"], "did you mean 'total_steps'?"),
        (["train", "model/blok=adaln_zero"], "did you mean 'model/block'?"),
        (["train", "model/block=adaln_zer"], "no 'adaln_zer' in model/block; did you mean 'adaln_zero'?"),
        (["train", "experiment=dmo"], "did you mean 'demo'?"),
        (["train", "experiment=demo/studdy"], "no 'demo/studdy' in experiment; did you mean 'demo/study'?"),
        (["train", "experiment=scaling"], "The options are: demo, demo/blocks, demo/network/"),
        (["plan", "experiment=demo"], "`ditscale plan` has no setting 'experiment'."),
        (
            ["train", "model.block.shift=3"],
            "no setting 'model.block.shift'; model.block has mlp_ratio, attention,",
        ),
        (
            ["plan", "+model.block.drop=3"],
            "the settings mlp_ratio, attention, norm, mlp, has no setting model.bl",
        ),
        (
            ["train", "model.rotary=true"],
            "'model.rotary'; model has depth, width, num_heads, block, patch_size",
        ),
        (["train", "+model.widht=3"], "model.dit.DiT has no setting model.widht; did you mean 'width'?"),
        (["train", "total_steps=abc"], "total_steps is 'abc', but it must be of type integer"),
        (["train", "model.width=abc"], "model.width is 'abc', but input should be a valid integer"),
        (["train", "optimizer.lr=abc"], "optimizer.lr is 'abc'"),
        (["train", "precision=fp16"], "precision: Invalid value 'fp16', expected one of [fp32, bf16]"),
        (["train", "-m", "total_steps=1", "hydra.launcher.n_jobs=0"], "hydra.launcher.n_jobs is 0; give the number"),
        (["train", "total_steps=0"], "total_steps is 0, but it must be positive"),
        (
            ["train", "keep_checkpoint_every=15000"],
            "keep_checkpoint_every 15000 is not a multiple of checkpoint_every 10000",
        ),
        (["train", "class_dropout=2"], "class_dropout is 2.0"),
        (["sample"], "checkpoint is missing"),
        (["sample", "checkpoint=nowhere"], "no checkpoint folder nowhere"),
        (["sample", "checkpoint=x", "num_images=0"], "num_images is 0"),
        (["train", "sample_every=0"], "sample_every is 0, but it must be positive (null is never)"),
        (["train", "max_grad_norm=-1"], "max_grad_norm is -1.0, but it must be positive"),
        (["train", "max_grad_norm=inf"], "max_grad_norm is inf, but a setting must be a finite number; give another"),
        (["train", "data.latent_std=[1.0,inf]"], "data.latent_std is inf, but a setting must be a finite number"),
        (
            ["train", "experiment=demo", "diffusion=flow", "diffusion/sampler=dopri5"],
            "has no setting sampler.steps; leave it out, or give '~sampler.steps' where an experiment sets it.",
        ),
        (["train", "optimizer.lr=nan"], "optimizer.lr is nan, but a setting must be a finite number"),
        (["evaluate", "checkpoint=x.pt", "diffusion/sampler=edm_heun", "sampler.churn_max=inf"], "churn_max is inf"),
        (["evaluate", "checkpoint=x.pt", "compile=whole"], "compile is 'whole', but there are true, false and where_p"),
        (["train", "evaluation.batch_size=0"], "evaluation.batch_size is 0, but it must be positive"),
        (["train", "+data.flipp=true"], "no setting 'data.flipp'; did you mean 'flip'?"),
        (["train", "data.flip=ture"], "data.flip: Value 'ture' is not a valid bool"),
        (["train", "model.width=null"], "model.width is None, but it must be one whole number"),
        (["encode", "batch_size=0"], "batch_size is 0, but it must be positive"),
        (["encode", "data.image_size=abc"], "data.image_size is 'abc', but it must be of type integer"),
        (["report"], "sweep is missing; give it as sweep=VALUE"),
        (["encode", "data=folder"], "data.name is missing; give it as data.name=VALUE"),
        (["report", "sweep=nowhere"], "no sweep nowhere"),
        (["encode", "data.image_size=16", "data.shards=new"], "is 8x8, but data.image_size is 16"),
        (["train", "runtime.device=cuda"], "PyTorch sees 0 GPUs"),
        pytest.param(
            ["train", "runtime=xla", "runtime.device=tpu"],
            "runtime.device is tpu, but this machine has 0 TPUs",
            marks=needs_torch_xla,
        ),
        (["train", "runtime=xla", "runtime.mode=zero2"], "runtime.mode is 'zero2', but input should be 'replicated'"),
        (["train", "runtime.mode=zero1"], "runtime.mode is 'zero1', but input should be 'replicated' or 'fsdp'"),
        (["train", "runtime=acelerate"], "no 'acelerate' in runtime; did you mean 'accelerate'?"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(
    arguments: list[str],
    words: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    import torch

    if arguments == ["train", "runtime.device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/digits").symlink_to(digits)
    assert words in fails(arguments, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.patch_size=3", "model.patch_size 3 does not divide the latent size 8; choose one of [1, 2, 4, 8]"),
        ("model.num_heads=3", "model.num_heads 3 does not divide model.width 16"),
        ("model.num_classes=7", "model.num_classes is 7, but the shards have 10"),
        ("data.image_size=16", "image_size is 8 and not 16 as configured"),
        ("data.flip=true", "flip is False and not True as configured"),
        ("data.autoencoder.channels=3", "channels is 1 and not 3 as configured"),
        ("data.shards=nowhere", "There is no manifest.json in nowhere"),
        (
            "data.shards=ftp://nowhere",
            "ftp://nowhere/manifest.json has the protocol ftp://, but files are read from s3",
        ),
        ("data.cache_bytes=0", "data.cache_bytes is 0, but it must be positive"),
        ("data/order=windowed data.order.shards_per_window=0", "data.order.shards_per_window is 0, but a window has"),
        ("sampler.steps=1001", "sampler.steps is 1001, but the process was trained with 1000 steps"),
        ("ema.decay=1.0", "ema.decay is 1.0"),
        ("seed=-1", "seed is -1"),
        ("+model.outputs_per_channel=1", "model.outputs_per_channel is given, but the objective determines it"),
        ("diffusion=flow", "sampler ddpm needs diffusion=gaussian, but the objective is diffusion=flow"),
        ("init_from=nowhere", "There is no checkpoint folder nowhere"),
        ("class_dropout=0 diffusion/guidance=classifier_free", "this model is trained with class_dropout 0"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(
    override: str,
    words: str,
    digits: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fails(["train", *TINY_RUN, f"data.shards={digits}", *override.split()], monkeypatch, capfd)


def test_a_missing_or_cut_shard_stops_training_with_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    cut = shards / "shard-000001.tar"
    cut.write_bytes(cut.read_bytes()[:512])
    sentence = fails(["train", *TINY_RUN, f"data.shards={shards}"], monkeypatch, capfd)
    assert re.search(
        r"shard-000001.tar is damaged: .*the file has 512 \(sha256 \w{64} expected, \w{64} found\)", sentence
    )
    cut.unlink()
    sentence = fails(["train", *TINY_RUN, f"data.shards={shards}"], monkeypatch, capfd)
    assert "shard-000001.tar is missing, but the manifest lists it; run the same `ditscale encode` again" in sentence


def test_a_damaged_shard_stops_training_with_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shards = tmp_path / "shards"
    shutil.copytree(digits, shards)
    (shards / "shard-000001.tar").write_bytes(bytes((shards / "shard-000001.tar").stat().st_size))
    sentence = fails(["train", *TINY_RUN, f"data.shards={shards}"], monkeypatch, capfd)
    assert "shard-000001.tar is damaged: the manifest says sha256" in sentence


def test_shards_behind_a_url_that_fail_are_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with FaultyServer(digits).running() as server:
        words = ["train", *TINY_RUN, f"data.shards={server.url}"]
        sentence = fails([*words, "data.cache_bytes=100000"], monkeypatch, capfd)
        assert f"data.cache_bytes is 100000, but the 8 shards of {server.url} that data.order needs" in sentence
        (tmp_path / "other").mkdir()
        server.folder = tmp_path / "other"
        assert f"There is no manifest.json in {server.url}" in fails(words, monkeypatch, capfd)


def test_a_run_folder_with_another_config_and_a_damaged_checkpoint_are_one_sentence(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=10"]
    monkeypatch.setattr(sys, "argv", ["ditscale", *words])
    cli.main()
    sentence = fails([*words, "optimizer.lr=0.1"], monkeypatch, capfd)
    assert "already holds another config: optimizer.lr is 0.004 there and 0.1 now" in sentence
    sentence = fails([*words, "data/order=windowed"], monkeypatch, capfd)
    assert "data.order._target_ is 'data.order.GlobalOrder' there and 'data.order.WindowedOrder' now" in sentence
    sentence = fails(["sample", "checkpoint=run", "labels=[3,11]"], monkeypatch, capfd)
    assert "labels has 11, but this model knows the classes 0 to 9" in sentence
    weights = tmp_path / "run/checkpoints/step_00000010/ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    sentence = fails(["sample", "checkpoint=run"], monkeypatch, capfd)
    assert "is damaged: ema.safetensors should have blake3" in sentence
    (weights.parent / "state.json").unlink()
    assert "state.json is missing or damaged" in fails(["sample", "checkpoint=run"], monkeypatch, capfd)


def test_a_command_that_is_refused_leaves_the_runs_config_as_it_was(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", *TINY_RUN, f"data.shards={digits}", "run_dir=run", "total_steps=1", "evaluate_every=1"]
    words += ["evaluation.num_images=10", "evaluation.features.epochs=1"]
    monkeypatch.setattr(sys, "argv", ["ditscale", *words, "sampler.steps=2"])
    cli.main()
    before = (tmp_path / "run/config.yaml").read_bytes()
    assert 'have sampler {"name": "ddpm", "steps": 2}, but' in fails([*words, "sampler.steps=3"], monkeypatch, capfd)
    assert (tmp_path / "run/config.yaml").read_bytes() == before


def test_help_lists_the_jobs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["ditscale", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(job in shown for job in ("encode", "train", "sample", "evaluate", "report"))


def test_a_full_gpu_is_one_sentence_with_what_takes_less_memory() -> None:
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 3.00 MiB "
        "is free. Including non-PyTorch memory, this process has 139.79 GiB memory in use."
    )
    assert _sentence("evaluate", error) == (
        "The GPU's memory is full (Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 139.80 GiB of which 3.00 "
        "MiB is free); set a smaller evaluation.batch_size."
    )
    assert "set runtime.micro_batches=2" in str(_sentence("train", error))


@pytest.mark.parametrize("job", cli.JOBS)
def test_the_help_of_a_job_is_headed_by_its_name(job: str, in_process: InProcess) -> None:
    assert in_process(job, "--help").startswith(f"ditscale {job}: ")


def test_a_setting_that_an_experiment_brought_is_to_be_left_out_and_a_misspelt_one_corrected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    section = {"_target_": "model.dit.DiT", "dept": 3}
    monkeypatch.setattr("sys.argv", ["train", "experiment=demo"])
    with pytest.raises(ValueError, match=r"give '~model\.dept' where an experiment sets it"):
        check_parameters(section, "model.")
    monkeypatch.setattr("sys.argv", ["train", "experiment=demo", "+model.dept=3"])
    with pytest.raises(ValueError, match=r"no setting model\.dept; did you mean 'depth'"):
        check_parameters(section, "model.")
