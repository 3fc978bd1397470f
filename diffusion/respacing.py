"""Which of the trained steps a sampler visits."""

import numpy as np
from numpy.typing import NDArray


def evenly_spaced(num_trained: int, num_kept: int) -> NDArray[np.int64]:
    """``num_kept`` of ``num_trained`` steps at a constant fractional stride, both ends included: [num_kept].

    This is ADM's respacing with one section ("250" and the like), including its rounding of halves to even.
    Raises ValueError for fewer than two steps, or more than were trained.
    """
    if not 2 <= num_kept <= num_trained:
        raise ValueError(
            f"sampler.steps is {num_kept}, but the process was trained with {num_trained} steps; "
            f"choose between 2 and {num_trained}."
        )
    # Accumulated, not multiplied: the same rounding error as ADM's loop, hence the same steps.
    stride = (num_trained - 1) / (num_kept - 1)
    positions = np.concatenate([[0.0], np.cumsum(np.full(num_kept - 1, stride))])
    return np.array([round(position) for position in positions], dtype=np.int64)
