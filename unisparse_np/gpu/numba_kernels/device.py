"""Arrays on the device: how they come in, how they are widened to float32, how they go back as their owner's kind.

Every stage takes NumPy arrays or DeviceArrays and answers in the kind of its first argument, so a stage can be tried alone
from the host, while `run_sparse` passes DeviceArrays from stage to stage and nothing visits the host in between.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numba import cuda

from ...arrays import dtype_name, like, on_gpu, to_numpy
from ...errors import InvalidInput
from .tile import IN_SIMULATOR

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
THREADS_OF_ONE_AXIS = 4 if IN_SIMULATOR else 256
MOST_BLOCKS = 2 if IN_SIMULATOR else 4096  # kernels that walk an array in strides need no more


class DeviceArray:
    """A Numba device array with what the package asks of an array: shape, dtype, len, indexing, astype.

    bfloat16 is unknown to Numba's kernels: its bits are held as uint16, and `dtype` says what they mean.
    """

    def __init__(self, data: Any, dtype: Any = None) -> None:
        self.data = data
        self.dtype = np.dtype(data.dtype if dtype is None else dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.data.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> DeviceArray:
        return DeviceArray(self.data[index], self.dtype)

    def __iter__(self) -> Iterator[DeviceArray]:
        return (self[n] for n in range(len(self)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.copy_to_host() if dtype is None else self.copy_to_host().astype(dtype)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return self.data.__cuda_array_interface__

    def copy_to_host(self) -> np.ndarray:
        if isinstance(self.data, np.ndarray):  # empty: see `to_device`
            return self.data
        host = self.data.copy_to_host()
        return host.view(self.dtype) if self.dtype == BFLOAT16 else host

    def astype(self, dtype: Any, copy: bool = True) -> DeviceArray:
        """The values of [H, T, n] rounded or widened to another dtype, in contiguous memory."""
        dtype = np.dtype(dtype)
        if dtype == self.dtype and not copy:
            return self
        if BFLOAT16 in (dtype, self.dtype) and dtype != self.dtype and np.float32 not in (dtype, self.dtype):
            return self.astype(np.float32).astype(dtype)
        result = cuda.device_array(self.shape, np.uint16 if dtype == BFLOAT16 else dtype)
        if dtype == self.dtype or BFLOAT16 not in (dtype, self.dtype):
            launch_over(result.size, copy_values, self.data, result)
        elif self.dtype == BFLOAT16:
            launch_over(result.size, widen_bfloat16, self.data, result.view(np.uint32))
        else:
            launch_over(result.size, round_to_bfloat16, self.data.view(np.uint32), result)
        return DeviceArray(result, dtype)


# ---- in and out ----
def to_device(x: Any) -> DeviceArray:
    """NumPy and device arrays of any library as a DeviceArray; device memory is viewed, not copied."""
    if isinstance(x, DeviceArray):
        return x
    if isinstance(x, np.ndarray) and x.size == 0:  # there is no device memory of size 0
        return DeviceArray(x)
    if isinstance(x, np.ndarray):
        bits = x.view(np.uint16) if x.dtype == BFLOAT16 else x
        return DeviceArray(cuda.to_device(np.ascontiguousarray(bits)), x.dtype)
    if not hasattr(x, "__cuda_array_interface__"):
        raise InvalidInput(
            f"a {type(x).__name__} is on a GPU but has no __cuda_array_interface__: give a CuPy, PyTorch, JAX or Numba array"
        )
    return DeviceArray(cuda.as_cuda_array(x))


def computing(x: Any) -> DeviceArray:
    """The array as the kernels read it: on the device, contiguous, float32 (16-bit input is widened) or float64."""
    x = to_device(x)
    wanted = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    return x.astype(wanted, copy=not x.data.is_c_contiguous())


def empty(shape: tuple[int, ...], dtype: Any) -> DeviceArray:
    """Memory on the device, not written yet."""
    return DeviceArray(cuda.device_array(shape, dtype))


def hand_back(result: DeviceArray, given: Any) -> Any:
    """A stage's result in the kind of its argument: NumPy for NumPy, a DeviceArray otherwise."""
    return result.copy_to_host() if isinstance(given, np.ndarray) else result


