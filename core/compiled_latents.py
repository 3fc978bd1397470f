"""Compile the drawing of latents from moments in float16, with a table of deviations for each of its 65,536 values."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from core.numba_functions import compiled

_ARRAYS = "uint16[:, :, ::1], float32[:, :, ::1], float32[::1], float32[::1], float32[::1], float32[:, :, ::1]"


@intrinsic
def _number(_: Any, bits: Any) -> Any:
    """Return the float32 of a float16 that is given as bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@compiled(f"void({_ARRAYS})")
def fill_latents(moments, posterior, deviations, shift, scale, out):  # type: ignore[no-untyped-def]
    """Write (mean + deviation x posterior - shift) x scale to ``out`` [B, c, n], of moments [B, 2c, n] as bits.

    ``shift`` and ``scale`` are [1 or c]. ``out`` may be ``posterior``. Each operation rounds to float32, as it does
    where PyTorch computes them one by one.
    """
    rows, channels, length = posterior.shape
    drawn = np.empty(length, np.float32)
    for row in range(rows):
        for channel in range(channels):
            mean, log_variance = moments[row, channel], moments[row, channels + channel]
            normal, latent = posterior[row, channel], out[row, channel]
            moved, factor = shift[channel % shift.size], scale[channel % scale.size]
            for place in range(length):  # apart from the arithmetic, which vectorizes
                drawn[place] = deviations[log_variance[place]]
            for place in range(length):  # to memory of its own: a loop over arrays that overlap does not vectorize
                number = _number(mean[place])  # type: ignore[call-arg, var-annotated] # the context is numba's
                sample = number + drawn[place] * normal[place]
                drawn[place] = (sample - moved) * factor
            for place in range(length):
                latent[place] = drawn[place]
