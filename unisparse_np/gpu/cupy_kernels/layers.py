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

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import Problem, ceil_div
from . import gemv, memory
from .device import kernel, source
from .launch import Launcher
from .memory import from_host, holds_not_finite, new_pacer
from .overlap import OverlappingLauncher, address
from .products import get_ready, product
from .shapes import element_strides, uses_tensor_cores

__all__ = [
    "HELD_DTYPES", "add", "add_linear", "compute_dtype", "embedding", "from_host", "get_ready", "head", "held_dtype", "holds_not_finite",
    "linear", "memory", "merge_heads", "new_pacer", "rms_norm", "rotary_table", "rotate_heads", "swiglu", "to_host", "vector_dtype", "xp",
]  # fmt: skip

xp = cupy

HELD_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
}
_STORED = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
ROW_THREADS = 256  # of a thread block that works on rows
ROTARY_WARPS, HEADS_AT_ONCE = 4, 4  # of rotary.cu
NO_POOLING = UniSparseConfig()  # what rotary.cu cuts its work by when nothing is pooled
NULL = np.uint64(0)


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
    x = cupy.empty((len(ids), table.shape[1]), np.float32)
    write_embedding(table, ids, x)
    return x


def write_embedding(table: Any, token_ids: Any, x: Any) -> None:
    """The same into x [T, hidden] float32, from token_ids [T] int32 on the device."""
    _by_rows("embedding", x, table.dtype, (table, token_ids, x))


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """x W^T + b: x [T, in], weight [out, in], bias [out] float32 -> [T, out], all others in the same dtype."""
    out = cupy.empty((len(x), len(weight)), weight.dtype)
    if len(x) == 1:
        gemv.gemv(weight, x, bias, out)
        return out
    if bias is not None:
        _by_rows("fill_rows", out, out.dtype, (bias, out))
    product(x, weight, out, add=bias is not None)
    return out


def add_linear(x: Any, y: Any, weight: Any, bias: Any = None) -> None:
    """x += y W^T + b, in place: the residual connection. x [T, out] float32, y [T, in] and weight [out, in] in one dtype."""
    if len(x) == 1:
        gemv.gemv_add(weight, y, bias, x)
        return
    if bias is not None:
        _by_rows("add_bias", x, weight.dtype, (bias, x))
    product(y, weight, x, add=True)


def add(x: Any, y: Any) -> None:
    """x += y, in place: x [T, n] float32, y [T, n] in any held dtype."""
    _by_rows("add_rows", x, y.dtype, (cupy.ascontiguousarray(y), x))


def head(x: Any, weight: Any) -> Any:
    """Logits x W^T: x [T, hidden], weight [vocab, hidden] -> [T, vocab] float32."""
    logits = cupy.empty((len(x), len(weight)), np.float32)
    if len(x) == 1:
        gemv.gemv_float32(weight, x, logits)
    else:
        product(x, weight, logits, add=False)
    return logits


