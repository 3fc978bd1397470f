"""Compile numpy's Philox 4x64 and its ziggurat of float32 normals with numba, for many streams at once.

The numbers are bit for bit those of `core.draws.Philox`, which is several times slower. Import this file only where
the compiled functions are wanted: numba loads them from its cache in half a second, or compiles them in a few.
Without numba the import fails.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from core.numba_functions import compiled
from core.ziggurat import SIDES, R

_ZERO, _ONE, _TWO, _THREE, _FOUR, _COPIED = (np.uint64(value) for value in (0, 1, 2, 3, 4, 16))
# Multipliers and increments of the keys of Philox 4x64 (Salmon et al. 2011).
_MULTIPLIER_0, _MULTIPLIER_1 = np.uint64(0xD2E7470EE14C6C93), np.uint64(0xCA5A826395121157)
_WEYL_0, _WEYL_1 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBB67AE8584CAA73B)
_ROUNDS = 10
_HALF = np.uint64(32)
_HALVES_PER_BLOCK = np.uint64(8)
_TAIL = np.float32(R)
_PER_TAIL = np.float32(1 / R)
_UNIT = np.float32(2.0**-24)
_SIDES = SIDES


@intrinsic
def _product(_: Any, a: Any, b: Any) -> Any:
    """Return the high and the low 64 bits of a product."""
    both = types.UniTuple(types.uint64, 2)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide, word = ir.IntType(128), ir.IntType(64)
        whole = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        high = builder.trunc(builder.lshr(whole, ir.Constant(wide, 64)), word)
        return context.make_tuple(builder, both, (high, builder.trunc(whole, word)))

    return both(types.uint64, types.uint64), generate


@njit(nogil=True, inline="always")
def _block(number, position, purpose, draw, seed):  # type: ignore[no-untyped-def] # numba infers the types
    """Return the four words of one counter of a stream; numpy begins with counter 1."""
    c0, c1, c2, c3 = number + _ONE, position, purpose, draw
    key_0, key_1 = seed, _ZERO
    for _ in range(_ROUNDS):
        high_0, low_0 = _product(_MULTIPLIER_0, c0)  # type: ignore[call-arg, var-annotated] # the context is numba's
        high_1, low_1 = _product(_MULTIPLIER_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ key_0, low_1, high_0 ^ c3 ^ key_1, low_0
        key_0, key_1 = key_0 + _WEYL_0, key_1 + _WEYL_1
    return c0, c1, c2, c3


@njit(nogil=True, inline="always")
def _store_block(words, number, position, purpose, draw, seed):  # type: ignore[no-untyped-def]
    first = _FOUR * number
    block = _block(number, position, purpose, draw, seed)
    words[first], words[first + _ONE], words[first + _TWO], words[first + _THREE] = block


@njit(nogil=True, inline="always")
def _from_core(half, widths, limits):  # type: ignore[no-untyped-def]
    """Return the normal of 32 random bits, and whether the layer's core does not contain it."""
    layer = np.uint64(half & np.uint32(0x1FF))  # with the sign
    magnitude = np.int32(half >> np.uint32(9))
    return np.float32(magnitude) * widths[layer], magnitude >= limits[layer]


@njit(nogil=True, inline="always")
def _normals_of_block(halves, number, normals, outside, num_outside, widths, limits):  # type: ignore[no-untyped-def]
    """Write a block's eight normals, list those outside the cores, and return the new length of the list."""
    first = _HALVES_PER_BLOCK * number
    for offset in range(8):
        index = first + np.uint64(offset)
        normals[index], is_outside = _from_core(halves[index], widths, limits)
        if is_outside:
            outside[num_outside] = index
            num_outside += _ONE
    return num_outside


