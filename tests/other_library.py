"""An array library that is not NumPy, as DLPack sees one: a type of its own, a namespace, bfloat16 that NumPy cannot import."""

import ml_dtypes
import numpy as np

uint16 = np.dtype(np.uint16)
bfloat16 = np.dtype(ml_dtypes.bfloat16)


class Tensor:
    """CPU memory that shows only the DLPack protocol, dtype, shape and view."""

    def __init__(self, array, device=1):
        self._array, self._device = array, device

    dtype = property(lambda self: self._array.dtype)
    shape = property(lambda self: self._array.shape)

    def view(self, dtype):
        return Tensor(self._array.view(dtype), self._device)

    def __dlpack__(self, **kwargs):
        return self._array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self._device, 0

    def __array_namespace__(self):
        import tests.other_library as namespace

        return namespace

    def to_array(self):
        return self._array


def from_dlpack(x):
    return Tensor(np.from_dlpack(x))
