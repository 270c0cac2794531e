"""Matrix products of many rows through cuBLAS, in float16, bfloat16 and float32, all summed in float32."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

import cupy
import numpy as np

_ONE, _ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)
_TYPES = {"float32": "CUDA_R_32F", "float16": "CUDA_R_16F", "bfloat16": "CUDA_R_16BF"}


def product(x: Any, weight: Any, out: Any, *, add: bool) -> None:
    """out = x W^T, or with `add` out += x W^T: x [T, in] and weight [out, in] in one dtype, out [T, out] in that or in float32.

    cuBLAS counts columns first: there out^T [out, T] = W [out, in] x^T [in, T], and every matrix here is its own transpose there.
    The compute type is plain float32: TF32 is never used.
    """
    x = cupy.ascontiguousarray(x)
    tokens, inner = x.shape
    rows = len(weight)
    cublas, kind = cupy.cuda.cublas, _type(weight.dtype)
    beta = _ONE if add else _ZERO
    cublas.gemmEx(
        cupy.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, rows, tokens, inner, _ONE.ctypes.data,
        weight.data.ptr, kind, inner, x.data.ptr, kind, inner, beta.ctypes.data, out.data.ptr, _type(out.dtype), rows,
        cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


def get_ready() -> None:
    """Have cuBLAS load in the background what the first product would wait for, 0.3 s: reading a model's files takes as long."""
    threading.Thread(target=_first_product, args=(cupy.cuda.runtime.getDevice(),)).start()


def _first_product(device: int) -> None:
    with contextlib.suppress(Exception), cupy.cuda.Device(device):  # what fails here fails again, and is heard, where it is needed
        x, out = cupy.empty((64, 64), np.float16), cupy.empty((64, 64), np.float16)
        product(x, x, out, add=False)


def _type(dtype: Any) -> int:
    return getattr(cupy.cuda.runtime, _TYPES[dtype.name])
