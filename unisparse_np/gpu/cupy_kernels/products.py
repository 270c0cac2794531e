"""Matrix products of many rows through cuBLASLt, in float16, bfloat16 and float32, all summed in float32."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import weakref
from functools import lru_cache
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ...errors import BackendUnavailable

_FACTORS = np.array([0, 1], np.float32)
_ZERO, _ONE = (_FACTORS.ctypes.data + 4 * n for n in range(2))  # addresses
_TYPES = {np.dtype(np.float32): 0, np.dtype(np.float16): 2, np.dtype(ml_dtypes.bfloat16): 14}  # cudaDataType
COMPUTE_32F = 68  # cublasComputeType_t: float32 proper, never TF32
TRANSPOSE_A = 3  # cublasLtMatmulDescAttributes_t
MOST_WORKSPACE, REDUCTION_SCHEMES, FIRST_ALIGNMENT, NUM_ALIGNMENTS = 1, 3, 5, 4  # cublasLtMatmulPreferenceAttributes_t
SUMS_IN_FLOAT32 = 3  # reduction schemes allowed: in place and in the compute type, not in that of the output
WORKSPACE_BYTES, LARGEST_ALIGNMENT = 32 << 20, 256


class _Heuristic(ctypes.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8), ("workspace_bytes", ctypes.c_size_t), ("status", ctypes.c_int), ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]  # fmt: skip


def product(x: Any, weight: Any, out: Any, *, add: bool) -> None:
    """out = x W^T, or with `add` out += x W^T: x [T, in] and weight [out, in] in one dtype, out [T, out] in that or in float32.

    The compute type is plain float32: TF32 is never used. Nor may cuBLAS add up parts of a sum as 16-bit numbers, which it does
    by default where it splits a long sum (14,336 terms of 2 rows, float16: errors of 5e-4 of the result).
    """
    if not x.flags.c_contiguous:
        x = cupy.ascontiguousarray(x)
    product_at(x.data.ptr, weight.data.ptr, out.data.ptr, x.shape[0], weight.shape, weight.dtype, out.dtype, add)


def product_at(
    x: int, weight: int, out: int, tokens: int, shape: tuple[int, int], dtype: np.dtype, out_dtype: np.dtype, add: bool
) -> None:  # fmt: skip
    """The same from and to addresses. tokens: T; shape (out, in) and dtype of the weight."""
    bits = weight | x | out | LARGEST_ALIGNMENT
    product_plan(*shape, tokens, dtype, out_dtype, bits & -bits, cupy.cuda.runtime.getDevice())(weight, x, out, add)


@lru_cache(maxsize=1024)
def product_plan(rows: int, inner: int, tokens: int, dtype: np.dtype, out_dtype: np.dtype, alignment: int, device: int) -> ProductPlan:
    """The plan of a shape on the current device, which `device` names; all addresses are multiples of `alignment` bytes."""
    return ProductPlan(rows, inner, tokens, _TYPES[dtype], _TYPES[out_dtype], alignment)


class ProductPlan:
    """What cuBLASLt has to be told of one shape, and the algorithm that it recommends: asked for once, not at every product.

    cuBLAS counts columns first: there out^T [out, T] = W [out, in] x^T [in, T], and every matrix here is its own transpose there.
    """

    def __init__(self, rows: int, inner: int, tokens: int, kind: int, out_kind: int, alignment: int) -> None:
        library, self._handle = _library(), _handle(cupy.cuda.runtime.getDevice())
        self._matmul = library.cublasLtMatmul
        self._operation = self._own("MatmulDesc", COMPUTE_32F, _TYPES[np.dtype(np.float32)])
        transposed = ctypes.c_int(1)
        _check(library.cublasLtMatmulDescSetAttribute(self._operation, TRANSPOSE_A, ctypes.byref(transposed), ctypes.c_size_t(4)))
        self._weight, self._x, self._out = (
            self._own("MatrixLayout", t, ctypes.c_uint64(n), ctypes.c_uint64(columns), ctypes.c_int64(n))
            for t, n, columns in ((kind, inner, rows), (kind, inner, tokens), (out_kind, rows, tokens))
        )
        preference = self._own("MatmulPreference")
        wishes = [(MOST_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)), (REDUCTION_SCHEMES, ctypes.c_uint32(SUMS_IN_FLOAT32))]
        wishes += [(FIRST_ALIGNMENT + n, ctypes.c_uint32(alignment)) for n in range(NUM_ALIGNMENTS)]
        for attribute, value in wishes:
            size = ctypes.c_size_t(ctypes.sizeof(value))
            _check(library.cublasLtMatmulPreferenceSetAttribute(preference, attribute, ctypes.byref(value), size))
        self._found, count = _Heuristic(), ctypes.c_int()
        layouts = (self._weight, self._x, self._out, self._out)
        _check(
            library.cublasLtMatmulAlgoGetHeuristic(
                self._handle, self._operation, *layouts, preference, 1, ctypes.byref(self._found), ctypes.byref(count)
            )
        )
        if count.value == 0 or self._found.status:
            raise BackendUnavailable(
                f"cuBLASLt has no way to multiply [{tokens}, {inner}] by [{inner}, {rows}] on this GPU: update CuPy's CUDA libraries, "
                "or use backend='reference'"
            )
        self._algorithm, self._workspace_bytes = ctypes.addressof(self._found), self._found.workspace_bytes

    def _own(self, kind: str, *arguments: Any) -> ctypes.c_void_p:
        """One of cuBLASLt's objects, destroyed together with this plan."""
        library = _library()
        made = _made(getattr(library, f"cublasLt{kind}Create"), *arguments)
        weakref.finalize(self, getattr(library, f"cublasLt{kind}Destroy"), made).atexit = False  # the library may be gone by then
        return made

    def __call__(self, weight: int, x: int, out: int, add: bool) -> None:
        """The product on the current stream, from and to these addresses."""
        size, beta = self._workspace_bytes, _ONE if add else _ZERO
        workspace = cupy.cuda.alloc(size) if size else None
        _check(
            self._matmul(
                self._handle, self._operation, _ONE, weight, self._weight, x, self._x, beta, out, self._out, out, self._out,
                self._algorithm, 0 if workspace is None else workspace.ptr, size, cupy.cuda.get_current_stream().ptr,
            )
        )  # fmt: skip


