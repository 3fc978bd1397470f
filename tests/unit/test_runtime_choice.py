"""A machine gets the right runtime; unsuitable settings are refused before a library is imported."""

import os
import shutil
import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_torch_xla, run_process
from test_model import tiny

from core.rooms import MAY_IMPORT, ROOT, source_hash
from launch.builders.facts import facts_of_process
from runtime import choice
from runtime.accelerate import AccelerateRuntime
from runtime.agreement import Exchange, fingerprint, require_same
from runtime.kernels import compile_where_possible


def pci_device(folder: Path, name: str, vendor: str, device: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "vendor").write_text(f"{vendor}\n")
    (folder / name / "device").write_text(f"{device}\n")


def test_a_tpu_is_found_on_the_bus_and_a_network_card_of_its_vendor_is_none(tmp_path: Path) -> None:
    pci_device(tmp_path, "0000:00:04.0", "0x1ae0", "0x0042")
    assert not choice.has_tpu(tmp_path)
    pci_device(tmp_path, "0000:00:05.0", "0x1ae0", "0x0027")
    assert choice.has_tpu(tmp_path)
    assert not choice.has_tpu(tmp_path / "nowhere")


@pytest.mark.skipif(choice.has_tpu(), reason="there is a TPU")
def test_auto_without_a_tpu_is_accelerate_on_the_gpu_or_the_cpu() -> None:
    runtime = choice.auto("fp32")
    assert isinstance(runtime, AccelerateRuntime)
    assert runtime.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@needs_torch_xla
def test_accelerate_takes_no_xla_device_though_torch_xla_is_installed(tmp_path: Path) -> None:
    assert find_spec("torch_xla") is not None
    script = """
import sys
from runtime.accelerate import AccelerateRuntime
print(AccelerateRuntime("fp32").device.type, "torch_xla" in sys.modules)
"""
    # Not with the value that these tests set: alone, accelerate would prefer XLA.
    env = {"USE_TORCH_XLA": "1", "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT)}
    shown = run_process([sys.executable, "-c", script], tmp_path, expect=0, env=env)
    assert shown.split()[-2:] == ["cuda" if torch.cuda.is_available() else "cpu", "False"]


def test_state_is_not_spread_over_processes_that_nobody_launched() -> None:
    with pytest.raises(ValueError, match=r"mode is fsdp, but 0 processes were launched .* start with torchrun"):
        AccelerateRuntime("fp32", "cpu", mode="fsdp")


@needs_torch_xla
@pytest.mark.skipif(choice.has_tpu(), reason="there is a TPU")
def test_a_tpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="this machine has 0 TPUs"):
        choice.xla("fp32", "tpu")


@pytest.mark.parametrize("found", [None, "2.8.1", "2.9.0"])
@pytest.mark.parametrize("ours", ["2.15.0+cu130", "2.9.1", "2.9.0"])
def test_torch_without_a_torch_xla_of_its_version_is_answered_with_the_last_release_and_the_torch_it_needs(
    ours: str, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version_of(name: str) -> str:
        if found is None:
            raise PackageNotFoundError(name)
        return found

    monkeypatch.setattr(torch, "__version__", ours)
    monkeypatch.setattr(choice, "version", version_of)
    if ours == found:
        choice.require_torch_xla()
        return
    here = f"torch is {ours.split('+')[0]} and torch_xla is {found or 'not installed'}"
    with pytest.raises(ValueError, match=f"2.9.0 is torch_xla's last release, but here {here}; run: ") as refused:
        choice.require_torch_xla()
    assert str(refused.value).endswith("run: pip install torch==2.9.0 'torch_xla[tpu]==2.9.0'")


def test_a_torch_xla_that_is_released_later_is_taken_with_the_torch_of_its_version(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.16.0+cpu")
    monkeypatch.setattr(choice, "version", lambda name: "2.16.0")
    choice.require_torch_xla()


@needs_torch_xla
def test_variables_that_lower_the_weights_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    monkeypatch.setenv("XLA_USE_BF16", "1")
    with pytest.raises(ValueError, match="XLA_USE_BF16 is set"):
        choice.xla("fp32", "cpu")
    assert os.environ.get("PJRT_DEVICE") == before.get("PJRT_DEVICE")


def exchange_among(*others: dict[str, str]) -> Exchange:
    """Return an exchange that gives process 0 these facts of the others."""

    def exchange(mine: Any) -> list[Any]:
        return [mine, *(fingerprint(facts) if isinstance(mine, str) else facts for facts in others)]

    return exchange


def test_processes_that_differ_are_named_with_both_values() -> None:
    mine = {"seed": "0", "optimizer.lr": "0.1"}
    require_same(mine, exchange_among(dict(mine), dict(mine)))
    with pytest.raises(ValueError, match=r"optimizer.lr is 0.1 on process 0 and 0.2 on process 2; start all"):
        require_same(mine, exchange_among(dict(mine), {**mine, "optimizer.lr": "0.2"}))
    with pytest.raises(ValueError, match=r"extra is absent on process 0 and 1 on process 1"):
        require_same(mine, exchange_among({**mine, "extra": "1"}))


def test_the_facts_of_a_process_are_its_settings_and_its_code(tmp_path: Path) -> None:
    config = {"optimizer": {"lr": 0.1}, "seed": 0}
    facts = facts_of_process(config)
    assert (facts["optimizer.lr"], facts["seed"], facts["torch"]) == ("0.1", "0", torch.__version__)
    assert facts == facts_of_process(dict(config))
    for room in MAY_IMPORT:
        shutil.copytree(ROOT / room, tmp_path / room)
    assert source_hash(*MAY_IMPORT, root=tmp_path).startswith(facts["source code"])
    with (tmp_path / "model/dit.py").open("a") as file:
        file.write("# another version\n")
    assert not source_hash(*MAY_IMPORT, root=tmp_path).startswith(facts["source code"])


def test_networks_are_compiled_where_possible_and_the_averages_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(setting: Any) -> set[str]:
        model, average = tiny(), tiny()
        runtime = AccelerateRuntime("fp32", device="cpu", compile=setting)
        runtime.prepare(model, [average], torch.optim.AdamW(model.parameters()))
        parts = {"whole": [model, average], "units": [*model.units(), *average.units()]}
        found = {name: {part._compiled_call_impl is not None for part in those} for name, those in parts.items()}
        assert all(len(answers) == 1 for answers in found.values())
        return {name for name, answers in found.items() if answers == {True}}

    compiler = tmp_path / "c++"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert compiled("where_possible") == compiled("whole") == {"whole"}
    assert compiled(True) == {"units"}
    assert compiled("auto") == set()
    assert capsys.readouterr().err == ""
    sampled = [tiny(), tiny()]
    for network, device in zip(sampled, ("cpu", "xla"), strict=True):
        compile_where_possible(network, device, is_main=True)
    assert [network._compiled_call_impl is not None for network in sampled] == [True, False]
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert compiled("where_possible") == set()
    assert "note: blocks are not compiled, and steps are slower: there is no C++ compiler" in capsys.readouterr().err
