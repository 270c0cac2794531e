"""The fast backend: the four stages as CUDA C++ kernels (cuda/), compiled at first use by CuPy.

The stages have the reference's names and signatures, in float16, bfloat16 and float32. run_sparse fuses what lies between them:
composites as float16 (float32 on the way of plain_stages.py), scores as whole numbers, the mask as bits, and no wait for the host
from q, k, v to the output. NaN and infinite inputs are not looked for (that would be such a wait): what a query may see of them
reaches its output, what it may not does not.
"""

from __future__ import annotations

from typing import Any

import cupy

from ...problem import Problem
from . import layers
from .arrays import as_numpy, from_any, to_kind_of
from .attend import dense_attention, sparse_attention
from .batch import run_batch
from .compress import as_composites, compress, find_anchors
from .decoder import new_decoder
from .device import capability as require_device
from .device import compile_seconds
from .key_summary import RunningKeySummary
from .run import run_dense, run_sparse
from .sampling import new_sampler
from .scores import score_blocks
from .select import select_blocks
from .whole_layer import whole_layer

__all__ = [
    "RunningKeySummary", "as_composites", "as_numpy", "carrier", "check_finite", "compile_seconds", "compress", "dense_attention",
    "find_anchors", "from_any", "layers", "name", "new_decoder", "new_sampler", "require_device", "run_batch", "run_dense", "run_sparse",
    "score_blocks", "select_blocks", "sparse_attention", "take_device", "to_kind_of", "whole_layer", "xp",
]  # fmt: skip

name = "cupy"
xp = cupy


def check_finite(q: Any, k: Any, v: Any, problem: Problem) -> None:
    """Nothing: looking at the values would hold the GPU up (see above)."""


def take_device(rank: int, size: int) -> None:
    """The GPU of this process, one of `size` on its machine (nccl.py, which is loaded only where several processes run)."""
    from . import nccl

    nccl.take_device(rank, size)


def carrier(group: Any) -> Any:
    """A Communicator of CuPy arrays among the ranks of a group."""
    from .nccl import Nccl

    return Nccl(group)