def rms_norm(x: Any, weight: Any, eps: float, dtype: np.dtype) -> Any:
    """x / sqrt(mean(x^2) + eps) * weight along rows: x [T, n] and weight [n] float32 -> a new [T, n] of dtype."""
    x, width = cupy.ascontiguousarray(x), x.shape[1]
    out = cupy.empty(x.shape, dtype)
    threads = gemv.threads_of(width)
    launcher = _row_launcher("rms_norm", np.dtype(dtype), width, threads, threads // 8, cupy.cuda.runtime.getDevice())
    launcher(len(x), 1, *map(address, (x, weight, float(eps), out)))
    return out


def swiglu(gate_up: Any) -> Any:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    out = cupy.empty((len(gate_up), gate_up.shape[1] // 2), gate_up.dtype)
    _by_rows("swiglu", out, out.dtype, (gate_up, out))
    return out


def merge_heads(out: Any) -> Any:
    """Attention's output [Hq, T, d] as rows [T, Hq d]."""
    heads, tokens, dim = out.shape
    by_token = out.transpose(1, 0, 2)
    if by_token.flags.c_contiguous or dim % 8:
        return by_token.reshape(tokens, heads * dim)
    merged = cupy.empty((tokens, heads * dim), out.dtype)
    _by_rows("merge_heads", merged, out.dtype, (cupy.ascontiguousarray(out), merged, tokens, dim))
    return merged


def rotary_table(inv_freq: Any, start: int, length: int, factor: float, dtype: np.dtype) -> Any:
    """factor * (cos, sin) of position * inv_freq for positions start .. start+length-1: [T, d/2, 2] float32 whatever dtype says.

    The angle is rounded to float32, as transformers does: models were trained with those angles.
    """
    table = cupy.empty((length, len(inv_freq), 2), np.float32)
    write_rotary_table(cupy.asarray(inv_freq, dtype=np.float32), start, None, factor, table)
    return table


def write_rotary_table(inv_freq: Any, start: int, position: Any, factor: float, table: Any) -> None:
    """The same into table; positions count from start, plus position [1] int32 on the device where one is given."""
    length, pairs = table.shape[:2]
    function = _rotary_kernel("rotary_table", 0, 2 * pairs, np.float32, NO_POOLING, ROTARY_WARPS, False)
    arguments = (inv_freq, np.int32(start), NULL if position is None else position, np.int32(length), np.float32(factor), table)
    function((ceil_div(length * pairs, ROW_THREADS),), (ROW_THREADS,), arguments)


def rotate_heads(
    qkv: Any, table: Any, norms: tuple[Any, Any, float] | None, k_room: Any, v_room: Any, config: Any, summary: Any
) -> tuple[Any, Any]:
    """From one product to attention's inputs: norms of q and k, rotary embedding, keys and values into the cache, and pooling.

    Args:
        qkv: [T, Hq + 2 Hkv, d], queries first.
        table: as `rotary_table` makes it for these T positions.
        norms: (q_norm [d], k_norm [d], eps) of a model that normalises each head, otherwise None.
        k_room, v_room: [Hkv, T, d] of the cache, written.
        config: the layer's attention.
        summary: the RunningKeySummary of all keys before these, or None; it takes the new ones in, in the same pass over
            memory where they begin a block.

    Returns:
        q [Hq, T, d], and its composite tokens [Hc, Tq, d] float16 as run_sparse takes them; None for dense attention, and
        where shapes do not run on tensor cores.
    """
    tokens, heads, dim = qkv.shape
    kv_heads = len(k_room)
    q_heads = heads - 2 * kv_heads
    q = cupy.empty((q_heads, tokens, dim), qkv.dtype)
    problem = _pooling_problem(q_heads, kv_heads, tokens, dim, config if isinstance(config, UniSparseConfig) else NO_POOLING)
    pools = isinstance(config, UniSparseConfig) and uses_tensor_cores(problem, qkv.dtype)
    room = summary.room(tokens) if pools and summary is not None else None
    q_composites = cupy.empty((problem.num_composite_heads, problem.num_q_composites, dim), np.float16) if pools else None
    launch_rotation(qkv, table, norms, None, (q, k_room, v_room), problem if pools else None, q_composites, room, summary)
    if room is not None:
        summary.took(k_room)
    elif summary is not None:
        summary.extend(k_room)
    return q, q_composites


@lru_cache(maxsize=256)
def _pooling_problem(q_heads: int, kv_heads: int, tokens: int, dim: int, config: UniSparseConfig) -> Problem:
    """Sizes of a chunk's composites, worked out once for all layers."""
    return Problem(q_heads, kv_heads, tokens, tokens, dim, config)


def launch_rotation(
    qkv: Any, table: Any, norms: Any, position: Any, outputs: tuple[Any, Any, Any], problem: Problem | None, q_composites: Any = None,
    room: Any = None, summary: Any = None, overlap: bool = False,
) -> None:  # fmt: skip
    """The launch of rotary.cu: qkv [T, Hq + 2 Hkv, d] -> outputs (q [Hq, T, d], k and v [Hkv, .., d], written from row position on).

    problem: None to pool nothing. room: places of the keys' composites and anchors, or None. overlap: see `overlap.py`.
    """
    tokens, _, dim = qkv.shape
    q, k, v = outputs
    kv_heads = len(k)
    config = NO_POOLING if problem is None else problem.config
    k_members = 1 if problem is None else problem.kv_heads_per_composite
    q_members = 1 if problem is None else config.head_compress
    several = max(q_members, k_members) > 1
    warps = 1 if tokens == 1 else ROTARY_WARPS
    at_once = heads_at_once(tokens, dim, qkv.dtype, several)
    anchors = None if room is None or config.key_anchors == 0 else room.anchors
    shared = 0 if anchors is None else 4 * at_once * k_members * config.block_size
    function = _rotary_kernel("rotate_heads", shared, dim, qkv.dtype, config, warps, several)
    q_norm, k_norm, eps = (None, None, 0.0) if norms is None else norms
    arguments = (
        qkv, table, q_norm, k_norm, float(eps), tokens, len(q), kv_heads, q_members, k_members, position, q, k, v, *element_strides(k),
        *element_strides(v), q_composites, *((None, np.int64(0)) if room is None else (room.kc, element_strides(room.kc)[0])),
        *((None, np.int64(0)) if anchors is None else (anchors, element_strides(anchors)[0])),
        config.key_anchors, 0 if summary is None else summary.length,
    )  # fmt: skip
    groups = ceil_div(len(q) // q_members, at_once) + 2 * ceil_div(kv_heads // k_members, at_once)
    grid = (groups, ceil_div(tokens, config.block_size))
    launcher = _rotation_launcher(function, 32 * warps, shared, overlap, cupy.cuda.runtime.getDevice())
    launcher(*grid, *map(address, arguments))


@lru_cache(maxsize=256)
def _rotation_launcher(function: Any, threads: int, shared: int, overlap: bool, device: int) -> Launcher:
    return (OverlappingLauncher if overlap else Launcher)(function, source("rotary.cu"), "rotate_heads", threads, shared)


def to_host(x: Any) -> np.ndarray:
    """A backend's array as NumPy: waits for the device."""
    return cupy.asnumpy(x)


def element(dtype: Any) -> dict[str, int]:
    """The defines of elements.cuh for arrays of this dtype."""
    return {"IS_FLOAT16": int(dtype == np.float16), "IS_FLOAT32": int(dtype == np.float32)}


def threads_of_row(width: int) -> int:
    """THREADS of layers.cu for rows of this width, each thread 8 neighbours."""
    return min(ROW_THREADS, ceil_div(width, 256) * 32)


def heads_at_once(tokens: int, dim: int, dtype: Any, several_members: bool) -> int:
    """AT_ONCE of rotary.cu: the heads, or composite heads, of a thread block."""
    return HEADS_AT_ONCE if tokens > 1 and not several_members and dim % 16 == 0 and dtype != np.float32 else 1


def _rotary_kernel(name: str, shared: int, dim: int, dtype: Any, config: UniSparseConfig, warps: int, several_members: bool) -> Any:
    return kernel(
        "rotary.cu", name, shared, **element(dtype), HEAD_DIM=dim, BLOCK_SIZE=config.block_size, Q_COMPRESS=config.q_compress,
        K_COMPRESS=config.k_compress, WARPS=warps, SEVERAL_MEMBERS=int(several_members),
    )  # fmt: skip


def _by_rows(name: str, out: Any, dtype: Any, arguments: tuple[Any, ...]) -> None:
    """Launch a kernel of layers.cu over out [T, n], each thread 8 neighbours of a row."""
    rows, width = out.shape
    threads = threads_of_row(width)
    launcher = _row_launcher(name, np.dtype(dtype), width, threads, 0, cupy.cuda.runtime.getDevice())
    launcher(rows, ceil_div(width, 8 * threads), *map(address, arguments))


@lru_cache(maxsize=256)
def _row_launcher(name: str, dtype: np.dtype, width: int, threads: int, shared: int, device: int) -> Launcher:
    """A kernel of layers.cu for rows of this width, on the current device, which `device` names."""
    function = kernel("layers.cu", name, shared, **element(dtype), WIDTH=width, THREADS=threads)
    return Launcher(function, source("layers.cu"), name, threads, shared)
