"""The model's small change for this backend: plain NumPy on the host, one formula a function.

The kernels of this backend are about attention. A matrix product of a Llama's size would take hours in the simulator and a
tuned library on a GPU, so weights and activations stay on the host, and only q, k and v travel. Functions and their names are
those of the other backends' layers; these hold weights in float32 or float64, whatever the checkpoint stores.
"""

from __future__ import annotations

import numpy as np

xp = np

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


def embedding(table: np.ndarray, token_ids: list[int], dtype: np.dtype) -> np.ndarray:
    """x[t] = table[token_ids[t]]: table [vocab, hidden], T ids -> [T, hidden]."""
    return table[np.asarray(token_ids)].astype(dtype, copy=False)


def linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    """x W^T + b: x [T, in], weight [out, in], bias [out] -> [T, out]."""
    out = x @ weight.T
    return out if bias is None else out + bias


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along the last axis: x [..., n], weight [n] -> [..., n]."""
    mean_square = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + x.dtype.type(eps)) * weight


def rotary_table(inv_freq: np.ndarray, start: int, length: int, factor: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """factor * cos and factor * sin of position * inv_freq for positions start .. start+length-1: two [T, d/2].

    The angle is rounded to float32 in every precision, as transformers does: models were trained with those angles.
    """
    positions = np.arange(start, start + length, dtype=np.float32)
    angles = (positions[:, None] * inv_freq).astype(dtype, copy=False)
    return np.cos(angles) * dtype.type(factor), np.sin(angles) * dtype.type(factor)


def rotary(x: np.ndarray, table: tuple[np.ndarray, np.ndarray], out: np.ndarray) -> None:
    """(a cos - b sin, b cos + a sin), with a and b the two halves of a head: x [T, H, d] -> out [H, T, d]."""
    cos, sin = table
    a, b = np.split(x.transpose(1, 0, 2), 2, axis=-1)  # [H, T, d/2] each
    out[...] = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def swiglu(gate_up: np.ndarray) -> np.ndarray:
    """silu(gate) * up = gate / (1 + exp(-gate)) * up: gate_up [T, 2m], gate first -> [T, m]."""
    gate, up = np.split(gate_up, 2, axis=1)
    with np.errstate(over="ignore"):  # inf for a gate below -88 gives the right 0
        return gate / (1 + np.exp(-gate)) * up


def add(x: np.ndarray, y: np.ndarray) -> None:
    """x += y, in place: the residual connection."""
    x += y


def to_host(x: np.ndarray) -> np.ndarray:
    """Already there."""
    return x
