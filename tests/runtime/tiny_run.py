"""Train tiny DiTs under the requested runtimes and record the results, in a subprocess of the tests.

``python tiny_run.py OUT CASES`` with a JSON list of cases; all of one process share its devices. Each case
leaves ``OUT/NAME.safetensors`` (the final state) and ``OUT/NAME.json`` (losses and the runtime's counters).
"""

import functools
import json
import math
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch._dynamo.utils
import torch._inductor.config
import yaml
from deep_network import DeepConfig, DeepNetwork
from safetensors.torch import save_file
from small_text_encoders import LENGTH
from torch import Tensor
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from core.batch import FEATURES, WEIGHT, Batch
from data.text_conditions import TOKEN_IDS, TextCondition
from data.text_encoders import CLIPText, T5Text, TextEncoder
from diffusion.edm import EDM
from diffusion.flow import Flow
from diffusion.objective import Objective, corrupt
from diffusion.paths import GVPPath
from diffusion.process import GaussianDiffusion
from diffusion.schedules import LinearSchedule
from diffusion.variances import LearnedRangeVariance
from model import blocks
from model.attention import QKNormSelfAttention, RotaryQKRmsNormSelfAttention, SelfAttention
from model.dit import DiT, DiTConfig
from model.mlp import SwiGluMlp
from model.network import Network, checkpoint_units
from model.norms import rms_norm
from model.text_embedding import MASK, POOLED, TOKENS, TextEmbedding
from train import ema as averages_of
from train.alignment import REPA
from train.guards import SpikeGuard
from train.state import optimizer_tensors
from train.step import TOTAL, as_it_is, make_step

# Code for vectors takes the C++ compiler a quarter longer, and finding out which the CPU has, 11 s of interpreters.
torch._inductor.config.cpp.vec_isa_ok = False
CONF = Path(__file__).resolve().parents[2] / "conf/runtime"
NUM_CLASSES, DECAY = 10, 0.9999
FEATURE_DIM = 24
TEXT_LENGTH = 6  # tokens of a caption
TEXT_SIZES = {
    "embedded": {"length": TEXT_LENGTH, "dim": 24, "pooled_dim": 16},
    "clip": {"length": LENGTH, "dim": 16, "pooled_dim": 16},
    "t5": {"length": TEXT_LENGTH, "dim": 16, "pooled_dim": 16},
}
CAPTIONS = ("a drawing of a three", "digit seven", "three", "the number", "", "a drawing of the number seven of three")
REPA_OF_CASES = REPA(block=1, hidden=32, dim=FEATURE_DIM)
NORMS = ("grad_norm", "param_norm", "update_norm")


