"""Test the code of GPUs on a simulated one; `test_fake_cuda.py` runs this file and preloads ``no_gpu.c``.

Tensors of the networks are fake: they have a device, a shape and a dtype, and no values. PyTorch raises where
tensors of two devices meet; `Watch` records what would make the host wait for the GPU. Tensors that are only copied are
real, in the host's memory.
"""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import PatternSource, image_encoding
from diffusers import AutoencoderKL, VQModel
from test_training import FACTS, batch_of, everything, new_state, step_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.batch import Batch
from core.precision import exact_float32
from data.conditions import ClassLabels
from data.encodings import EncodeImages
from data.images import CenterCrop, ExactSize, Preparation, to_uint8
from data.manifest import LatentSpec
from data.pipeline import encoded_batches
from data.plan import Plan
from diffusion.guidance import Autoguidance, ClassifierFreeGuidance, Unguided
from diffusion.likelihood import bits_per_dimension
from diffusion.process import GaussianDiffusion
from diffusion.samplers import DDIM, DDPM
from diffusion.schedules import LinearSchedule
from diffusion.variances import FixedLargeVariance, LearnedRangeVariance
from evaluation.features.inception_network import Inception2015
from evaluation.features.network import NetworkFeatures
from evaluation.generate import Generator
from evaluation.metrics.kernel import squared_mmd
from evaluation.metrics.manifolds import PrecisionRecall
from launch.command import machine
from launch.command.workers import worker_device
from model import blocks
from model.attention import QKNormSelfAttention
from model.autoencoder import IdentityAutoencoder
from model.autoencoder_kl import DiffusersAutoencoder
from model.autoencoder_latents import VQAutoencoder
from model.dit import DiT, DiTConfig
from model.network import checkpoint_units
from runtime.accelerate import AccelerateRuntime
from train import ema as averages_of
from train.checkpoint import load_checkpoint
from train.guards import SpikeGuard
from train.saving import CheckpointWriter
from train.state import TrainState
from train.step import make_step
from train.stores import FolderStore, list_checkpoints

aten = torch.ops.aten
CUDA, SECOND = torch.device("cuda:0"), torch.device("cuda:1")
BLOCKS = ["AdaLNZeroBlock", "AdaLNBlock", "CrossAttentionBlock", "InContextBlock"]


