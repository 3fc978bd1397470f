"""Trace ditscale's training step over many devices, without weights and without executing it.

``CPU_NUM_DEVICES=8 python -m benchmarks.tpu_lower FOLDER [override ...]`` takes overrides of ``ditscale train``. It
writes ``step.hlo``, the step before partitioning, and ``step.json``, its facts, for `benchmarks.tpu_aot`.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("PJRT_DEVICE", "CPU")

import hydra
import torch
from omegaconf import OmegaConf

from benchmarks.commit import current_commit
from core.batch import Batch
from launch.builders.build import build
from launch.command.app import CONF
from launch.command.settings import register
from model.dit import DiT
from model.flops import num_parameters, training_multiply_adds
from model.network import checkpoint_units
from runtime.lowering import TracingRuntime
from train.ema import Averages
from train.step import make_step

# DiT-XL/2 at 256 px, whose latents are 32x32x4.
XL_2 = ("model/size=xl", "model.patch_size=2", "model.latent_size=32", "model.channels=4", "model.num_classes=1000")


def compose(overrides: list[str]) -> dict[str, Any]:
    """Return the config of ``ditscale train`` for XL/2 in bf16 under the XLA runtime, with overrides."""
    register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", ["runtime=xla", "precision=bf16", "shape_name=step", *XL_2, *overrides])
    return OmegaConf.to_container(config, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def trace(config: dict[str, Any], runtime: TracingRuntime) -> str:
    """Return the HLO of one whole step, with all shardings."""
    runtime.require_batch(config["batch_size"])
    model = weightless(config["model"])
    process = runtime.place(build(config["diffusion"]))
    ema: Averages = build(config["ema"])(model)
    averages = list(ema.modules.values())
    optimizer = build(config["optimizer"])(model.parameters())
    if config["activation_checkpointing"]:
        checkpoint_units(model, runtime.checkpoint)
    stepped, optimizer = runtime.prepare(model, averages, optimizer)
    step = make_step(stepped, optimizer, ema, process, runtime, config["max_grad_norm"])
    metrics = step(next(runtime.feed([host_batch(model, config["batch_size"])])))
    moments = [value for state in optimizer.state.values() for value in state.values()]
    weights = [value for module in (model, *averages) for value in module.parameters()]
    return runtime.hlo([*metrics.values(), *weights, *moments])


def weightless(section: dict[str, Any]) -> DiT:
    """Return the network with weights on the meta device. Its buffers, which depth does not change, are real."""
    with torch.device("meta"):
        model: DiT = build(section)
    for path, buffer in build({**section, "depth": 1}).named_buffers():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, buffer)
    return model


def host_batch(model: DiT, batch_size: int) -> Batch:
    """Return a batch of zeros: only shapes matter."""
    latent = torch.zeros(batch_size, model.config.channels, model.config.latent_size, model.config.latent_size)
    index = torch.zeros(batch_size, dtype=torch.int64)
    return Batch(x_0=latent, noise=latent.clone(), t=index, condition={"label": index.clone()})


def facts(config: dict[str, Any], runtime: TracingRuntime) -> dict[str, Any]:
    """Return the facts on the traced step and on the versions that traced it."""
    model = weightless(config["model"])
    shape = model.config
    mode, fsdp_devices = config["runtime"]["mode"], config["runtime"]["fsdp_devices"] or runtime.num_devices
    return {
        "model": f"DiT-{shape.depth}x{shape.width}/{shape.patch_size}",
        "parameters": num_parameters(model),
        "batch_size": config["batch_size"],
        "precision": config["precision"],
        "mode": mode,
        "activation_checkpointing": config["activation_checkpointing"],
        "fsdp_devices": fsdp_devices if mode != "replicated" else None,
        "traced_devices": runtime.num_devices,
        "model_multiply_adds": training_multiply_adds(model, config["batch_size"]),
        "torch": torch.__version__,
        "torch_xla": version("torch_xla"),
        "commit": current_commit(),
    }


def main() -> None:
    """Trace the step, and write its HLO and its facts."""
    folder, config = Path(sys.argv[1]), compose(sys.argv[2:])
    runtime = TracingRuntime(config["precision"], config["runtime"]["mode"], config["runtime"]["fsdp_devices"])
    (folder / "step.hlo").write_text(trace(config, runtime))
    (folder / "step.json").write_text(json.dumps(facts(config, runtime)))


if __name__ == "__main__":
    main()
