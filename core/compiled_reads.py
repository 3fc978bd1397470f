"""Compile the reading of many parts of files with numba: threads that read do not take the GIL for each part."""

from typing import Any

import numpy as np
from numba import types

from core.numba_functions import compiled

_pread: Any = types.ExternalFunction("pread", types.int64(types.int32, types.voidptr, types.uint64, types.int64))


@compiled("int64(int32[::1], int64[::1], uint8[:, ::1])")
def read_rows(descriptors, offsets, out):  # type: ignore[no-untyped-def] # numba infers the types
    """Fill each row of ``out`` [B, bytes] from one file at one offset, up to the first row whose read is incomplete.

    Return the number of rows that were filled.
    """
    for row in range(len(offsets)):
        num_bytes = out.shape[1]
        if _pread(descriptors[row], out[row].ctypes, np.uint64(num_bytes), offsets[row]) != num_bytes:
            return row
    return len(offsets)
