"""Matrix products of many rows through cuBLAS, in float16, bfloat16 and float32, all summed in float32."""

from __future__ import annotations

import contextlib
import threading
from functools import lru_cache
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ...errors import BackendUnavailable

_FACTORS = np.array([0, 1], np.float32)
_ZERO, _ONE = (_FACTORS.ctypes.data + 4 * n for n in range(2))  # addresses
_SUMS_IN_FLOAT32 = 16  # CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION, which CuPy does not name
_RUNTIME = cupy.cuda.runtime
_TYPES = {
    np.dtype(np.float32): _RUNTIME.CUDA_R_32F,
    np.dtype(np.float16): _RUNTIME.CUDA_R_16F,
    np.dtype(ml_dtypes.bfloat16): _RUNTIME.CUDA_R_16BF,
}


def product(x: Any, weight: Any, out: Any, *, add: bool) -> None:
    """out = x W^T, or with `add` out += x W^T: x [T, in] and weight [out, in] in one dtype, out [T, out] in that or in float32.

    cuBLAS counts columns first: there out^T [out, T] = W [out, in] x^T [in, T], and every matrix here is its own transpose there.
    The compute type is plain float32: TF32 is never used. Nor may cuBLAS add up parts of a sum as 16-bit numbers, which it does
    by default where it splits a long sum (14,336 terms of 2 rows, float16: errors of 5e-4 of the result).
    """
    if not x.flags.c_contiguous:
        x = cupy.ascontiguousarray(x)
    tokens, inner = x.shape
    rows, kind = weight.shape[0], _TYPES[weight.dtype]
    cublas, handle = _cublas(), cupy.cuda.device.get_cublas_handle()
    mode = cublas.getMathMode(handle)  # the handle is all of CuPy's: left as it was
    cublas.setMathMode(handle, _SUMS_IN_FLOAT32)
    try:
        cublas.gemmEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, rows, tokens, inner, _ONE,
            weight.data.ptr, kind, inner, x.data.ptr, kind, inner, _ONE if add else _ZERO, out.data.ptr, _TYPES[out.dtype], rows,
            cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
        )  # fmt: skip
    finally:
        cublas.setMathMode(handle, mode)


@lru_cache
def _cublas() -> Any:
    """CuPy's cuBLAS, looked up at the first product: attention alone needs none."""
    try:
        return cupy.cuda.cublas
    except ImportError as error:
        raise BackendUnavailable(
            f"CuPy does not find cuBLAS, which a model's products need ({error}): "
            "pip install 'unisparse-np[gpu]', or use backend='reference'"
        ) from error


def get_ready() -> None:
    """Have cuBLAS load in the background what the first product would wait for, 0.3 s: reading a model's files takes as long."""
    threading.Thread(target=_first_product, args=(cupy.cuda.runtime.getDevice(),)).start()


def _first_product(device: int) -> None:
    with contextlib.suppress(Exception), cupy.cuda.Device(device):  # what fails here fails again, and is heard, where it is needed
        x, out = cupy.empty((64, 64), np.float16), cupy.empty((64, 64), np.float16)
        product(x, x, out, add=False)
