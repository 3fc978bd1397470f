"""Find what PyTorch's compiler needs to make kernels for a GPU."""

import importlib.util
import os
import shutil


def missing_for_kernels() -> str | None:
    """Return what is missing: the package triton, or the C compiler that triton calls; None if all is there."""
    if importlib.util.find_spec("triton") is None:
        return "package triton"
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"C compiler ({' or '.join(compilers)})"
    return None
