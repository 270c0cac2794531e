"""Spearman's rank correlation: do two lists put the same things first?"""

from __future__ import annotations

import numpy as np


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of the ranks of a [n] and b [n], from -1 to 1; NaN where either is constant or n < 2."""
    x, y = ranks(a), ranks(b)
    x, y = x - x.mean(), y - y.mean()
    spread = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / spread) if spread > 0 else float("nan")


def ranks(values: np.ndarray) -> np.ndarray:
    """Rank of each value [n] from 1, the smallest first; ties share the mean of their places."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)  # the last place of each group of equals
    return (last - (sizes - 1) / 2.0)[group.reshape(-1)]
