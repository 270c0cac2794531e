"""The precision rule of the reference: compute in what is given, 16-bit input in float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np

SIXTEEN_BIT = (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def widen(x: np.ndarray) -> np.ndarray:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return x.astype(np.float32) if x.dtype in SIXTEEN_BIT else x
