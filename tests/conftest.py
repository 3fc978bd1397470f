"""Define what tests share: small shards, small configs, and the command as a user types it."""

import atexit
import functools
import gc
import importlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import fast_hydra
import numpy as np
import pytest
import suite_times
import torch
from by_processes import pytest_xdist_make_scheduler  # noqa: F401
from warm_jobs import TRAINING, WarmJobs
from warm_python import WITH_XLA, run_warm_python

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # more are processes that import torch first
os.environ["USE_TORCH_XLA"] = "0"  # as launch/__init__.py does, before a test imports diffusers

if "PYTEST_XDIST_WORKER" in os.environ:  # a layer is run, which imports diffusers: it would import torch_xla
    gc.disable()  # until all is imported, which takes a quarter less time so
    importlib.import_module("diffusers.utils.import_utils")._torch_xla_available = False

from core.records import SEAL, seal
from data.encode import encode
from data.encodings import EncodeImages
from data.images import ExactSize, Preparation
from data.sources import DigitsSource, Example
from model.autoencoder import IdentityAutoencoder
from runtime.choice import require_torch_xla

fast_hydra.install()


def _has_torch_xla() -> bool:
    try:
        require_torch_xla()
    except ValueError:
        return False
    return True


GOLDEN = Path(__file__).parent / "golden"
FULL_ERROR = "HYDRA_FULL_ERROR"
needs_torch_xla = pytest.mark.skipif(
    not _has_torch_xla(), reason="needs torch 2.9.0 and torch_xla 2.9.0: the extra `pinned`, which make test installs"
)

# The demo's recipe on a network whose steps take milliseconds.
TINY_RUN = [
    "experiment=demo",
    "model.width=16",
    "model.depth=2",
    "model.num_heads=2",
    "batch_size=16",
    "total_steps=40",
    "log_every=5",
    "checkpoint_every=10",
    "sample_every=null",
    "evaluate_every=null",
    "train/logger=none",
    "optimizer.eps=1.0e-6",  # the default turns rounding of gradients that are zero into steps of their own
]


def torch_fidelity(part: str) -> Any:
    """Import a module of torch-fidelity, or skip the test that asks for it."""
    why = "needs torch-fidelity (and so torchvision, of torch's version): the extra `pinned`, which make test installs"
    return pytest.importorskip(f"torch_fidelity.{part}", reason=why)


def pytest_addoption(parser: pytest.Parser) -> None:
    suite_times.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    suite_times.register(config)


# Files that take longest, which workers of `pytest --dist loadfile` begin with, so that none ends long after the other.
LONGEST = (
    "one_run",
    "slurm",
    "sweep",
    "processes",
    "study",
    "compiled",
    "hostile_files",
    "signals",
    "secrets",
    "resume",
)
LONGEST += ("fake_cuda", "locks", "remote", "lease", "generation", "saving")
LONGEST += ("encode_processes", "xla_jobs", "remote_runs", "moves", "collectives", "lowering", "killed_evaluations")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort by file where files differ in time, and leave the rest in its order."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported: millions of objects, which it would visit again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()


@contextmanager
def process_left_as_it_was() -> Iterator[None]:
    """Restore what the command changes in its process: Hydra's handlers (their streams end here), and a variable."""
    handlers, level, variable = list(logging.root.handlers), logging.root.level, os.environ.get(FULL_ERROR)
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    if variable is None:
        os.environ.pop(FULL_ERROR, None)
    else:
        os.environ[FULL_ERROR] = variable


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Apply `process_left_as_it_was` to each test."""
    with process_left_as_it_was():
        yield


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def note(self, text: str) -> None:
        pass


@contextmanager
def silent_progress(label: str, done: int, total: int, unit: str) -> Iterator[_Silent]:
    yield _Silent()


class PatternSource:
    """Small labeled images of known content: image i is filled with a ramp that depends on i."""

    name = "pattern"
    block_sizes = None
    left_out = notes = ()

    def __init__(self, count: int = 50, size: int = 8, num_classes: int = 5, bad_label_at: int | None = None) -> None:
        self.class_names = [f"class {number}" for number in range(num_classes)]
        self.fingerprint = f"{count} {size} {num_classes} {bad_label_at}"
        self._count, self._size, self._bad = count, size, bad_label_at

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        ramp = np.arange(self._size**2).reshape(self._size, self._size, 1)
        image = ((ramp + 3 * index) % 256).astype(np.uint8)
        label = 99 if index == self._bad else index % len(self.class_names)
        return Example(f"pattern-{index}", image, label)


def encode_pattern(folder: Path, source: Any = None, **changes: Any) -> Any:
    """Encode 50 small images in both orientations to 4 shards; ``changes`` are settings of encoding or job."""
    of_encoding = {"autoencoder": IdentityAutoencoder(1), "image_size": 8, "flip": True, "crop": ExactSize()}
    of_encoding |= {key: changes.pop(key) for key in of_encoding.keys() & changes.keys()}
    settings = {"name": "pattern", "samples_per_shard": 16, "batch_size": 7, "seed": 0} | changes
    encoding = image_encoding(**of_encoding)
    return encode(source or PatternSource(), encoding, folder, progress=silent_progress, **settings)


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the shards of `encode_pattern` as a stranger gives them, without our sidecars. Tests change copies."""
    folder = tmp_path_factory.mktemp("sound")
    encode_pattern(folder)
    for path in folder.glob("shard-*.json"):
        path.unlink()
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """Return a copy of the sound shards, to be damaged."""
    return Path(shutil.copytree(sound, tmp_path / "shards"))


