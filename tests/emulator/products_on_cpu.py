"""Matrix products through cuBLASLt, in NumPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np


def product_plan(rows: int, inner: int, tokens: int, dtype: np.dtype, out_dtype: np.dtype, *_: int) -> Callable[..., None]:
    """What products.product_plan makes, in NumPy: out [tokens, rows] = x [tokens, inner] weight [rows, inner]^T, or added to it."""

    def multiply(weight: int, x: int, out: int, add: bool) -> None:
        left, right = _memory(x, (tokens, inner), dtype), _memory(weight, (rows, inner), dtype)
        result, place = left.astype(np.float32) @ right.astype(np.float32).T, _memory(out, (tokens, rows), out_dtype)
        place[...] = result + place.astype(np.float32) if add else result  # without add the place is not read

    return multiply


def _memory(pointer: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    raw = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype).reshape(shape)
