"""The NumPy reference: UniSparse spelled out, and the truth that every other backend is tested against.

Read compress.py, scores.py, select.py and attend.py in this order; they are the whole algorithm. run.py calls them in
threads, key_summary.py keeps the composite keys and anchors of a growing cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import like, to_numpy
from ..errors import InvalidInput
from ..problem import Problem
from . import attend, layers, run, select
from .attend import dense_attention, find_anchors, sparse_attention
from .compress import coarse_composites, compress
from .key_summary import RunningKeySummary
from .run import run_dense, run_sparse
from .scores import score_blocks
from .select import select_blocks

__all__ = [
    "RunningKeySummary", "as_composites", "as_numpy", "attend", "check_finite", "coarse_composites", "compress", "dense_attention",
    "find_anchors", "from_any", "layers", "name", "run", "run_dense", "run_sparse", "score_blocks", "select", "select_blocks",
    "sparse_attention", "to_kind_of", "xp",
]  # fmt: skip

name = "reference"
xp = np


def from_any(name: str, x: Any) -> np.ndarray:
    """An array of any library on the CPU as NumPy, without a copy."""
    return to_numpy(name, x)


def to_kind_of(result: np.ndarray, given: Any) -> Any:
    """A result as an array of the caller's library."""
    return like(result, given)


def as_composites(x: Any, problem: Problem, dtype: Any) -> Any:
    """Composite tokens as step 2 takes them for inputs of this dtype: as they are."""
    return x


def check_finite(q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem) -> None:
    """Raises InvalidInput when a number that would be read is NaN or infinite.

    Under causality selection reads keys up to the end of the composite key that holds the last query's position, and
    attention reads values up to that position; what lies behind may hold anything.
    """
    last_block = problem.num_q_blocks - 1
    for label, x in (("q", q), ("k", k[:, : problem.keys_read]), ("v", v[:, : problem.visible_keys(last_block)])):
        if not np.isfinite(x).all():
            head, token, dim = (int(axis[0]) for axis in np.nonzero(~np.isfinite(x)))
            raise InvalidInput(f"{label} holds {x[head, token, dim]} at [{head}, {token}, {dim}]: attention needs finite numbers")


def as_numpy(x: np.ndarray) -> np.ndarray:
    """The backend's array as NumPy."""
    return x
