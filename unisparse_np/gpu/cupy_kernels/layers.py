"""The model's small change on the GPU: everything of a Llama-like forward pass that is not attention.

Products go through cuBLAS with float32 sums (never TF32), and through our own kernels for a single token (cuda/gemv.cu); what lies
between them is fused so that each number is read and written once (cuda/layers.cu, cuda/rotary.cu). The residual stream is
float32 in every precision, because real models reach 24,700 in it; what goes into products, q, k, v and the cache are held as
the weights are; norm weights and biases are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from ...errors import InvalidInput
from ...problem import ceil_div
from . import gemv, memory
from .device import kernel, source
from .launch import Launcher
from .memory import from_host, holds_not_finite, new_pacer
from .products import get_ready, product, product_at
from .program import Launch
from .room import FLOAT32, Layout, allocate, new
from .rotation import element, rotary_table, rotate_heads

__all__ = [
    "HELD_DTYPES", "add", "add_linear", "compute_dtype", "embedding", "from_host", "get_ready", "head", "held_dtype", "holds_not_finite",
    "linear", "memory", "merge_heads", "new_pacer", "norm_linear", "norm_linear_swiglu", "rms_norm", "rotary_table", "rotate_heads",
    "swiglu", "to_host", "vector_dtype", "xp",
]  # fmt: skip

xp = cupy

HELD_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
ROW_THREADS = 256  # of a thread block that works on rows


def held_dtype(dtype: str, stored: str) -> np.dtype:
    """How weights are held for a dtype name: "auto" as the checkpoint stores them (F32, F16 or BF16). Raises InvalidInput for float64."""
    if dtype == "float64":
        raise InvalidInput("dtype='float64': the cupy backend holds weights as float16, bfloat16 or float32; use backend='reference'")
    return HELD_DTYPES[_STORED[stored] if dtype == "auto" else dtype]


def compute_dtype(held: np.dtype) -> np.dtype:
    """The dtype of products, q, k, v and the cache: that of the weights. The residual stream is float32 all the same."""
    return held


def vector_dtype(held: np.dtype) -> np.dtype:
    """How norm weights and biases are held: float32."""
    return HELD_DTYPES["float32"]


def embedding(table: Any, token_ids: Sequence[int] | Any, dtype: np.dtype) -> Any:
    """x[t] = table[token_ids[t]]: table [vocab, hidden], T ids -> the residual stream [T, hidden], float32 whatever dtype says."""
    ids = token_ids if isinstance(token_ids, cupy.ndarray) else cupy.asarray(np.asarray(token_ids, dtype=np.int32))
    x = new((len(ids), table.shape[1]), FLOAT32)
    write_embedding(table, ids, x)
    return x


def write_embedding(table: Any, token_ids: Any, x: Any) -> None:
    """The same into x [T, hidden] float32, from token_ids [T] int32 on the device."""
    _by_rows("embedding", *x.shape, table.dtype, table.data.ptr, token_ids.data.ptr, x.data.ptr)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b: x [T, in], weight [out, in], bias [out] float32 -> [T, out], all others in the same dtype."""
    out = new((x.shape[0], weight.shape[0]), weight.dtype)
    if x.shape[0] == 1:
        gemv.gemv(weight, x, bias, out)
        return out
    if bias is not None:
        _by_rows("fill_rows", *out.shape, out.dtype, bias.data.ptr, out.data.ptr)
    product(x, weight, out, add=bias is not None)
    return out


def norm_linear(x: Any, norm: Any, eps: float, weight: Any, bias: Any = None) -> Any:
    """linear(rms_norm(x)) with one look at the shapes: x [T, in] and norm [in] float32, weight [out, in], bias [out] -> [T, out]."""
    if x.shape[0] == 1:
        return linear(rms_norm(x, norm, eps, weight.dtype), weight, bias)
    normed = allocate(x.shape[0] * weight.shape[1] * weight.dtype.itemsize)
    out = new((x.shape[0], weight.shape[0]), weight.dtype)
    norm_linear_at(contiguous(x), norm, eps, weight, bias, normed.ptr, out.data.ptr)
    return out