def _made(create: Any, *arguments: Any) -> ctypes.c_void_p:
    """What one of cuBLASLt's functions makes."""
    made = ctypes.c_void_p()
    _check(create(ctypes.byref(made), *arguments))
    return made


def _check(status: int) -> None:
    if status:
        raise BackendUnavailable(
            f"cuBLASLt failed with status {status}: check nvidia-smi and CuPy's CUDA libraries, or use backend='reference'"
        )


@lru_cache
def _handle(device: int) -> ctypes.c_void_p:
    """cuBLASLt's handle of the current device, which `device` names, for as long as the process lives; any number of threads may use it."""
    return _made(_library().cublasLtCreate)


@lru_cache
def _library() -> Any:
    """The cuBLASLt that CuPy's cuBLAS has loaded, looked up at the first product: attention alone needs none."""
    try:
        version = cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())
        library = ctypes.CDLL(f"libcublasLt.so.{version // 10000}")
    except (ImportError, OSError) as error:
        raise BackendUnavailable(
            f"CuPy does not find cuBLAS, which a model's products need ({error}): "
            "pip install 'unisparse-np[gpu]', or use backend='reference'"
        ) from error
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.cublasLtMatmul.argtypes = [pointer] * 14 + [size, pointer]
    library.cublasLtMatmul.restype = ctypes.c_int
    return library


def get_ready() -> None:
    """Have cuBLAS load in the background what the first product would wait for, 0.3 s: reading a model's files takes as long."""
    threading.Thread(target=_first_product, args=(cupy.cuda.runtime.getDevice(),)).start()


def _first_product(device: int) -> None:
    with contextlib.suppress(Exception), cupy.cuda.Device(device):  # what fails here fails again, and is heard, where it is needed
        x, out = cupy.empty((64, 64), np.float16), cupy.empty((64, 64), np.float16)
        product(x, x, out, add=False)
