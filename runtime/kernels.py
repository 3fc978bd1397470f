"""Compile networks, and find what PyTorch's compiler needs to make kernels for a GPU or for the CPU."""

import importlib.util
import os
import shutil
import sys
from typing import Literal

from model.compiled import form_for_cpu
from model.network import Network, compile_each_unit

WHERE_POSSIBLE = "where_possible"  # of settings named compile: where it is faster and the tools are there


def compile_network(network: Network, device_type: str, whole: bool = False) -> None:
    """Compile a network as one graph, or unit by unit: all units of one class and shape share one compilation."""
    if device_type == "cpu":
        for module in (network,) if whole else network.units():
            form_for_cpu(module)
    if whole:
        network.compile()
    else:
        compile_each_unit(network)


def compile_where_possible(network: Network, device_type: str, is_main: bool) -> None:
    """Compile a network as `fastest_form` says; under XLA, which compiles by itself, do nothing."""
    if device_type != "xla" and (form := fastest_form(device_type, is_main)):
        compile_network(network, device_type, whole=form == "whole")


def fastest_form(device_type: str, is_main: bool) -> Literal["whole", True, False]:
    """Return how networks are compiled fastest: whole on a CPU, unit by unit (True) on a GPU.

    Where a tool is missing, that is not at all (False), and the main process says so.
    """
    missing = missing_for_kernels(device_type)
    if missing is None:
        return "whole" if device_type == "cpu" else True
    if is_main:
        print(f"note: blocks are not compiled, and steps are slower: there is no {missing}.", file=sys.stderr)
    return False


def missing_for_kernels(device_type: str) -> str | None:
    """Return what is missing, or None if all is there.

    On a GPU that is the package triton or the C compiler that it calls, on a CPU a C++ compiler.
    """
    if device_type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        return None if shutil.which(compiler) else f"C++ compiler {compiler}"
    if importlib.util.find_spec("triton") is None:
        return "package triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"C compiler ({' or '.join(compilers)})"
    return None
