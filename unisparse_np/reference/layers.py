"""The model's small change in NumPy: everything of a Llama-like forward pass that is not attention.

One function a layer, formula first. A backend offers a module of this name with these functions; the model calls them and
never asks which backend it has. Activations are float32, or float64 for tests; weights may be held in 16 bits and are
widened where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import ml_dtypes
import numpy as np

from .run import in_threads, num_threads

xp = np

HELD_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
ROWS_AT_ONCE = 32  # of an elementwise layer, so that all its passes stay in the second-level cache
WIDEN_AT_ONCE = 1 << 22  # weights; 16 MB in float32
SPLIT_FROM_ROWS = 128  # rows below which a second thread costs more than it saves


def held_dtype(dtype: str, stored: str, num_weights: int) -> np.dtype:
    """How weights are held for a dtype name; "auto" is float32.

    stored is the checkpoint's own dtype (F32, F16, BF16), num_weights how many numbers it holds.
    """
    return HELD_DTYPES["float32" if dtype == "auto" else dtype]


def compute_dtype(held: np.dtype) -> np.dtype:
    """The dtype of activations for weights held in this one: float64 for float64, float32 for all others."""
    return HELD_DTYPES["float64" if held == np.float64 else "float32"]


def embedding(table: np.ndarray, token_ids: list[int], dtype: np.dtype) -> np.ndarray:
    """x[t] = table[token_ids[t]]: table [vocab, hidden], T ids -> [T, hidden] of the given dtype."""
    return table[np.asarray(token_ids)].astype(dtype, copy=False)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x W^T + b: x [T, in], weight [out, in], bias [out] -> [T, out], in x's dtype.

    A 16-bit weight is widened a few rows at a time, so the wide copy never outgrows WIDEN_AT_ONCE.
    """
    if weight.dtype == x.dtype:
        out = x @ weight.T  # [T, out]
    else:
        out = np.empty((len(x), len(weight)), dtype=x.dtype)
        rows = max(1, WIDEN_AT_ONCE // weight.shape[1])
        for start in range(0, len(weight), rows):
            np.matmul(x, weight[start : start + rows].astype(x.dtype).T, out=out[:, start : start + rows])
    if bias is not None:
        out += bias
    return out


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis: x [..., n], weight [n] -> a new [..., n]."""
    mean_square = np.einsum("...n,...n->...", x, x)[..., None] / x.dtype.type(x.shape[-1])  # [..., 1]
    out = x * (1 / np.sqrt(mean_square + x.dtype.type(eps)))
    out *= weight
    return out


def rotary_tables(inv_freq: np.ndarray, start: int, length: int, factor: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of position * inv_freq, times factor, for positions start .. start+length-1: two arrays [T, d/2].

    The angle is rounded to float32 in every precision, as transformers does: models were trained with those angles.
    """
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = (positions[:, None] * inv_freq).astype(dtype, copy=False)  # [T, d/2]
    return np.cos(angles) * dtype.type(factor), np.sin(angles) * dtype.type(factor)


def rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, out: np.ndarray) -> None:
    """(a, b) -> (a cos - b sin, b cos + a sin), a and b the two halves of a head, written head by head.

    x [T, H, d], cos and sin [T, d/2] -> out [H, T, d].
    """
    half = x.shape[-1] // 2
    a, b = (part.transpose(1, 0, 2) for part in (x[..., :half], x[..., half:]))  # [H, T, d/2]
    np.multiply(a, cos, out=out[..., :half])
    out[..., :half] -= b * sin
    np.multiply(b, cos, out=out[..., half:])
    out[..., half:] += a * sin


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    width = gate_up.shape[1] // 2
    out = np.empty((len(gate_up), width), dtype=gate_up.dtype)

    def some_rows(start: int, stop: int) -> None:
        gate, up, result = gate_up[start:stop, :width], gate_up[start:stop, width:], out[start:stop]
        np.negative(gate, out=result)
        np.exp(result, out=result)
        result += 1
        np.divide(gate, result, out=result)
        result *= up

    with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right 0
        _by_rows(some_rows, len(gate_up))
    return out


def add(x: np.ndarray, y: np.ndarray) -> None:
    """x += y, in place: the residual connection."""
    x += y


def to_host(x: np.ndarray) -> np.ndarray:
    """A backend's array as NumPy."""
    return x


def _by_rows(work: Callable[[int, int], None], rows: int) -> None:
    """Call work(start, stop) for runs of ROWS_AT_ONCE rows, in threads where there are rows enough."""

    def share(bounds: tuple[int, int]) -> None:
        with np.errstate(over="ignore"):  # NumPy keeps this setting per thread
            for start in range(*bounds, ROWS_AT_ONCE):
                work(start, min(bounds[1], start + ROWS_AT_ONCE))

    if rows < SPLIT_FROM_ROWS:
        share((0, rows))
        return
    edges = [rows * n // num_threads() for n in range(num_threads() + 1)]
    in_threads(share, list(pairwise(edges)))
