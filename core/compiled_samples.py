"""Compile the loop that fills samples: it reads moments, draws latents from them, and draws noise, in small parts.

The loop calls functions that are compiled elsewhere, by reference: their machine code runs, and each keeps its own
entry in numba's cache. A reference is an opaque value of numba's, 24 bytes or less, in a row of an array.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from core.numba_functions import compiled

_WORDS = 4  # of a reference
_READ = types.FunctionType(types.int64(types.int32[::1], types.int64[::1], types.uint8[:, ::1]))
_NORMALS = types.FunctionType(types.void(types.float32[:, ::1], types.int64[::1], types.uint64[::1], types.uint32[::1]))
_LATENTS = types.FunctionType(
    types.void(
        types.uint16[:, :, ::1],
        types.float32[:, :, ::1],
        types.float32[::1],
        types.float32[::1],
        types.float32[::1],
        types.float32[:, :, ::1],
    )
)


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, value_type: Any) -> Any:
    assert context.get_abi_sizeof(value_type) <= 8 * _WORDS, "numba's references have grown"
    return builder.bitcast(context.make_array(array_type)(context, builder, array).data, value_type.as_pointer())


@intrinsic
def _store(_: Any, out: Any, function: Any) -> Any:
    """Write the reference of a function to an array."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, value = arguments
        builder.store(value, _pointer(context, builder, signature.args[0], out, value.type))
        return context.get_dummy_value()

    return types.void(out, function), generate


def _loads(kind: Any) -> Any:
    """Return an intrinsic that returns the function of this type to which an array refers."""

    @intrinsic
    def load(_: Any, references: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value_type = context.get_value_type(kind)
            return builder.load(_pointer(context, builder, signature.args[0], arguments[0], value_type))

        return kind(references), generate

    return load


_read_of, _normals_of, _latents_of = map(_loads, (_READ, _NORMALS, _LATENTS))


@compiled(types.int64[:, ::1](_READ, _NORMALS, _LATENTS))
def references_to(read_rows, fill_normals, fill_latents):  # type: ignore[no-untyped-def] # numba infers the types
    """Return references to the three functions, which must exist as long as these: [3, words]."""
    references = np.zeros((3, _WORDS), np.int64)
    _store(references[0], read_rows)  # type: ignore[call-arg] # the context is numba's
    _store(references[1], fill_normals)
    _store(references[2], fill_latents)
    return references


@compiled(
    "int64(int64[:, ::1], int32[::1], int64[::1], int64[::1], uint64[::1], uint64[::1], uint32[::1], float32[::1], "
    "float32[::1], float32[::1], uint16[:, :, ::1], float32[:, ::1], float32[:, ::1], int64, int64)"
)
def fill_samples(  # type: ignore[no-untyped-def]
    references,
    descriptors,
    offsets,
    positions,
    posterior_key,
    noise_key,
    table,
    deviations,
    shift,
    scale,
    moments,
    latents,
    noise,
    first,
    last,
):
    """Fill rows first .. last - 1 of ``latents`` and ``noise`` [B, c n], up to the part whose read is incomplete.

    ``moments`` [rows of a part, 2c, n] is overwritten. Return the first row that is not filled.
    """
    read_rows, fill_normals = _read_of(references[0]), _normals_of(references[1])
    fill_latents = _latents_of(references[2])
    most, channels, length = moments.shape[0], moments.shape[1] // 2, moments.shape[2]
    num_bytes = 4 * channels * length
    for start in range(first, last, most):
        stop = min(start + most, last)
        count = stop - start
        part, drawn = moments[:count], latents[start:stop]
        as_bytes = part.reshape(count * 2 * channels * length).view(np.uint8).reshape(count, num_bytes)
        if read_rows(descriptors[start:stop], offsets[start:stop], as_bytes) != count:
            return start
        fill_normals(drawn, positions[start:stop], posterior_key, table)
        of_channels = drawn.reshape(count, channels, length)
        fill_latents(part, of_channels, deviations, shift, scale, of_channels)
        fill_normals(noise[start:stop], positions[start:stop], noise_key, table)
    return last
