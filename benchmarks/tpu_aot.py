"""Compile ditscale's training step for TPUs without having them, to find its memory, compute and collectives.

``make aot`` runs `CASES`; ``.venv-aot/bin/python -m benchmarks.tpu_aot v3-8 runtime.mode=zero1`` runs one. Each prints
a JSON line. The step is XL/2's at 256 px, batch 256, in bf16 autocast, unless overrides of ``ditscale train`` say
otherwise. `benchmarks.tpu_lower` traces it in the project's environment; this file runs in its own
(requirements-aot.txt), since libtpu needs a jax that training does not. Nothing is executed: there are no weights and
no TPU.
"""

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

# libtpu reads these when it is loaded: query no metadata server, and allow other processes that also only compile.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np
from jax.experimental import topologies
from jax.interpreters import mlir
from jax.interpreters.mlir import ir
from jaxlib import xla_client
from jaxlib.mlir.dialects import stablehlo

from benchmarks.hlo_text import collectives, spread, totals

ROOT = Path(__file__).resolve().parent.parent


class Topology(NamedTuple):
    """A slice of TPUs by libtpu's name. ``cores`` counts XLA devices: half a chip on v3, else a chip."""

    name: str
    cores: int
    chip_config: str = "default"


TOPOLOGIES = {
    "v3-8": Topology("v3:2x2", 8),
    "v3-128": Topology("v3:8x8", 128),
    "v3-256": Topology("v3:8x16", 256),
    "v4-8": Topology("v4:2x2x1", 4, "megacore"),
    "v5e-8": Topology("v5e:2x4", 8),
    "v6e-8": Topology("v6e:2x4", 8),
}
# Autograd has 7 bits for a device's index: larger slices are traced with this many, and the annotations rewritten.
MOST_TRACED_DEVICES = 64
REMAT = "activation_checkpointing=true"
CASES: tuple[tuple[str, ...], ...] = (
    ("v3-8", "runtime.mode=replicated"),
    ("v3-8", "runtime.mode=replicated", REMAT),
    ("v3-8", "runtime.mode=zero1"),
    ("v3-8", "runtime.mode=zero1", REMAT),
    ("v3-8", "runtime.mode=fsdp", REMAT),
    ("v3-128", "runtime.mode=replicated"),
    ("v3-256", "runtime.mode=replicated"),
    ("v4-8", "runtime.mode=replicated"),
    ("v4-8", "runtime.mode=fsdp", REMAT),
    ("v5e-8", "runtime.mode=replicated", REMAT),
    ("v5e-8", "runtime.mode=zero1"),
    ("v5e-8", "runtime.mode=fsdp", REMAT),
    ("v6e-8", "runtime.mode=replicated"),
)


class Lowered(NamedTuple):
    """A traced step: its HLO before partitioning, and the facts that `benchmarks.tpu_lower` states."""

    hlo: str
    facts: dict[str, Any]