def from_any(name: str, x: Any) -> DeviceArray:
    """An array of any library on the device: GPU memory is viewed, CPU memory copied.

    Raises InvalidInput when it cannot be read.
    """
    if isinstance(x, DeviceArray):
        return x
    if getattr(x, "requires_grad", False):
        raise InvalidInput(f"{name} requires a gradient, which this attention does not compute: detach it first")
    if not on_gpu(x):
        return to_device(to_numpy(name, x))
    if dtype_name(x) == "bfloat16":  # the same bits under a type that Numba knows
        return DeviceArray(to_device(x.view(_namespace(x).uint16)).data, BFLOAT16)
    return to_device(x)


def to_kind_of(result: Any, given: Any) -> Any:
    """A result (DeviceArray, or NumPy after joining a batch) as an array of the caller's library."""
    if isinstance(given, DeviceArray):
        return to_device(result)
    if not on_gpu(given):
        return like(np.asarray(result), given)
    result = to_device(result)
    if hasattr(given, "__cuda_ndarray__"):  # Numba's own
        return result.data
    namespace = _namespace(given)
    view = getattr(namespace, "as_tensor", namespace.asarray)(result)  # PyTorch's asarray knows no CUDA array interface
    return view.view(given.dtype) if result.dtype == BFLOAT16 else view


def as_numpy(x: Any) -> np.ndarray:
    """The backend's array as NumPy."""
    return np.asarray(x)


def _namespace(x: Any) -> Any:
    return sys.modules[type(x).__module__.partition(".")[0]]


# ---- kernels over one axis ----
def launch_over(count: int, kernel: Any, *arguments: Any) -> None:
    """Start a kernel whose threads walk `count` items in strides."""
    blocks = min(MOST_BLOCKS, -(-count // THREADS_OF_ONE_AXIS))
    kernel[max(1, blocks), THREADS_OF_ONE_AXIS](*arguments)


@cuda.jit(device=True)
def index_of(n, x):
    """Item n of x [H, T, n] -> (head, token, dim)."""
    return n // (x.shape[1] * x.shape[2]), n // x.shape[2] % x.shape[1], n % x.shape[2]


@cuda.jit
def copy_values(source, target):
    """target = source, both [H, T, n], in target's dtype. A thread takes every (number of threads)-th item."""
    for n in range(cuda.grid(1), target.size, cuda.gridsize(1)):
        at = index_of(n, target)
        target[at] = source[at]


@cuda.jit
def widen_bfloat16(bits, target):
    """float32 bits = bfloat16 bits, then 16 zeros: exact. bits uint16 [H, T, n], target the uint32 view of float32."""
    for n in range(cuda.grid(1), target.size, cuda.gridsize(1)):
        at = index_of(n, target)
        target[at] = np.uint32(bits[at]) << np.uint32(16)


@cuda.jit
def round_to_bfloat16(bits, target):
    """The upper half of float32's bits, rounded to nearest, ties to even. bits uint32 [H, T, n] -> target uint16."""
    for n in range(cuda.grid(1), target.size, cuda.gridsize(1)):
        at = index_of(n, target)
        value = np.int64(bits[at])
        if value & 0x7FFFFFFF > 0x7F800000:  # NaN: rounding could carry it into infinity
            target[at] = np.uint16((value >> 16) | 0x40)
        else:
            target[at] = np.uint16((value + 0x7FFF + ((value >> 16) & 1)) >> 16)


@cuda.jit
def first_not_finite(x, length, first):
    """first[0] = the lowest item of x [H, T, n] that is NaN or infinite, among tokens 0 .. length-1."""
    for n in range(cuda.grid(1), x.size, cuda.gridsize(1)):
        head, token, dim = index_of(n, x)
        if token < length and not math.isfinite(x[head, token, dim]):
            cuda.atomic.min(first, 0, n)
