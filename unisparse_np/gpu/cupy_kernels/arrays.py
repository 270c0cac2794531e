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
    """The array on the GPU: CuPy's as it is, another library's GPU array without a copy, a CPU array copied."""
    if isinstance(x, cupy.ndarray):
        return x
    if isinstance(x, np.ndarray):
        capability()  # a missing device is one clear sentence
        return cupy.asarray(x)
    if not on_gpu(x):
        raise InvalidInput(
            f"{name} is a CPU array of {type(x).__module__}: give NumPy or GPU arrays to the cupy backend, or use backend='auto'"
        )
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
    if dtype_name(result) == "bfloat16":
        return namespace.from_dlpack(result.view(np.int16)).view(namespace.bfloat16)
    return namespace.from_dlpack(result)


def as_numpy(x: Any) -> np.ndarray:
    """A result on the CPU, as NumPy."""
    return cupy.asnumpy(x)


def _namespace(x: Any) -> Any:
    return x.__array_namespace__() if hasattr(x, "__array_namespace__") else sys.modules[type(x).__module__.partition(".")[0]]
