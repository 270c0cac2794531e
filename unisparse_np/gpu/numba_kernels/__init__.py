"""The four stages as Numba CUDA kernels, written to be followed line by line, on a GPU or in Numba's simulator.

Read compress.py, scores.py, select.py and attend.py beside the reference's files of the same names; tile.py holds the matrix
product that scores.py and attend.py share. Without a GPU, set NUMBA_ENABLE_CUDASIM=1 before Python starts: the kernels
then run as plain Python, and a debugger steps through them thread by thread.

xp is NumPy: the model keeps its weights and its cache on the host, and each attention call carries q, k and v over. These
kernels are for understanding; `cupy` is the backend for speed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import InvalidInput
from ...problem import Problem
from . import availability, layers
from .anchors import find_anchors
from .attend import dense_attention, sparse_attention
from .compress import coarse_composites, compress
from .device import as_numpy, from_any, to_kind_of
from .key_summary import RunningKeySummary
from .run import check_finite, run_dense, run_sparse
from .scores import score_blocks
from .select import select_blocks

__all__ = [
    "RunningKeySummary", "as_composites", "as_numpy", "availability", "check_finite", "coarse_composites", "compress", "dense_attention",
    "find_anchors", "from_any", "layers", "name", "run_dense", "run_sparse", "score_blocks", "select_blocks", "sparse_attention",
    "take_device", "to_kind_of", "xp",
]  # fmt: skip

name = "numba"
xp = np


def as_composites(x: Any, problem: Problem, dtype: Any) -> Any:
    """Composite tokens as step 2 takes them for inputs of this dtype: as they are."""
    return x


def take_device(rank: int, size: int) -> None:
    """Raises InvalidInput: several processes are for speed, which is the other backends' business."""
    raise InvalidInput("the numba backend runs in one process: start it without mpirun, or use --backend cupy or reference")