def lower(python: str, devices: int, overrides: Sequence[str]) -> Lowered:
    """Trace the step for ``devices`` devices in the project's environment."""
    with tempfile.TemporaryDirectory() as folder:
        command = [python, "-m", "benchmarks.tpu_lower", folder, *overrides]
        environment = {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
        return Lowered(Path(folder, "step.hlo").read_text(), json.loads(Path(folder, "step.json").read_text()))


def finish(module: ir.Module) -> None:
    """Mark the state's arguments as sharded and donated, which tracing without weights leaves out.

    They are the arguments without a sharding attribute (`benchmarks.tpu_lower` annotates placeholders by an
    operation); the step overwrites each of them.
    """
    main = next(function for function in module.body.operations if function.sym_name.value == "main")
    attributes = []
    for argument, given in zip(main.arguments, main.arg_attrs, strict=True):
        named = {entry.name: entry.attr for entry in given}
        if "mhlo.sharding" not in named:
            named["mhlo.sharding"] = _annotation(argument)
            named["jax.buffer_donor"] = ir.BoolAttr.get(True)
        attributes.append(ir.DictAttr.get(named))
    main.arg_attrs = ir.ArrayAttr.get(attributes)


def _annotation(value: ir.Value) -> ir.Attribute:
    """Return the last of the sharding annotations that follow a value."""
    found = None
    while len(users := [use.owner for use in value.uses]) == 1 and "mhlo.sharding" in users[0].attributes:
        found, value = users[0].attributes["mhlo.sharding"], users[0].results[0]
    assert found is not None, "an argument is neither sharded nor annotated"
    return found


def multiply_adds(module: ir.Module) -> int:
    """Return the multiply-adds of all matrix products of the traced step, over all cores."""
    total = 0

    def add(operation: ir.Operation) -> ir.WalkResult:
        nonlocal total
        if operation.name in ("stablehlo.dot", "stablehlo.dot_general"):
            left = operation.operands[0].type.shape
            contracted = [len(left) - 1]
            if operation.name == "stablehlo.dot_general":
                numbers = stablehlo.DotDimensionNumbers(operation.attributes["dot_dimension_numbers"])
                contracted = numbers.lhs_contracting_dimensions
            total += math.prod(operation.results[0].type.shape) * math.prod(left[axis] for axis in contracted)
        return ir.WalkResult.ADVANCE

    module.operation.walk(add)
    return total


def compile_for(devices: list[Any], module: ir.Module) -> Any:
    """Compile for all devices under XLA's partitioner. Raises JaxRuntimeError where the program does not fit."""
    options = xla_client.CompileOptions()
    build = options.executable_build_options
    options.num_replicas = build.num_replicas = 1
    options.num_partitions = build.num_partitions = len(devices)
    build.use_spmd_partitioning = True
    build.allow_spmd_sharding_propagation_to_output = [True]  # as in torch_xla: results stay as annotated
    build.device_assignment = xla_client.DeviceAssignment.create(np.array([[device.id for device in devices]]))
    bytecode = mlir.module_to_bytecode(module)
    return devices[0].client.compile(bytecode, xla_client.DeviceList(tuple(devices)), options)


def capacity_bytes(device: Any) -> int:
    """Return the HBM that a program may use, from the compiler's error for a program that needs 256 GiB."""
    too_much = [jax.ShapeDtypeStruct((2**32,), np.int8, sharding=jax.sharding.SingleDeviceSharding(device))] * 64
    try:
        jax.jit(lambda arrays: [array + 1 for array in arrays]).lower(too_much).compile()
    except jax.errors.JaxRuntimeError as error:
        return _gibibytes(r"of ([\d.]+)G hbm", str(error))
    raise AssertionError("a program of 256 GiB fits")


def _gibibytes(pattern: str, message: str) -> int:
    found = re.search(pattern, message)
    assert found is not None, message
    return round(float(found.group(1)) * 2**30)


def measure(topology: Topology, lowered: Lowered) -> dict[str, Any]:
    """Return the compiler's results for the step on a slice."""
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=topology.name, chip_config_name=topology.chip_config
    )
    devices = description.devices
    assert len(devices) == topology.cores, f"{topology.name} has {len(devices)} cores"
    with mlir.make_ir_context(), ir.Location.unknown():
        hlo = xla_client._xla.hlo_module_from_text(spread(lowered.hlo, lowered.facts["traced_devices"], topology.cores))
        proto = hlo.as_serialized_hlo_module_proto()
        module = ir.Module.parse(xla_client._xla.mlir.hlo_to_stablehlo(proto))
        finish(module)
        result = {"device_kind": devices[0].device_kind, "hbm_capacity_bytes": capacity_bytes(devices[0])}
        traced = multiply_adds(module) / lowered.facts["model_multiply_adds"]
        result["traced_multiply_adds_over_model"] = round(traced, 4)
        started = time.perf_counter()
        try:
            executable = compile_for(devices, module)
        except jax.errors.JaxRuntimeError as error:
            if "Exceeded hbm capacity" not in str(error):
                raise
            result |= {"fits": False, "hbm_bytes": _gibibytes(r"Used ([\d.]+)G of", str(error))}
            return result | {"compile_sec": round(time.perf_counter() - started, 1)}
    result |= {"fits": True, "compile_sec": round(time.perf_counter() - started, 1)}
    return result | _of_executable(executable, topology.cores, lowered.facts["model_multiply_adds"])


def _of_executable(executable: Any, cores: int, model_multiply_adds: int) -> dict[str, Any]:
    """Return memory per core, compute over all cores, and collectives."""
    memory = executable.get_compiled_memory_stats()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    flops = executable.cost_analysis()["flops"]
    return {
        "hbm_bytes": sum(parts.values()),
        "hbm_parts_bytes": parts,
        # The compiler's flops include elementwise operations: half a percent for XL/2.
        "compiled_multiply_adds_over_model": round(flops / 2 * cores / model_multiply_adds, 4),
        "collectives": totals(collectives(executable.hlo_modules()[0].to_string())),
    }


def run_case(case: Sequence[str], python: str) -> dict[str, Any]:
    """Return the result line of a case: a slice's name and the step's settings."""
    name, *overrides = case
    topology = TOPOLOGIES[name]
    devices = min(topology.cores, MOST_TRACED_DEVICES)
    lowered = lower(python, devices, overrides)
    if devices < topology.cores and lowered.facts["fsdp_devices"] == devices:
        raise ValueError(
            f"State is sharded over all cores, but {name} has {topology.cores} and {devices} are traced; set "
            "runtime.fsdp_devices=8."
        )
    described = {"benchmark": "tpu_aot", "slice": name, "topology": topology.name, "cores": topology.cores}
    versions = {package: version(package) for package in ("jax", "libtpu")}
    return {**described, **lowered.facts, **measure(topology, lowered), **versions}


def main() -> None:
    """Run one case of the command line, or all of `CASES`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", help="a slice and overrides of `ditscale train`; default: all of CASES")
    parser.add_argument("--python", default=str(ROOT / ".venv/bin/python"), help="the project's Python")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(arguments.case, arguments.python)), flush=True)
        return
    again = [sys.executable, "-m", "benchmarks.tpu_aot", "--python", arguments.python]
    failed = [case for case in CASES if subprocess.run([*again, *case], cwd=ROOT).returncode]  # frees memory
    if failed:
        sys.exit(f"{len(failed)} of {len(CASES)} cases failed: {failed}")


if __name__ == "__main__":
    main()
