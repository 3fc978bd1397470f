"""Memory of arrays is used again only when nothing refers to it any more."""

import gc

import numpy as np
import torch

from core.buffers import Buffers


def test_memory_is_used_again_once_every_view_and_tensor_of_it_is_gone() -> None:
    buffers = Buffers()
    array = buffers.empty((4, 6), np.float32)
    address = array.ctypes.data
    array[:] = 7
    tensor = torch.from_numpy(array.reshape(2, 12)[:, 3:])
    view = array[1:].view(np.uint8)
    del array
    others = [buffers.empty((4, 6), np.float32) for _ in range(3)]
    assert address not in {other.ctypes.data for other in others}
    del view
    part = tensor[1, :4].view(2, 2)
    del tensor
    others.append(buffers.empty((4, 6), np.float32))
    assert address not in {other.ctypes.data for other in others}
    assert part.tolist() == [[7, 7], [7, 7]]
    del part
    gc.collect()
    assert buffers.empty((2, 12), np.float32).ctypes.data == address


def test_arrays_are_aligned_and_of_the_shape_and_dtype_that_were_asked_for() -> None:
    buffers = Buffers()
    for shape, dtype in [((3, 5), np.float16), ((0, 4), np.float32), ((), np.int64), ((7,), np.bool_)]:
        array = buffers.empty(shape, dtype)
        assert (array.shape, array.dtype, array.flags.writeable) == (shape, dtype, True)
        assert array.size == 0 or array.ctypes.data % 64 == 0
