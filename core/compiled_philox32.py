"""Compile Philox 4x32-10 and the table of normals with numba. The numbers are those of `core.tensor_philox32`.

Loops are over arrays, in parts that fit the CPU's cache, so that they are vectorized. Import this file only where the
compiled functions are wanted; without numba the import fails.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from core.normal_table import DROP_BITS, FIRST_INDEX
from core.numba_functions import compiled
from core.tensor_philox32 import LANES, MULTIPLIERS, ROUNDS, UNIT, WEYL

_MULTIPLIER_0, _MULTIPLIER_1 = map(np.uint64, MULTIPLIERS)
_WEYL_0, _WEYL_1 = map(np.uint64, WEYL)
_LOW, _HALF, _ZERO = np.uint64(0xFFFFFFFF), np.uint64(32), np.uint64(0)
_SIGN, _MAGNITUDE, _ODD = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(1)
_FIRST_INDEX, _INDEX = np.uint64(FIRST_INDEX), np.uint16(0x7FFF)
_DROP_BITS, _DROP, _PLACE = np.uint32(DROP_BITS), np.uint32(2**DROP_BITS - 1), np.uint32(0xFFFF)
_ROUNDING, _PLACE_BITS, _FINER, _SIGN_BIT = np.uint32(2**12), np.uint32(13), np.uint32(3), np.int32(31)
_UNIT = np.float32(UNIT)
_PART = 1024  # normals that are made at once


@intrinsic
def _bits(_: Any, number: Any) -> Any:
    """Return the bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@njit(nogil=True, inline="always")
def _block(c0, c1, c2, c3, seed):  # type: ignore[no-untyped-def] # numba infers the types
    """Return the four words of one counter, in the low halves of 64 bits: so LLVM multiplies them in vectors."""
    key_0, key_1 = seed & _LOW, seed >> _HALF
    for _ in range(ROUNDS):
        product_0, product_1 = (c0 & _LOW) * _MULTIPLIER_0, (c2 & _LOW) * _MULTIPLIER_1
        c0, c1 = (product_1 >> _HALF) ^ c1 ^ key_0, product_1 & _LOW
        c2, c3 = (product_0 >> _HALF) ^ c3 ^ key_1, product_0 & _LOW
        key_0, key_1 = (key_0 + _WEYL_0) & _LOW, (key_1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@njit(nogil=True, inline="always")
def _signed_bits(word):  # type: ignore[no-untyped-def]
    """Return the bits of a word's magnitude as float32, with the word's sign."""
    half = np.uint32(word)
    magnitude = np.float32(np.int32((half & _MAGNITUDE) | _ODD))
    return _bits(magnitude) | (half & _SIGN)  # type: ignore[call-arg] # the context is numba's


@njit(nogil=True, inline="always")
def _normal(bits, entry):  # type: ignore[no-untyped-def]
    drop = ((entry & _DROP) * (bits & _PLACE) + _ROUNDING) >> _PLACE_BITS
    magnitude = np.int32((entry >> _DROP_BITS) << _FINER) - np.int32(drop)
    sign = np.int32(bits) >> _SIGN_BIT  # 0 or -1
    return np.float32(np.int32((magnitude ^ sign) - sign)) * _UNIT


@njit(nogil=True, inline="always")
def _fill_bits(bits, first, position, stream, seed):  # type: ignore[no-untyped-def]
    """Write the signed bits of the words of a stream from chunk ``first`` on, as many as ``bits`` has."""
    c1, c2 = position & _LOW, position >> _HALF
    for chunk in range(bits.size // (4 * LANES)):
        number, place = (first + chunk) * LANES, chunk * 4 * LANES
        for lane in range(LANES):
            word_0, word_1, word_2, word_3 = _block(np.uint64(number + lane), c1, c2, stream, seed)
            bits[place + lane] = _signed_bits(word_0)
            bits[place + LANES + lane] = _signed_bits(word_1)
            bits[place + 2 * LANES + lane] = _signed_bits(word_2)
            bits[place + 3 * LANES + lane] = _signed_bits(word_3)


@compiled("void(float32[:, ::1], int64[::1], uint64[::1], uint32[::1])")
def fill_normals(out, positions, key, table):  # type: ignore[no-untyped-def]
    """Write the normals of one stream to each row of ``out`` [B, n]; ``key`` has the stream and the seed."""
    stream, seed = key[0], key[1]
    bits, entries = np.empty(_PART, np.uint32), np.empty(_PART, np.uint32)
    indices = bits.view(np.uint16)  # each second one, with the sign
    for row in range(len(positions)):
        position = np.uint64(positions[row])
        for start in range(0, out.shape[1], _PART):
            normals = out[row, start : start + _PART]
            num_chunks = (normals.size + 4 * LANES - 1) // (4 * LANES)
            _fill_bits(bits[: num_chunks * 4 * LANES], start // (4 * LANES), position, stream, seed)
            for place in range(normals.size):  # apart from the arithmetic, which vectorizes
                entries[place] = table[np.uint64(indices[2 * place + 1] & _INDEX) - _FIRST_INDEX]
            for place in range(normals.size):
                normals[place] = _normal(bits[place], entries[place])


@compiled("void(uint64[::1], int64[::1], uint64, uint64)")
def fill_first_words(out, positions, stream, seed):  # type: ignore[no-untyped-def]
    """Write the first two words of one stream, the first one as the low half, to each element of ``out`` [B]."""
    for row in range(len(positions)):
        position = np.uint64(positions[row])
        word_0, word_1, _, _ = _block(_ZERO, position & _LOW, position >> _HALF, stream, seed)
        out[row] = (word_0 & _LOW) | (word_1 << _HALF)