@dataclass
class Case:
    """A network, a recipe and a runtime."""

    name: str
    runtime: str  # plain, or a file of conf/runtime
    block: str = "AdaLNZeroBlock"  # of a DiT; Deep, ADM, LDM, SD: other networks
    objective: str = "gaussian"  # or flow, edm
    depth: int = 1  # of a DiT
    qk_norm: bool = False
    # The condition is not labels but captions of different lengths: "embedded", or the token ids of a "clip" or "t5",
    # which encodes them in the step; its folder lies in the working directory.
    text: str = ""
    modern: bool = False  # RMSNorm, SwiGLU, rotary positions and a learned table
    settings: dict[str, Any] = field(default_factory=dict)  # of the runtime
    precision: str = "fp32"
    activation_checkpointing: bool = False
    max_grad_norm: float | None = None
    batch_size: int = 16
    steps: int = 20
    learning_rates: list[float] | None = None  # of each step
    average: str = "constant"
    skip_over: list[float] | None = None  # gradient norm, of each step
    aligned_steps: int | None = None  # steps in which REPA's loss counts; None: there is none
    wrapped: bool = False  # in DistributedDataParallel, also where there is one process
    backend: str = "inductor"  # of the compiler, where blocks or networks are compiled
    counts_exchanged: bool = False  # elements of the gradients that processes exchange, under DistributedDataParallel

    def model(self) -> Network:
        """Return a model with small random weights everywhere, since parts of a fresh DiT are zero."""
        if self.block == "Deep":
            return DeepNetwork(DeepConfig())
        if self.block == "ADM":
            return perturbed(adm())
        if self.block == "LDM":
            return perturbed(ldm())
        if self.block == "SD":
            return perturbed(sd_unet())
        attention = QKNormSelfAttention if self.qk_norm else SelfAttention
        block = functools.partial(getattr(blocks, self.block), attention=attention)
        if self.modern:
            parts = {"attention": RotaryQKRmsNormSelfAttention, "norm": rms_norm, "mlp": SwiGluMlp}
            block = functools.partial(getattr(blocks, self.block), **parts)
        shape = {"width": 64, "depth": self.depth, "num_heads": 4, "num_classes": 0 if self.text else NUM_CLASSES}
        embedding = functools.partial(TextEmbedding, **TEXT_SIZES[self.text]) if self.text else None
        outputs = diffusion(self.objective).outputs_per_channel
        table = "learned" if self.modern else "fixed"
        more = {"block": block, "outputs_per_channel": outputs, "position_table": table, "embedding": embedding}
        return perturbed(DiT(DiTConfig(8, 4, 2, **shape, **more)))  # type: ignore[arg-type]

    def with_head(self, model: Network) -> Network:
        """Return the model with REPA's projector after its first block, where the case has one."""
        if self.aligned_steps is not None:
            REPA_OF_CASES.attach(model, seed=0)
        return model

    def optimizer(self, model: Network) -> torch.optim.Optimizer:
        """Return AdamW with weight decay, and an eps above the rounding of gradients that are zero."""
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, eps=1e-6)

    def averages(self, model: Network) -> averages_of.Averages:
        """Return the averages of the weights."""
        if self.average == "constant":
            return averages_of.constant(model, DECAY)
        return averages_of.power(model, [0.1])

    def batches(self, rank: int, world: int) -> Iterator[Batch]:
        """Yield a process's rows of each batch."""
        mine = slice(self.batch_size * rank // world, self.batch_size * (rank + 1) // world)
        for step in range(self.steps):
            generator = torch.Generator().manual_seed(step)
            size = (self.batch_size, 4, 8, 8)
            x_0 = torch.randn(size, generator=generator)
            condition = self._condition(generator)
            t = TIMES[self.objective](generator, size[:1])
            yield Batch(
                x_0=x_0[mine],
                noise=torch.randn(size, generator=generator)[mine],
                t=t[mine],
                condition={name: value[mine] for name, value in condition.items()},
                targets={name: value[mine] for name, value in self._targets(generator, step).items()},
            )

    def _condition(self, generator: torch.Generator) -> dict[str, Tensor]:
        size = (self.batch_size,)
        if not self.text:
            return {"label": torch.randint(0, NUM_CLASSES + 1, size, generator=generator)}
        if self.text != "embedded":
            chosen = torch.randint(0, len(CAPTIONS), size, generator=generator)
            found = tokenizing(self.text).tokenize([CAPTIONS[number] for number in chosen])
            return {TOKEN_IDS: torch.from_numpy(found.ids), MASK: torch.from_numpy(found.mask)}
        lengths = torch.randint(1, TEXT_LENGTH + 1, (*size, 1), generator=generator)
        return {
            "text": torch.randn(*size, TEXT_LENGTH, 24, generator=generator).half(),
            "text_mask": torch.arange(TEXT_LENGTH) < lengths,
            "text_pooled": torch.randn(*size, 16, generator=generator).half(),
        }

    def _targets(self, generator: torch.Generator, step: int) -> dict[str, Tensor]:
        if self.aligned_steps is None:
            return {}
        features = torch.randn(self.batch_size, 16, FEATURE_DIM, generator=generator).half()
        return {FEATURES: features, WEIGHT: torch.full((self.batch_size,), float(step < self.aligned_steps))}


def text_encoder(kind: str) -> TextEncoder:
    """Return a small text encoder, whose network is not shared with others."""
    folder = str(Path.cwd() / kind)
    return CLIPText(folder) if kind == "clip" else T5Text(folder, length=TEXT_LENGTH)


tokenizing = functools.cache(text_encoder)


def encoded(kind: str, condition: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the embeddings of captions by transformers itself, rounded to float16."""
    if TOKEN_IDS not in condition:
        return condition
    from transformers import CLIPTextModel, T5EncoderModel

    ids, mask = condition[TOKEN_IDS].long(), condition[MASK]
    with torch.no_grad():
        if kind == "clip":
            found = CLIPTextModel.from_pretrained(kind)(input_ids=ids)
            tokens, pooled = found.last_hidden_state, found.pooler_output
        else:
            encoder = T5EncoderModel.from_pretrained(kind)
            tokens = encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            pooled = torch.stack([row[kept].mean(dim=0) for row, kept in zip(tokens, mask, strict=True)])
    return {TOKENS: tokens.half(), MASK: mask, POOLED: pooled.half()}


def perturbed(model: Network) -> Network:
    """Return the model with small random numbers added to its weights."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def adm() -> Network:
    """Return an ADM of two levels, with attention in the middle only."""
    from model.adm import ADM, ADMConfig  # imported late: diffusers takes seconds

    return ADM(ADMConfig(8, 4, NUM_CLASSES, 16, (1, 2), 1, (), num_heads=2, num_groups=4))


def ldm() -> Network:
    """Return an LDM of two levels, with transformers in the middle only."""
    from model.ldm import LDM, LDMConfig  # imported late: diffusers takes seconds

    return LDM(LDMConfig(8, 4, NUM_CLASSES, 16, (1, 2), 1, (), num_heads=2, num_groups=4, context_dim=8))


def sd_unet() -> Network:
    """Return Stable Diffusion's U-Net of two levels, with transformers in the middle only."""
    from model.sd_unet import SDUNet, SDUNetConfig  # imported late: diffusers takes seconds

    return SDUNet(SDUNetConfig(8, 4, 0, 16, (1, 2), 1, (), num_heads=2, num_groups=4, context_dim=24))


TIMES: dict[str, Callable[[torch.Generator, tuple[int]], Tensor]] = {
    "gaussian": lambda generator, size: torch.randint(0, 1000, size, generator=generator),
    "flow": lambda generator, size: torch.rand(size, generator=generator),
    "edm": lambda generator, size: torch.exp(1.2 * torch.randn(size, generator=generator) - 1.2),
}


def diffusion(name: str = "gaussian") -> Objective:
    if name == "flow":  # as SiT has it, so that a network with two outputs per channel fits
        return Flow(GVPPath(), direction_weight=1.0, reversed_time=True, outputs_per_channel=2)
    return EDM(1.0) if name == "edm" else GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


def plain(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train by the recipe in twenty lines of eager PyTorch, without our runtime, step or EMA."""
    model, process = case.model(), diffusion(case.objective)
    averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = case.optimizer(case.with_head(model))
    gamma = averages_of.gamma_of(0.1)
    losses, skipped = [], []
    norms: dict[str, list[float]] = {name: [] for name in NORMS}
    for number, batch in enumerate(case.batches(0, 1)):
        for group in optimizer.param_groups:
            group["lr"] = case.learning_rates[number] if case.learning_rates else group["lr"]
        x_t = corrupt(process, batch)
        output = model(*process.inputs(x_t, batch.t), encoded(case.text, batch.condition))
        output, projected = (output, None) if case.aligned_steps is None else output
        loss = process.losses(output, batch, x_t)["loss"].mean()
        if projected is not None:
            cosine = torch.nn.functional.cosine_similarity(projected, batch.targets[FEATURES].float(), dim=-1)
            loss = loss - 0.5 * (batch.targets[WEIGHT] * cosine.mean(dim=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), case.max_grad_norm or float("inf")).item()
        skipped.append(float(case.skip_over is not None and grad_norm > case.skip_over[number]))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        if not skipped[-1]:
            optimizer.step()
        updates = [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]
        for name, value in zip(NORMS, (grad_norm, norm(model.parameters()), norm(updates)), strict=True):
            norms[name].append(value)
        for name in averages:
            kept = DECAY if case.average == "constant" else (1 - 1 / (number + 1)) ** (gamma + 1)
            averages[name] = kept * averages[name] + (1 - kept) * model.get_parameter(name).detach()
        losses.append(loss.item())
    weights = {f"model/{name}": value.detach() for name, value in model.named_parameters()}
    moments = {f"optimizer/{name}": value for name, value in optimizer_tensors(model, optimizer).items()}
    return {**weights, **{f"ema/{name}": value for name, value in averages.items()}, **moments}, {
        "losses": losses,
        "norms": norms,
        "skipped": skipped,
    }


def norm(tensors: Iterable[Tensor]) -> float:
    """Return the norm of all tensors together, in float64."""
    return math.sqrt(math.fsum(tensor.detach().double().square().sum().item() for tensor in tensors))


def under_runtime(case: Case) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train the same run through the project's runtime, step and EMA."""
    runtime = make_runtime(case)
    runtime.require_batch(case.batch_size)
    counters = Counters(case.runtime)
    model = case.model()
    ema, optimizer = case.averages(model), case.optimizer(case.with_head(model))
    if case.activation_checkpointing:
        checkpoint_units(model, runtime.checkpoint)
    process = runtime.place(diffusion(case.objective))
    world = runtime.data_world
    runtime.data_world = 2 if case.wrapped else world
    compiled_by = functools.partialmethod(torch.nn.Module.compile, backend=case.backend)
    with mock.patch.object(torch.nn.Module, "compile", compiled_by):
        stepping, optimizer = runtime.prepare(model, list(ema.modules.values()), optimizer)
    runtime.data_world = world
    exchanged: list[int] = []
    if case.counts_exchanged:
        stepping.register_comm_hook(exchanged, counted_exchange)
    guard = None
    if case.skip_over is not None:
        guard = SpikeGuard(2.0, optimizer, runtime)
    repa = None if case.aligned_steps is None else REPA_OF_CASES
    embedded = as_it_is
    if case.text in ("clip", "t5"):
        conditions = TextCondition()
        conditions.prepare(runtime.place, functools.partial(text_encoder, case.text))
        embedded = conditions.embedded
    of_step = (stepping, optimizer, ema, process, runtime, case.max_grad_norm, guard, repa, embedded)
    step = runtime.step(make_step(*of_step))
    history, guard_at = [], None
    for number, micro_batches in enumerate(runtime.feed(case.batches(runtime.data_rank, runtime.data_world))):
        for group in optimizer.param_groups:
            group["lr"] = case.learning_rates[number] if case.learning_rates else group["lr"]
        if guard is not None and case.skip_over is not None and case.skip_over[number] != guard_at:
            guard_at = case.skip_over[number]
            guard._set(guard_at)  # as at a log step
        history.append(step(micro_batches))
    facts = {"of_training": counters.read()}
    fetched = runtime.fetch(history)
    facts["losses"] = fetched["loss"]
    facts["norms"] = {name: fetched[name] for name in NORMS}
    facts["skipped"] = fetched.get(f"skipped_steps{TOTAL}", [0.0] * case.steps)
    facts["exchanged"] = sum(exchanged)
    parts = {"model": model.state_dict(), "ema": ema.module.state_dict()}
    parts["optimizer"] = optimizer_tensors(model, optimizer)
    facts["shardings"] = {f"{part}/{name}": sharding(v) for part in parts for name, v in parts[part].items()}
    saved: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
    for part, tensors in parts.items():
        runtime.copy_to_host(tensors, tensors if runtime.is_main else (), saved[part])
    facts["of_everything"] = counters.read()
    return {f"{part}/{name}": value for part in saved for name, value in saved[part].items()}, facts


def counted_exchange(sizes: list[int], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Do what DistributedDataParallel does by default, and record the number of values."""
    sizes.append(bucket.buffer().numel())
    return allreduce_hook(None, bucket)


def make_runtime(case: Case) -> Any:
    """Return the runtime of ``conf/runtime``, on the CPU where that can be set. It is imported only here."""
    section = yaml.safe_load((CONF / f"{case.runtime}.yaml").read_text(encoding="utf-8"))
    settings = {key: value for key, value in section.items() if not key.startswith("_")}
    if "device" in settings:
        settings["device"] = "cpu"
    return pkgutil.resolve_name(section["_target_"])(case.precision, **{**settings, **case.settings})


class Counters:
    """Counts of a case: compilations and device reads by torch_xla's metrics, else compilations by torch.compile."""

    def __init__(self, runtime: str) -> None:
        self._of_xla = runtime == "xla"
        if self._of_xla:
            import torch_xla.debug.metrics as metrics

            metrics.clear_all()
        else:
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()

    def read(self) -> dict[str, int]:
        if not self._of_xla:
            counted = torch._dynamo.utils.counters
            return {"compilations": counted["stats"]["unique_graphs"], "graph_breaks": len(counted["graph_break"])}
        import torch_xla
        import torch_xla.debug.metrics as metrics

        torch_xla.sync(wait=True)
        timed = {name: (metrics.metric_data(name) or (0,))[0] for name in ("CompileTime", "TransferFromDeviceTime")}
        scalars = metrics.counter_value("aten::_local_scalar_dense") or 0
        return {"compilations": timed["CompileTime"], "reads": timed["TransferFromDeviceTime"] + scalars}


def sharding(value: Tensor) -> str:
    if value.device.type != "xla":
        return type(value).__name__
    import torch_xla

    return str(torch_xla._XLAC._get_xla_sharding_spec(value))


def main() -> None:
    out = Path(sys.argv[1])
    for fields in json.loads(sys.argv[2]):
        case = Case(**fields)
        state, facts = plain(case) if case.runtime == "plain" else under_runtime(case)
        if state:  # on the main process
            save_file(state, out / f"{case.name}.safetensors")
            (out / f"{case.name}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
