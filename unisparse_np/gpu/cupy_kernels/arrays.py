"""Arrays of any library as CuPy's, and results back, over DLPack."""

from __future__ import annotations

import sys
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ...arrays import dtype_name, on_gpu
from ...errors import InvalidInput
from .device import capability


def from_any(name: str, x: Any) -> Any:
    """The array on the current GPU: CuPy's as it is, another library's GPU array without a copy, NumPy's copied.

    Raises InvalidInput for other CPU arrays, for arrays on another GPU, and for those that require a gradient.
    """
    if not isinstance(x, cupy.ndarray):
        x = _from_other_library(name, x)
    here = cupy.cuda.runtime.getDevice()
    if x.data.device_id != here:  # kernels would run here and read there
        raise InvalidInput(
            f"{name} lies on GPU {x.data.device_id}, but the current device is GPU {here}: call inside "
            f"`with cupy.cuda.Device({x.data.device_id}):`, or move the arrays"
        )
    return x


def _from_other_library(name: str, x: Any) -> Any:
    if isinstance(x, np.ndarray):
        capability()  # a missing device is one clear sentence
        return cupy.asarray(x)
    if not on_gpu(x):
        raise InvalidInput(
            f"{name} is a CPU array of {type(x).__module__}: give NumPy or GPU arrays to the cupy backend, or use backend='auto'"
        )
    if getattr(x, "requires_grad", False):
        raise InvalidInput(f"{name} requires a gradient, which this attention does not compute: detach it first")
    if not hasattr(x, "__dlpack__"):  # Numba's
        return cupy.asarray(x)
    if dtype_name(x) == "bfloat16":  # the same bits under a type that every DLPack knows
        return cupy.from_dlpack(x.view(_namespace(x).int16)).view(ml_dtypes.bfloat16)
    return cupy.from_dlpack(x)


def to_kind_of(result: Any, given: Any) -> Any:
    """A result as an array of the caller's library; NumPy callers get a copy on the CPU."""
    if isinstance(given, cupy.ndarray):
        return result
    if isinstance(given, np.ndarray):
        return cupy.asnumpy(result)
    namespace = _namespace(given)
    if hasattr(given, "__cuda_ndarray__"):  # Numba's
        return namespace.cuda.as_cuda_array(result)
    if dtype_name(result) == "bfloat16":
        return namespace.from_dlpack(result.view(np.int16)).view(namespace.bfloat16)
    return namespace.from_dlpack(result)


def as_numpy(x: Any) -> np.ndarray:
    """A result on the CPU, as NumPy."""
    return cupy.asnumpy(x)


def _namespace(x: Any) -> Any:
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules[type(x).__module__.partition(".")[0]]