def norm_linear_swiglu(x: Any, norm: Any, eps: float, weight: Any, bias: Any = None) -> Any:
    """The same with swiglu behind it: weight [2m, in], gate first -> [T, m]."""
    if x.shape[0] == 1:
        return swiglu(linear(rms_norm(x, norm, eps, weight.dtype), weight, bias))
    rows, width, dtype = x.shape[0], weight.shape[0], weight.dtype
    layout = mlp_layout(rows, *weight.shape, dtype.itemsize)
    memory = allocate(layout.offsets["gated"])
    out = new((rows, width // 2), dtype)
    norm_linear_swiglu_at(contiguous(x), norm, eps, weight, bias, layout.addresses(memory.ptr) | {"gated": out.data.ptr})
    return out


@lru_cache(maxsize=256)
def mlp_layout(rows: int, width: int, inner: int, itemsize: int) -> Layout:
    """Memory between the two products of an MLP: what a norm gives, gate and up side by side (width), and their product."""
    return Layout(normed=rows * inner * itemsize, gate_up=rows * width * itemsize, gated=rows * width // 2 * itemsize)


def norm_linear_at(x: Any, norm: Any, eps: float, weight: Any, bias: Any, normed: int, out: int) -> None:
    """norm_linear of contiguous x to the address out, by way of room for [T, in] at another."""
    rows, shape, dtype = x.shape[0], weight.shape, weight.dtype
    _norm_rows(rows, shape[1], dtype, x.data.ptr, norm.data.ptr, eps, normed)
    if bias is not None:
        _by_rows("fill_rows", rows, shape[0], dtype, bias.data.ptr, out)
    product_at(normed, weight.data.ptr, out, rows, shape, dtype, dtype, bias is not None)


def norm_linear_swiglu_at(x: Any, norm: Any, eps: float, weight: Any, bias: Any, room: dict[str, int]) -> None:
    """norm_linear_swiglu of contiguous x to the addresses of an mlp_layout."""
    norm_linear_at(x, norm, eps, weight, bias, room["normed"], room["gate_up"])
    _by_rows("swiglu", x.shape[0], weight.shape[0] // 2, weight.dtype, room["gate_up"], room["gated"])


def add_linear(x: Any, y: Any, weight: Any, bias: Any = None) -> None:
    """x += y W^T + b, in place: the residual connection. x [T, out] float32, y [T, in] and weight [out, in] in one dtype."""
    if x.shape[0] == 1:
        gemv.gemv_add(weight, y, bias, x)
        return
    add_linear_at(x, contiguous(y).data.ptr, weight, bias)


def add_linear_at(x: Any, y: int, weight: Any, bias: Any) -> None:
    """add_linear of many rows, y contiguous at an address."""
    if bias is not None:
        _by_rows("add_bias", *x.shape, weight.dtype, bias.data.ptr, x.data.ptr)
    product_at(y, weight.data.ptr, x.data.ptr, x.shape[0], weight.shape, weight.dtype, x.dtype, True)


def add(x: Any, y: Any) -> None:
    """x += y, in place: x [T, n] float32, y [T, n] in any held dtype."""
    y = contiguous(y)
    _by_rows("add_rows", *x.shape, y.dtype, y.data.ptr, x.data.ptr)


def head(x: Any, weight: Any) -> Any:
    """Logits x W^T: x [T, hidden], weight [vocab, hidden] -> [T, vocab] float32."""
    logits = new((x.shape[0], weight.shape[0]), FLOAT32)
    if x.shape[0] == 1:
        gemv.gemv_float32(weight, x, logits)
    else:
        product(x, weight, logits, add=False)
    return logits


def rms_norm(x: Any, weight: Any, eps: float, dtype: np.dtype) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight along rows: x [T, n] and weight [n] float32 -> a new [T, n] of dtype."""
    x, (rows, width) = contiguous(x), x.shape
    out = new((rows, width), np.dtype(dtype))
    _norm_rows(rows, width, out.dtype, x.data.ptr, weight.data.ptr, eps, out.data.ptr)
    return out


def swiglu(gate_up: Any) -> Any:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    rows, width = gate_up.shape
    out = new((rows, width // 2), gate_up.dtype)
    _by_rows("swiglu", *out.shape, out.dtype, gate_up.data.ptr, out.data.ptr)
    return out


def merge_heads(out: Any) -> Any:
    """Attention's output [Hq, T, d] as rows [T, Hq d]."""
    heads, tokens, dim = out.shape
    if heads == 1 or tokens == 1 or dim % 8:
        return out.transpose(1, 0, 2).reshape(tokens, heads * dim)
    out, merged = contiguous(out), new((tokens, heads * dim), out.dtype)
    _by_rows("merge_heads", tokens, heads * dim, out.dtype, out.data.ptr, merged.data.ptr, tokens, dim)
    return merged


def to_host(x: Any) -> np.ndarray:
    """A backend's array as NumPy: waits for the device."""
    return cupy.asnumpy(x)


def contiguous(x: Any) -> Any:
    """x itself where it is C-contiguous, otherwise a copy: CuPy's own function asks for 3 us more."""
    return x if x.flags.c_contiguous else cupy.ascontiguousarray(x)


def threads_of_row(width: int) -> int:
    """THREADS of layers.cu for rows of this width, each thread 8 neighbours."""
    return min(ROW_THREADS, ceil_div(width, 256) * 32)


def _by_rows(name: str, rows: int, width: int, dtype: np.dtype, *arguments: Any) -> None:
    """Launch a kernel of layers.cu over rows x width numbers, each thread 8 neighbours of a row."""
    launcher, columns = _row_launcher(name, dtype, width, cupy.cuda.runtime.getDevice())
    launcher(rows, columns, *arguments)


@lru_cache(maxsize=256)
def _row_launcher(name: str, dtype: np.dtype, width: int, device: int) -> tuple[Launcher, int]:
    """A kernel of layers.cu for rows of this width, on the current device, which `device` names; and thread blocks a row."""
    threads = threads_of_row(width)
    return _launcher(name, dtype, width, threads, 0), ceil_div(width, 8 * threads)


def merging(out: int, merged: int, heads: int, tokens: int, dim: int, dtype: np.dtype) -> Launch:
    """merge_heads from and to addresses, to be recorded."""
    launcher, columns = _row_launcher("merge_heads", dtype, heads * dim, cupy.cuda.runtime.getDevice())
    return Launch(launcher, tokens, columns, (out, merged, tokens, dim))


def _norm_rows(rows: int, width: int, dtype: np.dtype, x: int, weight: int, eps: float, out: int) -> None:
    """rms_norm from and to addresses."""
    _norm_launcher(dtype, width, cupy.cuda.runtime.getDevice())(rows, 1, x, weight, float(eps), out)


@lru_cache(maxsize=256)
def _norm_launcher(dtype: np.dtype, width: int, device: int) -> Launcher:
    """A thread block works on a whole row."""
    threads = gemv.threads_of(width)
    return _launcher("rms_norm", dtype, width, threads, threads // 8)


def _launcher(name: str, dtype: np.dtype, width: int, threads: int, shared: int) -> Launcher:
    function = kernel("layers.cu", name, shared, **element(dtype), WIDTH=width, THREADS=threads)
    return Launcher(function, source("layers.cu"), name, threads, shared)
