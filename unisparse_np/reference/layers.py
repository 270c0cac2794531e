"""The model's small change in NumPy: everything of a Llama-like forward pass that is not attention.

One function a layer, formula first. A backend offers a module of this name with these functions; the model calls them and
never asks which backend it has. Activations are float32, or float64 for tests; weights may be held in 16 bits and are
widened where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from .run import in_threads, num_threads

xp = np
memory = None  # the host's: pages are taken as they are touched, so nothing is planned

HELD_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
LARGEST_FINITE_BITS = {HELD_DTYPES["float16"]: 0x7BFF, HELD_DTYPES["bfloat16"]: 0x7F7F}  # without the sign
ROWS_AT_ONCE = 64  # of an elementwise layer, so that its passes stay in the second-level cache
WIDEN_AT_ONCE = 1 << 22  # weights; 16 MB in float32
WIDEN_FLOAT16_AT_ONCE = 1 << 17  # weights; all passes over them stay in the second-level cache
SPLIT_FROM_ROWS = 128  # rows below which a second thread costs more than it saves


def held_dtype(dtype: str, stored: str) -> np.dtype:
    """How weights are held for a dtype name, where the checkpoint's own is stored (F32, F16 or BF16).

    "auto" keeps BF16 and F32 as they are and holds F16 as float32. Processor time of all products of SmolLM2-135M, one
    thread: a decode step 31.2 ms held as float32, 31.3 ms as bfloat16 and 61.6 ms as float16; 1,024 tokens 2.41, 2.41
    and 2.48 s; 589, 324 and 347 MiB after loading. So bfloat16's half of the memory is free (fewer bytes are read, which
    pays for widening), while float16's would double a decode step. The values are the same: widening is exact.
    """
    if dtype == "auto":
        return HELD_DTYPES["bfloat16" if stored == "BF16" else "float32"]
    return HELD_DTYPES[dtype]


def compute_dtype(held: np.dtype) -> np.dtype:
    """The dtype of activations for weights held in this one: float64 for float64, float32 for all others."""
    return HELD_DTYPES["float64" if held == np.float64 else "float32"]


def vector_dtype(held: np.dtype) -> np.dtype:
    """The dtype of norm weights and biases: that of activations."""
    return compute_dtype(held)


def from_host(target: np.ndarray, values: np.ndarray) -> None:
    """Copy values [n, ...] of the same dtype into the backend's array."""
    target[...] = values


def holds_not_finite(x: np.ndarray) -> bool:
    """Whether NaN or infinity is in x: in 16 bits over the bits, four times as fast as NumPy's own."""
    if x.dtype not in LARGEST_FINITE_BITS:
        return not np.isfinite(x).all()
    return bool((x.view(np.uint16) & np.uint16(0x7FFF)).max() > LARGEST_FINITE_BITS[x.dtype])


def embedding(table: np.ndarray, token_ids: list[int], dtype: np.dtype) -> np.ndarray:
    """x[t] = table[token_ids[t]]: table [vocab, hidden], T ids -> [T, hidden] of the given dtype."""
    return table[np.asarray(token_ids)].astype(dtype, copy=False)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x W^T + b: x [T, in], weight [out, in], bias [out] -> [T, out], in x's dtype.

    A 16-bit weight is widened a few rows at a time, so the wide copy never outgrows WIDEN_AT_ONCE.
    """
    out = np.empty((len(x), len(weight)), dtype=x.dtype)
    rows = len(weight) if weight.dtype == x.dtype else max(1, WIDEN_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        wide = weight if weight.dtype == x.dtype else widen(weight[start : start + rows], x.dtype)
        _multiply(x, wide.T, out[:, start : start + rows])
    if bias is not None:
        out += bias
    return out


def norm_linear(x: np.ndarray, norm: np.ndarray, eps: float, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The product behind a norm: x [T, in], norm [in], weight [out, in], bias [out] -> [T, out]."""
    return linear(rms_norm(x, norm, eps, x.dtype), weight, bias)


