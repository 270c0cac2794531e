"""Arrays of any library in, arrays of the same library out, over DLPack."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InvalidInput

SUPPORTED_DTYPES = ("float16", "bfloat16", "float32", "float64")
DEVICE_CPU, DEVICE_CUDA, DEVICE_CUDA_MANAGED = 1, 2, 13  # DLDeviceType of the DLPack standard


def on_gpu(x: Any) -> bool:
    """Whether the array's memory is a CUDA device's."""
    if isinstance(x, np.ndarray):
        return False
    if not hasattr(x, "__dlpack_device__"):  # Numba's arrays: CUDA's own protocol alone
        return hasattr(x, "__cuda_array_interface__")
    return int(x.__dlpack_device__()[0]) in (DEVICE_CUDA, DEVICE_CUDA_MANAGED)


def dtype_name(x: Any) -> str:
    """ "float32" for NumPy's, CuPy's, PyTorch's and JAX's float32 alike."""
    return name_of_dtype(x.dtype)


@lru_cache(maxsize=256)
def name_of_dtype(dtype: Any) -> str:
    """The same of a dtype."""
    return str(getattr(dtype, "name", dtype)).removeprefix("torch.")


def check_array(name: str, x: Any) -> None:
    """Raises InvalidInput unless x is an array of a supported dtype that can be read over DLPack or CUDA's array interface."""
    kind: Any = type(x)
    if not _is_array(kind) and not hasattr(x, "__cuda_array_interface__"):
        raise InvalidInput(f"{name} is a {type(x).__name__}, not an array: give a NumPy or CuPy array, or any other with DLPack")
    if dtype_name(x) not in SUPPORTED_DTYPES:
        raise InvalidInput(f"{name} has dtype {dtype_name(x)}: give one of {', '.join(SUPPORTED_DTYPES)}")


@lru_cache(maxsize=256)
def _is_array(kind: type) -> bool:
    """Whether this is NumPy's array type, or one that speaks DLPack."""
    return issubclass(kind, np.ndarray) or (hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"))


def to_numpy(name: str, x: Any) -> np.ndarray:
    """The array's memory as NumPy, without a copy."""
    if isinstance(x, np.ndarray):
        return x
    if on_gpu(x):
        raise InvalidInput(f"{name} lives on a GPU and the reference backend on the CPU: use backend='auto', or copy it to the host first")
    if getattr(x, "requires_grad", False):
        raise InvalidInput(f"{name} requires a gradient, which this attention does not compute: detach it first")
    try:
        if dtype_name(x) == "bfloat16":  # DLPack's bfloat16 is unknown to NumPy; the same bits as uint16 are not
            return np.from_dlpack(x.view(_namespace(x).uint16)).view(ml_dtypes.bfloat16)
        return np.from_dlpack(x)
    except (BufferError, RuntimeError) as error:
        raise InvalidInput(f"{name} cannot be read over DLPack ({error}): give a plain array of the CPU") from error


def like(result: np.ndarray, given: Any) -> Any:
    """A NumPy result as an array of the given one's library, without a copy."""
    if isinstance(given, np.ndarray):
        return result
    namespace = _namespace(given)
    if result.dtype == ml_dtypes.bfloat16:
        return namespace.from_dlpack(result.view(np.uint16)).view(namespace.bfloat16)
    return namespace.from_dlpack(result)


def _namespace(x: Any) -> Any:
    """The array library x belongs to: what the array API standard names, or the package that defines its type."""
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    return sys.modules[type(x).__module__.partition(".")[0]]