@njit(nogil=True, inline="always")
def _all_from_cores(words, halves, normals, outside, stream, tables):  # type: ignore[no-untyped-def]
    """Fill ``words`` from a stream, ``normals`` from the halves of all but the last two blocks, and ``outside``.

    Normals are made two blocks after their words: both take longer where one waits for the other. Returns the length
    of the list ``outside``.
    """
    position, purpose, draw, seed = stream
    widths, limits, _ = tables
    num_outside = _ZERO
    for number in range(np.uint64(words.size) // _FOUR):
        _store_block(words, number, position, purpose, draw, seed)
        if number >= _TWO:
            num_outside = _normals_of_block(halves, number - _TWO, normals, outside, num_outside, widths, limits)
    return num_outside


@njit(nogil=True)
def _half_beyond(index, stream):  # type: ignore[no-untyped-def]
    """Return the 32 bits at an index of a stream."""
    position, purpose, draw, seed = stream
    word_0, word_1, word_2, word_3 = _block(index // _HALVES_PER_BLOCK, position, purpose, draw, seed)
    place = (index % _HALVES_PER_BLOCK) // _TWO
    word = (word_0 if place == _ZERO else word_1) if place < _TWO else (word_2 if place == _TWO else word_3)
    return np.uint32(word >> _HALF if index % _TWO else word)


@njit(nogil=True, inline="always")
def _half(index, halves, stream):  # type: ignore[no-untyped-def]
    """Return the same; ``halves`` has the first ones."""
    return halves[index] if index < np.uint64(halves.size) else _half_beyond(index, stream)


@njit(nogil=True, inline="always")
def _uniform(index, halves, stream):  # type: ignore[no-untyped-def]
    return np.float32(_half(index, halves, stream) >> np.uint32(8)) * _UNIT


@njit(nogil=True, inline="always")
def _tried(index, halves, stream, tables):  # type: ignore[no-untyped-def]
    """Try to make the normal that begins at an index: return it, whether it is accepted, and the next index."""
    widths, limits, heights = tables
    half = _half(index, halves, stream)
    normal, is_outside = _from_core(half, widths, limits)
    index += _ONE
    if not is_outside:
        return normal, True, index
    layer = np.int64(half & np.uint32(0xFF))
    if layer > 0:
        uniform = _uniform(index, halves, stream)
        height = (heights[layer - 1] - heights[layer]) * uniform + heights[layer]
        return normal, height < math.exp(-0.5 * np.float64(normal) * np.float64(normal)), index + _ONE
    while True:
        beyond = -_PER_TAIL * np.float32(math.log1p(-_uniform(index, halves, stream)))
        bound = -np.float32(math.log1p(-_uniform(index + _ONE, halves, stream)))
        index += _TWO
        if bound + bound > beyond * beyond:
            is_negative = (half >> np.uint32(17)) & np.uint32(1)
            return (-(_TAIL + beyond) if is_negative else _TAIL + beyond), True, index


@njit(nogil=True, inline="always")
def _put(normals, outside, halves, stream, tables, out):  # type: ignore[no-untyped-def]
    """Write the normals that are accepted, in order, until ``out`` is full."""
    done, index = _ZERO, _ZERO
    size, last = np.uint64(out.size), np.uint64(normals.size)
    for place in range(outside.size + 1):
        stop = np.uint64(outside[place]) if place < outside.size else last
        if stop < index:  # a uniform number of the one before
            continue
        count = min(stop - index, size - done)
        if max(done, index) + count + _COPIED <= size:
            first = _ZERO
            while first < count:  # a range with steps divides
                for offset in range(16):  # what is copied too much is overwritten
                    here = first + np.uint64(offset)
                    out[done + here] = normals[index + here]
                first += _COPIED
        else:
            for offset in range(count):
                out[done + offset] = normals[index + offset]
        done, index = done + count, index + count
        if done == size:
            return
        out[done], is_accepted, index = _tried(index, halves, stream, tables)
        done += np.uint64(is_accepted)
        if done == size:
            return
    while done < size:
        out[done], is_accepted, index = _tried(index, halves, stream, tables)
        done += np.uint64(is_accepted)


@njit(nogil=True, error_model="numpy")
def fill_with_spare(out, positions, key, table, spare_halves):  # type: ignore[no-untyped-def]
    """Write the normals of one stream to each row of ``out`` [B, n].

    ``spare_halves`` are made in addition to n. Normals that need more than these are made one by one.
    """
    seed, purpose, draw = key[0], key[1], key[2]
    widths, limits, heights = table[:_SIDES], table[_SIDES : 2 * _SIDES], table[2 * _SIDES :]
    num_blocks = (out.shape[1] + spare_halves + 7) // 8
    words = np.empty(4 * (num_blocks + 2), np.uint64)
    normals = np.empty(8 * num_blocks, np.float32)
    outside = np.empty(8 * num_blocks, np.uint32)
    halves = words.view(np.uint32)
    tables = (widths.view(np.float32), limits.view(np.int32), heights.view(np.float32))
    for row in range(len(positions)):
        stream = (np.uint64(positions[row]), purpose, draw, seed)
        num_outside = _all_from_cores(words, halves, normals, outside, stream, tables)
        _put(normals, outside[:num_outside], halves, stream, tables, out[row])


@compiled("void(float32[:, ::1], int64[::1], uint64[::1], uint32[::1])")
def fill_normals(out, positions, key, table):  # type: ignore[no-untyped-def]
    """Write the normals of one stream to each row of ``out`` [B, n].

    ``key`` has the seed, the purpose and the draw, ``table`` the bits of a ziggurat's tables.
    """
    fill_with_spare(out, positions, key, table, out.shape[1] // 64 + 16)  # one in 80 normals takes more than 32 bits


@compiled("void(uint64[::1], int64[::1], uint64, uint64)")
def fill_first_words(out, positions, seed, purpose):  # type: ignore[no-untyped-def]
    """Write the first 64 bits of one stream to each element of ``out`` [B]."""
    for row in range(len(positions)):
        out[row] = _block(_ZERO, np.uint64(positions[row]), purpose, _ZERO, seed)[0]