def image_encoding(autoencoder: Any, image_size: int, flip: bool, crop: Any) -> EncodeImages:
    return EncodeImages(autoencoder, Preparation(image_size, crop), flip, torch.device("cpu"))


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of encoded digits, which tests must not change."""
    folder = tmp_path_factory.mktemp("digits")
    encoding = image_encoding(IdentityAutoencoder(1), 8, flip=False, crop=ExactSize())
    settings = {"name": "digits", "samples_per_shard": 256, "batch_size": 64, "seed": 0}
    encode(DigitsSource(), encoding, folder, progress=silent_progress, **settings)
    return folder


@pytest.fixture
def rounding_allowed() -> Iterator[None]:
    """Allow TF32 and autocast, as they may be around an evaluation."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    products = torch.backends.cuda.matmul
    before = convolutions.fp32_precision, products.fp32_precision
    convolutions.fp32_precision = products.fp32_precision = "tf32"
    with torch.autocast("cpu", torch.bfloat16):
        yield
    assert (convolutions.fp32_precision, products.fp32_precision) == ("tf32", "tf32")  # as it was found
    convolutions.fp32_precision, products.fp32_precision = before


def command(*arguments: str) -> list[str]:
    """Return the command line of a subprocess that runs ``ditscale ...``, wherever it is installed."""
    return [sys.executable, "-m", "launch.cli", *arguments]


@functools.cache
def warm(*modules: str) -> WarmJobs:
    """Return the process that forks jobs: one for each worker of pytest and each choice of modules."""
    jobs = WarmJobs.importing(list(modules))
    atexit.register(jobs.close)
    return jobs


def ditscale(
    *arguments: str, cwd: Path, expect: int = 0, env: dict[str, str] | None = None, timeout_sec: float = 300
) -> str:
    """Run the command; returns what it printed."""
    if any("xla" in word for word in arguments):  # it reads variables at import, and depends on the order of imports
        words = ("-m", "launch.cli", *arguments)
        return run_warm_python(WITH_XLA, *words, cwd=cwd, expect=expect, env=env, limit_sec=timeout_sec)
    return run_warm(TRAINING, *arguments, cwd=cwd, expect=expect, env=env, timeout_sec=timeout_sec)


def run_warm(
    modules: list[str],
    *arguments: str,
    cwd: Path,
    expect: int = 0,
    env: dict[str, str] | None = None,
    timeout_sec: float = 300,
) -> str:
    """Run the command in a process that has imported ``modules``; returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        found = warm(*modules).start(list(arguments), cwd, output, env).wait(timeout_sec)
        assert found == expect, output.read_text()
        return output.read_text()


def torchrun(processes: int, *arguments: str, cwd: Path, expect: int = 0) -> str:
    """Run ``launch.train`` in several gloo processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return run_process([*launcher, "-m", "launch.train", *arguments], cwd, expect)


class InProcess:
    """Runs ``ditscale`` in the process of the tests, which saves the seconds that imports take."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capfd = monkeypatch, capfd

    def __call__(self, *arguments: str, expect: int = 0) -> str:
        """Run the command; returns what it printed."""
        code = _run_main(self._monkeypatch, arguments)
        shown = self._capfd.readouterr()
        assert code == expect, shown.out + shown.err
        return shown.out + shown.err


def _run_main(patch: pytest.MonkeyPatch, arguments: Sequence[str]) -> int:
    from launch import cli

    patch.setattr(sys, "argv", ["ditscale", *arguments])
    patch.setenv(FULL_ERROR, "0")
    code = 0
    try:
        cli.main()
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    patch.setenv(FULL_ERROR, "0")  # the command set it; later subprocesses would inherit it
    return code


def prepared_by(*arguments: str, cwd: Path, expect: int = 0) -> None:
    """Run the command in this process for a fixture that many tests share; what it prints is dropped."""
    with pytest.MonkeyPatch.context() as patch, process_left_as_it_was(), redirect_stderr(io.StringIO()) as shown:
        patch.chdir(cwd)
        with redirect_stdout(shown):
            code = _run_main(patch, arguments)
    assert code == expect, shown.getvalue()


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> InProcess:
    """Return a function that runs the command in ``tmp_path``."""
    monkeypatch.chdir(tmp_path)
    return InProcess(monkeypatch, capfd)


def run_process(words: list[str], cwd: Path, expect: int, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def resealed(path: Path, **changes: Any) -> None:
    """Change fields of a sealed record and update its hash, as an informed attacker would."""
    content = {key: value for key, value in json.loads(path.read_text()).items() if key != SEAL}
    path.write_text(json.dumps(seal({**content, **changes})))


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
