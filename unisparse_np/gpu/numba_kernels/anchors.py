"""The anchor keys of step 6 of ALGORITHM.md on a GPU: the r keys of smallest norm in every block.

The same in reference/attend.py (`find_anchors`) and cupy_kernels/attend.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import cuda

from ...problem import ceil_div
from .device import computing, empty, hand_back, launch_over, to_device


def find_anchors(k: Any, block_size: int, key_anchors: int) -> Any:
    """Positions of the keys of smallest Euclidean norm in each block: k [Hkv, Lk, d] -> [Hkv, Nk, r] int32.

    In ascending norm, the lower position first on ties; -1 where a ragged last block has fewer keys than r.
    """
    shape = (k.shape[0], ceil_div(k.shape[1], block_size), key_anchors)
    if key_anchors == 0:
        return hand_back(to_device(np.empty(shape, np.int32)), k)
    keys = computing(k)
    norms = empty((1, *k.shape[:2]), keys.dtype)
    anchors = empty(shape, np.int32)
    launch_over(k.shape[0] * k.shape[1], squared_norms, keys.data, norms.data)
    launch_over(k.shape[0] * k.shape[1], rank_keys, norms.data, block_size, anchors.data)
    return hand_back(anchors, k)


@cuda.jit
def squared_norms(k, norms):
    """norms[0, head, token] = sum over dims of k[head, token, dim]^2; NaN sorts last, as infinity. Thread: a key at a time."""
    length = k.shape[1]
    for item in range(cuda.grid(1), k.shape[0] * length, cuda.gridsize(1)):
        head, token = item // length, item % length
        total = k[head, token, 0] * k[head, token, 0]
        for dim in range(1, k.shape[2]):
            total += k[head, token, dim] * k[head, token, dim]
        norms[0, head, token] = math.inf if math.isnan(total) else total


@cuda.jit
def rank_keys(norms, block_size, anchors):
    """Key n is anchor number `rank` of its block if `rank` keys of the block come before it (as in select.py).

    norms [1, Hkv, Lk] -> anchors [Hkv, Nk, r]. Thread: a key at a time.
    """
    length = norms.shape[2]
    for item in range(cuda.grid(1), norms.size, cuda.gridsize(1)):
        head, n = item // length, item % length
        block = n // block_size
        first, last = block * block_size, min((block + 1) * block_size, length)
        rank = 0
        for m in range(first, last):
            if norms[0, head, m] < norms[0, head, n] or (norms[0, head, m] == norms[0, head, n] and m < n):
                rank += 1
        if rank < anchors.shape[2]:
            anchors[head, block, rank] = n
        if n == first:  # places that a short block cannot fill
            for place in range(last - first, anchors.shape[2]):
                anchors[head, block, place] = -1