class Watch(TorchDispatchMode):
    """Records what the host waits for, and the dtypes of the results of GPU operations.

    A value that the host reads from the GPU is 1. ``pin_memory`` is simulated here, since fake tensors lack it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.dtypes: dict[torch.dtype, set[str]] = {}
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._pin_memory.default:
            self._pinned.append(args[0].clone())
            return self._pinned[-1]
        if func is aten.is_pinned.default:
            return any(args[0] is pinned for pinned in self._pinned)
        if func is aten._local_scalar_dense.default and args[0].device.type == "cuda":
            self.waits.append("a value is read")
            return (args[0].dtype.is_floating_point and 1.0) or 1
        result = func(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            self._note_copy(args[1] if func is aten.copy_.default else args[0], result, args, kwargs)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                self.dtypes.setdefault(tensor.dtype, set()).add(str(func))
        return result

    def _note_copy(self, source: Tensor, target: Tensor, args: Any, kwargs: Any) -> None:
        if source.device.type == target.device.type:
            return
        from_pinned = source.device.type == "cpu" and any(source is pinned for pinned in self._pinned)
        if not (from_pinned and kwargs.get("non_blocking", False)):
            self.waits.append(f"{source.device.type} to {target.device.type}, {tuple(source.shape)}")


@contextmanager
def fake_gpu() -> Iterator[Watch]:
    """Yield the watch of a fake GPU. Networks are built of real tensors and become fake where moved or used."""
    with FakeTensorMode(allow_non_fake_inputs=True), Watch() as watch:
        yield watch


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    monkeypatch.setattr(torch._subclasses.fake_tensor, "CONSTANT_NUMEL_LIMIT", 0)  # nor does a scalar have a value
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # a real parameter cannot become a fake one
    with fake_gpu() as found:
        yield found


def dit(block: str = "AdaLNZeroBlock", depth: int = 1, **changes: Any) -> DiT:
    attention = QKNormSelfAttention if block == "InContextBlock" else blocks.SelfAttention
    made = partial(getattr(blocks, block), attention=attention)
    with unset_fake_temporarily():
        return DiT(DiTConfig(8, 4, 2, width=64, depth=depth, num_heads=4, num_classes=10, block=made, **changes))


def diffusion() -> GaussianDiffusion:
    with unset_fake_temporarily():
        return GaussianDiffusion(LinearSchedule(), LearnedRangeVariance())


def host_batch(rows: int = 8) -> Batch:
    size = (rows, 4, 8, 8)
    return Batch(
        x_0=torch.ones(size),
        noise=torch.ones(size),
        t=torch.ones(rows, dtype=torch.int64),
        condition={"label": torch.ones(rows, dtype=torch.int64)},
    )


def test_there_is_a_gpu_to_believe_in() -> None:
    assert torch.cuda.get_device_name() == "no GPU"
    assert AccelerateRuntime("bf16").device.type == "cuda"
    with pytest.raises(torch.AcceleratorError, match="operation not supported"):
        torch.zeros(3, device="cuda") + 1  # no kernel runs


def test_blocks_are_compiled_on_a_gpu_and_without_a_c_compiler_a_line_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiles() -> bool:
        model = dit("AdaLNZeroBlock")
        AccelerateRuntime("bf16").prepare(model, [], torch.optim.AdamW(model.parameters()))
        return model.units()[0]._compiled_call_impl is not None

    monkeypatch.setenv("CC", "/bin/sh")
    monkeypatch.setattr("runtime.kernels.importlib.util.find_spec", lambda name: name)
    assert compiles()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    assert not compiles()
    shown = capsys.readouterr().err
    assert shown == (
        "note: blocks are not compiled, and steps are slower: there is no C compiler (there-is-no-such-compiler).\n"
    )
    monkeypatch.setattr("runtime.kernels.importlib.util.find_spec", lambda name: None)
    assert not compiles()
    assert "there is no package triton" in capsys.readouterr().err


AVERAGES = {
    "constant": averages_of.constant,
    "warmed_up": averages_of.warmed_up,
    "several": partial(averages_of.several, decays=[0.9, 0.99]),
    "power": partial(averages_of.power, relative_stds=[0.05, 0.1]),
}


class Training:
    """A step on the fake GPU, in bf16, with clipping, a guard and two micro-batches."""

    def __init__(
        self, block: str, recomputes: bool, average: str = "constant", mode: Any = "replicated", depth: int = 1
    ) -> None:
        self.runtime = AccelerateRuntime("bf16", micro_batches=2, mode=mode, compile=False, cuda_graph=False)
        self.model = dit(block, depth)
        with unset_fake_temporarily():
            self.averages = AVERAGES[average](self.model)
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.1, foreach=True)
        if recomputes:
            checkpoint_units(self.model, self.runtime.checkpoint)
        process = self.runtime.place(diffusion())
        stepping, self.optimizer = self.runtime.prepare(self.model, [*self.averages.modules.values()], optimizer)
        guard = SpikeGuard(2.0, self.optimizer, self.runtime)
        self.step = self.runtime.step(
            make_step(stepping, self.optimizer, self.averages, process, self.runtime, 1.0, guard)
        )

    def parameters(self) -> list[Tensor]:
        """Return weights, averages and moments."""
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        averages = [value for module in self.averages.modules.values() for value in module.parameters()]
        return [*self.model.parameters(), *averages, *moments]


@pytest.mark.parametrize("recomputes", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_training_step_stays_on_the_gpu_and_makes_the_host_wait_for_nothing(
    watch: Watch, block: str, recomputes: bool
) -> None:
    training = Training(block, recomputes)
    for number, micro_batches in enumerate(training.runtime.feed([host_batch(), host_batch()])):
        if number == 1:  # the first step makes the optimizer's state
            watch.waits.clear()
            watch.dtypes.clear()
        metrics = training.step(micro_batches)
    assert watch.waits == []
    assert torch.float64 not in watch.dtypes
    assert "aten.addmm.default" in watch.dtypes[torch.bfloat16]  # autocast is of the network
    assert {(value.device, value.dtype, value.dim()) for value in metrics.values()} == {(CUDA, torch.float32, 0)}
    assert {(value.device, value.dtype) for value in training.parameters()} == {(CUDA, torch.float32)}


@pytest.mark.parametrize("average", AVERAGES)
def test_an_average_of_any_kind_stays_on_the_gpu(watch: Watch, average: str) -> None:
    training = Training("AdaLNZeroBlock", False, average)
    (micro_batches,) = training.runtime.feed([host_batch()])
    watch.waits.clear()
    training.step(micro_batches)
    assert watch.waits == []
    assert {(value.device, value.dtype) for value in training.parameters()} == {(CUDA, torch.float32)}


def test_feeding_does_not_wait_and_fetching_does(watch: Watch) -> None:
    training = Training("AdaLNZeroBlock", False)
    watch.waits.clear()
    (micro_batches,) = training.runtime.feed([host_batch()])
    assert watch.waits == []
    metrics = training.step(micro_batches)
    assert watch.waits == []
    training.runtime.fetch([metrics, metrics])
    assert set(watch.waits) == {"a value is read"}


SAMPLERS = {
    "ddpm": DDPM,
    "ddim": DDIM,
    "ddim with noise": partial(DDIM, eta=1.0),
    "sections": lambda steps: DDPM(f"{steps // 2},{steps - steps // 2}"),
}
GUIDANCE = {
    "unguided": Unguided,
    "classifier-free": partial(ClassifierFreeGuidance, scale=4.0, t_min=100, t_max=900, channels=3),
    "autoguidance": partial(Autoguidance, scale=2.0),
}


def waits_of_sampling(watch: Watch, sampler: str, guidance: str, steps: int) -> list[str]:
    runtime = AccelerateRuntime("bf16")
    model, process = runtime.place(dit().eval().requires_grad_(False)), runtime.place(diffusion())
    more = {"guide": model} if guidance == "autoguidance" else {}
    denoiser = GUIDANCE[guidance](model, null=ClassLabels(10).null, latent_channels=4, **more)
    spec = LatentSpec("fake", 8, "identity", "1", 1.0, 1, 4, "float16", False, 10)
    chosen = SAMPLERS[sampler](steps)
    generator = Generator(denoiser, process, IdentityAutoencoder(4), chosen, spec, ClassLabels(10), 0, runtime)
    watch.waits.clear()
    watch.dtypes.clear()
    with torch.no_grad():
        latent = generator._latents(np.arange(6), ClassLabels(10).in_turn(6))
    assert (latent.device, latent.dtype, latent.shape) == (CUDA, torch.float32, (6, 4, 8, 8))
    assert torch.float64 not in watch.dtypes
    assert "aten.addmm.default" in watch.dtypes[torch.bfloat16]
    assert {part.shape for part in runtime.parts(latent, 4)} == {(4, 4, 8, 8), (2, 4, 8, 8)}
    return list(watch.waits)


@pytest.mark.parametrize("guidance", GUIDANCE)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_step_makes_the_host_wait_for_nothing(watch: Watch, sampler: str, guidance: str) -> None:
    few, many = (waits_of_sampling(watch, sampler, guidance, steps) for steps in (3, 5))
    assert len(few) == len(many)
    assert all(wait.startswith("cpu to cuda") for wait in few)  # the tables of the respaced process


def test_bits_per_dimension_read_nothing(watch: Watch) -> None:
    runtime = AccelerateRuntime("bf16")
    model = runtime.place(dit().eval().requires_grad_(False))
    with unset_fake_temporarily():
        process = GaussianDiffusion(LinearSchedule(num_steps=4), LearnedRangeVariance())
    process = runtime.place(process)
    x_0, condition = runtime.put(torch.ones(3, 4, 8, 8)), {"label": runtime.put(torch.ones(3, dtype=torch.int64))}
    watch.waits.clear()
    with torch.no_grad(), runtime.autocast():
        bits = bits_per_dimension(model, process, x_0, condition, lambda _: runtime.put(torch.ones(3, 4, 8, 8)))
    assert (bits.device, bits.dtype, bits.shape) == (CUDA, torch.float32, (3,))
    assert watch.waits == []


def test_a_fixed_variance_stays_on_the_gpu(watch: Watch) -> None:
    with unset_fake_temporarily():
        process = GaussianDiffusion(LinearSchedule(), FixedLargeVariance())
    process, model = process.to(CUDA), dit(outputs_per_channel=1).to(CUDA)
    x, condition = torch.ones(2, 4, 8, 8).to(CUDA), {"label": torch.ones(2, dtype=torch.int64).to(CUDA)}
    assert DDPM(3)(model, process, lambda _: x, condition).device == CUDA


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_autoencoder_encodes_and_decodes_on_the_gpu(tmp_path: Path, watch: Watch, precision: Any) -> None:
    with unset_fake_temporarily():
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).save_pretrained(tmp_path)
        autoencoder = DiffusersAutoencoder("small", str(tmp_path), [1.0, 2.0, 3.0, 4.0], 0.5, precision)
    encoding = EncodeImages(autoencoder, Preparation(8, CenterCrop()), flip=True, device=CUDA)
    watch.waits.clear()
    watch.dtypes.clear()
    moments = encoding.moments(np.zeros((2, 8, 8, 3), np.uint8))
    assert (moments.device, moments.dtype, moments.shape) == (CUDA, torch.float32, (2, 2, 8, 8, 8))
    assert watch.waits == []
    latent = autoencoder.draw(moments[:, 0], torch.ones(2, 4, 8, 8).to(CUDA))
    image = autoencoder.decode(latent)
    watch.waits.clear()
    with pytest.raises(RuntimeError, match="numpy"):  # a fake tensor has nothing to give
        to_uint8(image)
    assert watch.waits == ["cuda to cpu, (2, 8, 8, 3)"]
    assert torch.uint8 in watch.dtypes  # computed before it was sent
    assert (image.device, image.dtype, image.shape) == (CUDA, torch.float32, (2, 3, 8, 8))
    assert ("aten.convolution.default" in watch.dtypes.get(torch.bfloat16, set())) == (precision == "bf16")
    assert torch.float64 not in watch.dtypes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_are_quantized_on_the_gpu_in_float32_without_waiting(
    tmp_path: Path, watch: Watch, precision: Any
) -> None:
    with unset_fake_temporarily():
        VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16).save_pretrained(tmp_path)
        autoencoder = VQAutoencoder("small", str(tmp_path), 0.5, precision=precision)
    autoencoder.to(CUDA)
    watch.waits.clear()
    watch.dtypes.clear()
    image = autoencoder.decode(torch.ones(2, 3, 8, 8).to(CUDA))
    assert (image.device, image.dtype, image.shape) == (CUDA, torch.float32, (2, 3, 8, 8))
    assert [wait for wait in watch.waits if not wait.startswith("cpu to cuda")] == []  # the input, scale and shift
    assert "aten.argmin.default" in watch.dtypes[torch.int64]
    assert "aten.mm.default" in watch.dtypes[torch.float32]


def test_inception_is_float32_on_the_gpu_though_autocast_is_on_outside(watch: Watch) -> None:
    with unset_fake_temporarily():
        network = Inception2015().eval().requires_grad_(False)
    network = network.to(CUDA)
    images = torch.zeros(2, 3, 64, 64, dtype=torch.uint8).to(CUDA)
    watch.dtypes.clear()
    with torch.autocast("cuda", torch.bfloat16), exact_float32(CUDA):
        output = network(images)
    assert [(part.device, part.dtype, part.shape[1]) for part in output] == [
        (CUDA, torch.float32, size) for size in (2048, 2023, 1008)
    ]
    assert set(watch.dtypes) == {torch.uint8, torch.float32, torch.int64}


def test_images_are_prepared_for_any_network_on_the_gpu(watch: Watch) -> None:
    with unset_fake_temporarily():
        features = NetworkFeatures(torch.nn.Flatten(), "x", "0", 14, [0.1, 0.2, 0.3], [1.0, 2.0, 3.0], 2, "here")
    features.to(CUDA)
    prepared = features._prepared(np.zeros((2, 8, 8, 1), np.uint8))
    assert (prepared.device, prepared.dtype, prepared.shape) == (CUDA, torch.float32, (2, 3, 14, 14))


def test_kernel_distances_and_manifolds_are_computed_on_the_gpu(watch: Watch) -> None:
    rows = torch.ones(30, 16).to(CUDA)
    distance = squared_mmd(rows.double(), rows.double())
    assert (distance.device, distance.dtype) == (CUDA, torch.float64)
    watch.dtypes.clear()
    watch.waits.clear()
    metric = PrecisionRecall(block=16)
    radii = metric._squared_radii(rows)
    assert (radii.device, radii.dtype, radii.shape) == (CUDA, torch.float32, (30,))
    assert watch.waits == []
    metric._fractions_inside(rows, rows)
    assert watch.waits == ["a value is read"] * 2  # precision and recall, whatever the number of blocks
    assert watch.dtypes[torch.float64] == {"aten._to_copy.default", "aten.mean.default"}  # of what was found inside


def test_batches_arrive_whole_however_late_they_are_copied() -> None:
    runtime = AccelerateRuntime("bf16")
    host = (batch_of(step) for step in range(50))  # each is dropped when it was fed, long before it is copied
    fed = [batch for (batch,) in runtime.feed(host)]
    torch.cuda.synchronize()
    for step, batch in enumerate(fed):
        for found, value in zip(tree_leaves(batch), tree_leaves(batch_of(step)), strict=True):
            assert found.device.type == "cuda"
            assert torch.equal(found.cpu(), value), step


def on_gpu(runtime: AccelerateRuntime, seed: int) -> tuple[TrainState, dict[str, Tensor]]:
    """Return a prepared state after a step on the host, and the values that it holds."""
    state = new_state()
    step_of(state)([batch_of(seed)])
    state.advance()
    expected = {name: value.clone() for name, value in everything(state).items()}
    _, state.optimizer = runtime.prepare(state.model, [state.ema.module], state.optimizer)
    return state, expected


def test_a_checkpoint_is_of_the_step_it_was_taken_at_though_training_goes_on(tmp_path: Path) -> None:
    runtime = AccelerateRuntime("fp32")
    writer = CheckpointWriter(FolderStore(tmp_path), runtime)
    taken = []
    for number in (1, 2):  # the second is copied over the first
        state, expected = on_gpu(runtime, number)
        assert {value.device.type for value in everything(state).values()} == {"cuda"}
        state.step = number
        weights = [*state.model.parameters(), *state.ema.module.parameters()]
        later = [torch.full(value.shape, 7.0).to(CUDA) for value in weights]
        writer.save(state, FACTS)
        for value, new in zip(weights, later, strict=True):
            value.data.copy_(new)  # the next step, within the GPU: nothing of it is waited for
        writer.wait()
        taken.append(expected)
    for path, expected in zip(list_checkpoints(tmp_path), taken, strict=True):
        restored = new_state()
        load_checkpoint(path, restored)
        for name, value in everything(restored).items():
            assert torch.equal(value, expected[name]), (path.name, name)


class SentToGpu:
    """An encoding that sends moments from the host to the GPU, for which no kernel has to run."""

    teacher = None

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._encoding = image_encoding(IdentityAutoencoder(1), 8, flip=True, crop=ExactSize())
        self.spec, self.prepare = self._encoding.spec, self._encoding.prepare

    def moments(self, items: Any) -> Tensor:
        return self._encoding.moments(items).pin_memory().to(self._device, non_blocking=True)


@pytest.mark.parametrize("device", [CUDA, SECOND], ids=str)
def test_encoded_batches_are_waited_for_before_they_are_read(device: torch.device) -> None:
    source, on_host = PatternSource(), image_encoding(IdentityAutoencoder(1), 8, flip=True, crop=ExactSize())
    plan = Plan.of(source, on_host.spec("pattern", 5), 16, seed=0)
    batches = [
        [batch.moments for batch in encoded_batches(source, encoding, plan, range(plan.num_shards), 7, threads=1)]
        for encoding in (on_host, SentToGpu(device))
    ]
    assert len(batches[0]) == 10
    for expected, found in zip(*batches, strict=True):
        assert np.array_equal(expected, found)


@pytest.fixture
def _first_gpu_again() -> Iterator[None]:
    yield
    torch.cuda.set_device(0)


@pytest.mark.usefixtures("_first_gpu_again")
def test_a_launched_encoder_works_on_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert worker_device("auto") == worker_device("cuda") == SECOND
    assert torch.cuda.current_device() == 1
    assert torch.ones(3).pin_memory().to(SECOND, non_blocking=True).device == SECOND
    assert worker_device("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="Process 2 of this host has no GPU: PyTorch sees 2"):
        worker_device("auto")


@pytest.mark.usefixtures("_first_gpu_again")
def test_workers_of_a_sweep_train_on_gpus_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_held", [])
    _, other = machine.lease(2, tmp_path / f".gpus-{platform.node()}")  # the worker before
    machine.take_gpu({"runtime": {"device": "auto"}}, tmp_path)
    state, expected = on_gpu(AccelerateRuntime("fp32", compile=False), 1)
    for name, value in everything(state).items():
        assert value.device == SECOND
        assert torch.equal(value.cpu(), expected[name])
    other.release()