def norm_linear_swiglu(x: np.ndarray, norm: np.ndarray, eps: float, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The MLP up to its last product: x [T, in], norm [in], weight [2m, in] and bias [2m], gate first -> [T, m]."""
    return swiglu(norm_linear(x, norm, eps, weight, bias))


def add_linear(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    """x += y W^T + b, in place: the residual connection. x [T, out], y [T, in], weight [out, in], bias [out]."""
    x += linear(y, weight, bias)


def add(x: np.ndarray, y: np.ndarray) -> None:
    """x += y, in place: what other ranks have added up. Both [T, hidden]."""
    x += y


def head(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Logits x W^T: x [T, hidden], weight [vocab, hidden] -> [T, vocab] float32, or float64 from float64."""
    return linear(x, weight)


def _multiply(x: np.ndarray, weight: np.ndarray, out: np.ndarray) -> None:
    """out = x @ weight. Many rows are shared out among our own threads: BLAS's would go on spinning for milliseconds after
    the product, on the cores that attention wants next.
    """
    if len(x) < SPLIT_FROM_ROWS:
        np.matmul(x, weight, out=out)
        return
    count = num_threads()
    edges = [len(x) * n // count for n in range(count + 1)]
    in_threads(lambda rows: np.matmul(x[slice(*rows)], weight, out=out[slice(*rows)]), list(pairwise(edges)))


def widen(weight: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A finite [out, in] weight in a wider dtype, exactly.

    float16 to float32 goes over the bits, five times as fast as NumPy's own: exponent and fraction move 13 places, which
    leaves the exponent 112 too small, and a product sets that right, subnormal numbers included.
    """
    if (weight.dtype, dtype) != (np.float16, np.float32):
        return weight.astype(dtype)
    wide = np.empty(weight.shape, dtype=np.float32)
    rows = max(1, WIDEN_FLOAT16_AT_ONCE // weight.shape[1])
    for start in range(0, len(weight), rows):
        values = wide[start : start + rows]
        bits = values.view(np.int32)
        bits[...] = weight[start : start + rows].view(np.int16)  # the sign fills the upper half
        bits <<= 13
        bits &= np.int32(-0x70002000)  # 0x8FFFE000: sign, five bits of exponent, ten of fraction
        values *= np.float32(2.0**112)
    return wide


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, dtype: np.dtype) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis: x [..., n], weight [n] -> a new [..., n].

    dtype is what products are computed in, here x's own; other backends keep x wider than that.
    """
    mean_square = np.einsum("...n,...n->...", x, x)[..., None] / x.dtype.type(x.shape[-1])  # [..., 1]
    out = x * (1 / np.sqrt(mean_square + x.dtype.type(eps)))
    out *= weight
    return out


def rotary_table(inv_freq: np.ndarray, start: int, length: int, factor: float, dtype: np.dtype) -> np.ndarray:
    """factor * exp(i * position * inv_freq) for positions start .. start+length-1: [T, d/2] complex.

    The angle is rounded to float32 in every precision, as transformers does: models were trained with those angles.
    """
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = (positions[:, None] * inv_freq).astype(dtype, copy=False)  # [T, d/2]
    table: np.ndarray = np.empty(angles.shape, dtype=np.result_type(dtype, np.complex64))
    table.real, table.imag = np.cos(angles), np.sin(angles)
    table *= dtype.type(factor)
    return table


def rotate_heads(
    qkv: np.ndarray,
    table: np.ndarray,
    norms: tuple[np.ndarray, np.ndarray, float] | None,
    k_room: np.ndarray,
    v_room: np.ndarray,
    config: Any,
    summary: Any,
) -> tuple[np.ndarray, None]:
    """From one product to attention's inputs: norms of q and k, rotary embedding, keys and values into the cache.

    Args:
        qkv: [T, Hq + 2 Hkv, d], queries first.
        table: as `rotary_table` makes it for these T positions.
        norms: (q_norm [d], k_norm [d], eps) of a model that normalises each head, otherwise None.
        k_room, v_room: [Hkv, T, d] of the cache, written.
        config: the layer's attention; a backend that pools queries here needs it.
        summary: the RunningKeySummary of all keys before these, or None; it takes the new ones in.

    Returns:
        (q [Hq, T, d], None): the queries' composite tokens, which other backends pool on the way, are left to `run_sparse`.
    """
    kv_heads = len(k_room)
    v_start = qkv.shape[1] - kv_heads
    q, k, v = qkv[:, : v_start - kv_heads], qkv[:, v_start - kv_heads : v_start], qkv[:, v_start:]  # [T, H, d]
    if norms is not None:
        q_norm, k_norm, eps = norms
        q, k = rms_norm(q, q_norm, eps, qkv.dtype), rms_norm(k, k_norm, eps, qkv.dtype)
    rotary(k, table, out=k_room)
    v_room[...] = v.transpose(1, 0, 2)
    q_rotated: np.ndarray = np.empty((q.shape[1], len(q), q.shape[2]), dtype=qkv.dtype)
    rotary(q, table, out=q_rotated)
    if summary is not None:
        summary.extend(k_room)
    return q_rotated, None


def rotary(x: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """(a + ib) * table, with a and b the two halves of a head: (a cos - b sin) + i (b cos + a sin), written head by head.

    x [T, H, d], table [T, d/2] as `rotary_table` makes it -> out [H, T, d].
    """
    half = x.shape[-1] // 2

    def some_rows(start: int, stop: int) -> None:
        pairs: np.ndarray = np.empty((x.shape[1], stop - start, half), dtype=table.dtype)  # [H, rows, d/2]
        heads = x[start:stop].transpose(1, 0, 2)
        pairs.real, pairs.imag = heads[..., :half], heads[..., half:]
        pairs *= table[start:stop]
        out[:, start:stop, :half], out[:, start:stop, half:] = pairs.real, pairs.imag

    _by_rows(some_rows, len(x))


def merge_heads(out: np.ndarray) -> np.ndarray:
    """Attention's output [Hq, T, d] as rows [T, Hq d]."""
    return out.transpose(1, 0, 2).reshape(out.shape[1], -1)


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    width = gate_up.shape[1] // 2
    out = np.empty((len(gate_up), width), dtype=gate_up.dtype)

    def some_rows(start: int, stop: int) -> None:
        gate, up, result = gate_up[start:stop, :width], gate_up[start:stop, width:], out[start:stop]
        np.negative(gate, out=result)
        np.exp(result, out=result)  # inf for a gate below -88 gives the right 0
        result += 1
        np.divide(gate, result, out=result)
        result *= up

    _by_rows(some_rows, len(gate_up))
    return out


def get_ready() -> None:
    """What a model's first product would wait for, done in the background while its files are read: nothing here."""


def new_pacer() -> Callable[[], None]:
    """What the model calls after each layer, so that a host never runs far ahead of its device. NumPy has finished by then."""
    return lambda: None


def to_host(x: np.ndarray) -> np.ndarray:
    """A backend's array as NumPy."""
    return x


def _by_rows(work: Callable[[int, int], None], rows: int) -> None:
    """Call work(start, stop) for runs of ROWS_AT_ONCE rows, in threads where there are rows enough."""

    def share(bounds: tuple[int, int]) -> None:
        with np.errstate(over="ignore"):  # set here because NumPy keeps it per thread
            for start in range(*bounds, ROWS_AT_ONCE):
                work(start, min(bounds[1], start + ROWS_AT_ONCE))

    if rows < SPLIT_FROM_ROWS:
        share((0, rows))
        return
    edges = [rows * n // num_threads() for n in range(num_threads() + 1)]
    in_threads(share, list(pairwise(edges)))
