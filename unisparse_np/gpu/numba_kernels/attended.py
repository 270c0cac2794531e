"""Which keys a query block attends to, as two short lists: kept blocks, and anchor keys of the blocks that are not kept.

The attention kernel numbers the attended keys 0, 1, 2, ... and takes them in tiles: first the tokens of the kept blocks, then
the anchors. A tile is therefore full whatever block_size is, and the kernel never looks at a block that is not kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from ...problem import Problem
from .device import DeviceArray, launch_over
from .shapes import shapes_of


class Attended(NamedTuple):
    """blocks [Hq, Nq, Nk]: kept blocks, ascending; anchors [Hq, Nq, Nk * r]: positions; counts [Hq, Nq, 2]: of either list."""

    blocks: Any
    anchors: Any
    counts: Any


def list_attended(mask: DeviceArray, anchors: DeviceArray, problem: Problem) -> Attended:
    """mask [Hq, Nq, Nk] bool, anchors [Hkv, Nk, r] -> the lists of every query head and query block, on the device."""
    heads, q_blocks, k_blocks = mask.shape
    key_anchors = anchors.shape[2]
    attended = Attended(
        cuda.device_array((heads, q_blocks, k_blocks), np.int32),
        cuda.device_array((heads, q_blocks, max(1, k_blocks * key_anchors)), np.int32),
        cuda.device_array((heads, q_blocks, 2), np.int32),
    )
    readable_anchors = anchors.data if key_anchors else attended.counts[:1]  # no anchors: any array, never read
    visible = shapes_of(problem).visible_blocks
    launch_over(heads * q_blocks, fill_lists, mask.data, readable_anchors, key_anchors, visible, problem.group_size, *attended)
    return attended


@cuda.jit
def fill_lists(mask, anchors, key_anchors, visible_blocks, group_size, kept_blocks, kept_anchors, counts):
    """Thread: a query block of a query head at a time; it walks along the visible key blocks and puts each on its list."""
    q_blocks = mask.shape[1]
    for item in range(cuda.grid(1), mask.shape[0] * q_blocks, cuda.gridsize(1)):
        h, i = item // q_blocks, item % q_blocks
        num_blocks, num_anchors = 0, 0
        for j in range(visible_blocks[i]):
            if mask[h, i, j]:
                kept_blocks[h, i, num_blocks] = j
                num_blocks += 1
            else:
                for a in range(key_anchors):
                    position = anchors[h // group_size, j, a]
                    if position >= 0:
                        kept_anchors[h, i, num_anchors] = position
                        num_anchors += 1
        counts[h, i, 0] = num_blocks
        counts[h, i, 1] = num_anchors


@cuda.jit(device=True)
def attended_position(n, kept_blocks, kept_anchors, num_blocks, num_anchors, block_size):
    """Position of the n-th attended key, -1 past the last. Inside a ragged last block it may lie behind the last key."""
    in_blocks = num_blocks * block_size
    if n < in_blocks:
        n, size = np.uint32(n), np.uint32(block_size)  # a GPU divides 32 bits in a fifth of the time that 64 take
        return kept_blocks[n // size] * block_size + n % size
    if n < in_blocks + num_anchors:
        return kept_anchors[n - in_blocks]
    return -1
