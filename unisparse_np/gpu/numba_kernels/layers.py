"""The model's small change for this backend: plain NumPy on the host, one formula a function.

The kernels of this backend are about attention. A matrix product of a Llama's size would take hours in the simulator and a
tuned library on a GPU, so weights and activations stay on the host, and only q, k and v travel. Functions and their names are
those of the other backends' layers; these hold weights in float32 or float64, whatever the checkpoint stores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

xp = np
memory = None  # the host's: pages are taken as they are touched, so nothing is planned

HELD_DTYPES: dict[str, np.dtype] = {
    "float16": np.dtype(np.float32),
    "bfloat16": np.dtype(np.float32),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def held_dtype(dtype: str, stored: str) -> np.dtype:
    """How weights are held for a dtype name: widened to float32 at once, which changes no value; float64 if asked for."""
    return HELD_DTYPES["float32" if dtype == "auto" else dtype]


def compute_dtype(held: np.dtype) -> np.dtype:
    """The dtype of activations: that of the weights."""
    return held


def vector_dtype(held: np.dtype) -> np.dtype:
    """The dtype of norm weights and biases: that of activations."""
    return held


def from_host(target: np.ndarray, values: np.ndarray) -> None:
    """Copy values [n, ...] of the same dtype into the backend's array."""
    target[...] = values


def holds_not_finite(x: np.ndarray) -> bool:
    """Whether NaN or infinity is in x."""
    return not np.isfinite(x).all()


def embedding(table: np.ndarray, token_ids: list[int], dtype: np.dtype) -> np.ndarray:
    """x[t] = table[token_ids[t]]: table [vocab, hidden], T ids -> [T, hidden]."""
    return table[np.asarray(token_ids)].astype(dtype, copy=False)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x W^T + b: x [T, in], weight [out, in], bias [out] -> [T, out]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def norm_linear(x: np.ndarray, norm: np.ndarray, eps: float, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The product behind a norm: x [T, in], norm [in], weight [out, in], bias [out] -> [T, out]."""
    return linear(rms_norm(x, norm, eps, x.dtype), weight, bias)


def norm_linear_swiglu(x: np.ndarray, norm: np.ndarray, eps: float, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """The MLP up to its last product: x [T, in], norm [in], weight [2m, in] and bias [2m], gate first -> [T, m]."""
    return swiglu(norm_linear(x, norm, eps, weight, bias))


def add_linear(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
    """x += y W^T + b, in place: the residual connection."""
    x += linear(y, weight, bias)


def add(x: np.ndarray, y: np.ndarray) -> None:
    """x += y, in place: what other ranks have added up."""
    x += y


def head(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Logits x W^T: x [T, hidden], weight [vocab, hidden] -> [T, vocab]."""
    return linear(x, weight)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, dtype: np.dtype) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis: x [..., n], weight [n] -> [..., n] of dtype, here x's own."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + x.dtype.type(eps)) * weight


def rotary_table(inv_freq: np.ndarray, start: int, length: int, factor: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """factor * cos and factor * sin of position * inv_freq for positions start .. start+length-1: two [T, d/2].

    The angle is rounded to float32 in every precision, as transformers does: models were trained with those angles.
    """
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = (positions[:, None] * inv_freq).astype(dtype, copy=False)
    return np.cos(angles) * dtype.type(factor), np.sin(angles) * dtype.type(factor)


def rotate_heads(
    qkv: np.ndarray,
    table: tuple[np.ndarray, np.ndarray],
    norms: tuple[np.ndarray, np.ndarray, float] | None,
    k_room: np.ndarray,
    v_room: np.ndarray,
    config: Any,
    summary: Any,
) -> tuple[np.ndarray, None]:
    """From one product to attention's inputs: norms of q and k, rotary embedding, keys and values into the cache.

    qkv [T, Hq + 2 Hkv, d], queries first; norms (q_norm [d], k_norm [d], eps) or None; k_room, v_room [Hkv, T, d] are
    written; summary, the RunningKeySummary of all keys before, takes the new ones in -> (q [Hq, T, d], None): composite
    queries are left to `run_sparse`.
    """
    kv_heads = len(k_room)
    q, k, v = np.split(qkv, [qkv.shape[1] - 2 * kv_heads, qkv.shape[1] - kv_heads], axis=1)  # [T, H, d]
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


def rotary(x: np.ndarray, table: tuple[np.ndarray, np.ndarray], out: np.ndarray) -> None:
    """(a cos - b sin, b cos + a sin), with a and b the two halves of a head: x [T, H, d] -> out [H, T, d]."""
    cos, sin = table
    a, b = np.split(x.transpose(1, 0, 2), 2, axis=-1)  # [H, T, d/2] each
    out[...] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def merge_heads(out: np.ndarray) -> np.ndarray:
    """Attention's output [Hq, T, d] as rows [T, Hq d]."""
    return out.transpose(1, 0, 2).reshape(out.shape[1], -1)


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    gate, up = np.split(gate_up, 2, axis=1)
    with np.errstate(over="ignore"):  # inf for a gate below -88 gives the right 0
        return gate / (1 + np.exp(-gate)) * up


def get_ready() -> None:
    """What a model's first product would wait for, done in the background while its files are read: nothing here."""


def new_pacer() -> Callable[[], None]:
    """What the model calls after each layer: nothing, as every call here has finished when it returns."""
    return lambda: None


def to_host(x: np.ndarray) -> np.ndarray:
    """Already there."""
    return x
