"""Step 6 of ALGORITHM.md on a GPU: exact attention over the selected blocks and the anchor keys of the others.

The same step: reference/attend.py in NumPy, cupy_kernels/attend.py in CUDA C++.

Softmax needs the sum over all keys before it can divide, yet the keys pass by a tile at a time. *Online softmax* keeps, for
every query row, the highest score so far and everything relative to it:

    highest'   = max(highest, max over the tile's keys of score)
    shrink     = exp(highest - highest')                                   brings what was summed to the new highest
    weight[n]  = exp(score[n] - highest')
    total'     = total * shrink + sum of weight[n]
    out'       = out * shrink   + sum of weight[n] * v[n]

and at the end out / total is the attention, highest + log(total) the log-sum-exp.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ...problem import KeySummary, Problem, ceil_div
from .anchors import find_anchors
from .attended import attended_position, list_attended
from .device import DeviceArray, computing, empty, hand_back, to_device
from .shapes import first_query_position
from .tile import ALIGNMENT, PAD, attention_tile, product_adder, slice_loader


def sparse_attention(q: Any, k: Any, v: Any, mask: Any, problem: Problem, key_summary: KeySummary | None = None) -> tuple[Any, Any]:
    """Step 6. Every query attends to the tokens of its selected blocks and to the anchor keys of the other visible blocks.

    q [Hq, Lq, d], k, v [Hkv, Lk, d], mask [Hq, Nq, Nk] bool -> out [Hq, Lq, d], lse [Hq, Lq] (natural log), in float32
    or wider. A query with nothing to attend has out 0 and lse -inf. With key_summary its anchors are taken as they are.
    """
    keys = computing(k)
    config = problem.config
    anchors = find_anchors(keys, config.block_size, config.key_anchors) if key_summary is None else to_device(key_summary.anchors)
    out, lse = attend_listed(computing(q), keys, computing(v), to_device(mask), anchors, problem)
    return hand_back(out, q), hand_back(lse, q)


def dense_attention(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Any]:
    """The same kernel with every block kept: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d], lse [Hq, Lq]."""
    every_block = to_device(np.ones((problem.num_q_heads, problem.num_q_blocks, problem.num_k_blocks), dtype=bool))
    no_anchors = to_device(np.empty((problem.num_kv_heads, problem.num_k_blocks, 0), np.int32))
    out, lse = attend_listed(computing(q), computing(k), computing(v), every_block, no_anchors, problem)
    return hand_back(out, q), hand_back(lse, q)


def attend_listed(
    q: DeviceArray, k: DeviceArray, v: DeviceArray, mask: DeviceArray, anchors: DeviceArray, problem: Problem
) -> tuple[DeviceArray, DeviceArray]:
    """The kernel over arrays on the device: out [Hq, Lq, d], lse [Hq, Lq]."""
    real = q.dtype.type
    tile = attention_tile(real, problem.head_dim)
    attended = list_attended(mask, anchors, problem)
    out, lse = empty(q.shape, real), empty(q.shape[:2], real)
    block_size = problem.config.block_size
    tiles_per_block = ceil_div(min(block_size, problem.q_len), tile.threads * tile.rows)
    grid = (tiles_per_block, problem.num_q_blocks, problem.num_q_heads)
    attention_kernel(real, problem.head_dim)[grid, (tile.threads, tile.threads)](
        q.data,
        k.data,
        v.data,
        attended.blocks,
        attended.anchors,
        attended.counts,
        problem.group_size,
        block_size,
        first_query_position(problem),
        problem.scale,
        out.data,
        lse.data,
    )
    return out, lse


@cache
def attention_kernel(real: type, head_dim: int) -> Any:
    """The kernel for float32 or float64 and one head_dim."""
    tile = attention_tile(real, head_dim)
    THREADS, ROWS, KEYS, SLICE, VALUE_KEYS = tile
    TILE_ROWS, TILE_KEYS = THREADS * ROWS, THREADS * KEYS
    NUM_THREADS = THREADS * THREADS
    DIMS = 4 * ceil_div(head_dim, 4 * THREADS)  # of the output, owned by one thread
    WIDTH = DIMS * THREADS
    VALUES = ceil_div(VALUE_KEYS, THREADS)  # keys whose values one thread brings
    ROW_SLICE, KEY_SLICE, SQUARE = (SLICE, TILE_ROWS + PAD), (SLICE, TILE_KEYS + PAD), (TILE_ROWS, TILE_KEYS + PAD)
    ROWS_HELD, KEYS_HELD = (ROWS, SLICE // THREADS), (KEYS, SLICE // THREADS)
    LOWEST, ZERO = real(-math.inf), real(0)
    (fetch_slice, keep_slice), add_products = slice_loader(tile), product_adder(tile)

    @cuda.jit(device=True)
    def own_dim(d, tx):
        """The d-th dim of thread tx: four side by side, then four of the next 4 THREADS dims, ..."""
        return (d // 4 * THREADS + tx) * 4 + d % 4

    @cuda.jit
    def attention(q, k, v, kept_blocks, kept_anchors, counts, group_size, block_size, first_position, scale, out, lse):
        """CUDA block (t, n, h): tile t, TILE_ROWS rows, of the n-th query block from the end, query head h.

        Thread (ty, tx): ROWS rows, KEYS keys of each tile of keys (tile.py), DIMS dims of the output rows (own_dim). The longest
        rows start first, so that the last blocks to run are short.
        """
        h = cuda.blockIdx.z
        i = cuda.gridDim.y - 1 - cuda.blockIdx.y
        tx, ty = np.uint32(cuda.threadIdx.x), np.uint32(cuda.threadIdx.y)
        thread = ty * THREADS + tx
        queries, keys, values = q[h], k[h // group_size], v[h // group_size]  # [Lq, d], [Lk, d], [Lk, d]

        query_rows = cuda.shared.array(TILE_ROWS, np.int32)  # rows of q in this tile, -1 past the last
        positions = cuda.shared.array(TILE_KEYS, np.int32)  # keys in this tile, -1 past the last
        q_slice = cuda.shared.array(ROW_SLICE, real, ALIGNMENT)
        k_slice = cuda.shared.array(KEY_SLICE, real, ALIGNMENT)
        v_slice = cuda.shared.array((VALUE_KEYS, WIDTH), real, ALIGNMENT)
        weights = cuda.shared.array(SQUARE, real, ALIGNMENT)
        of_threads = cuda.shared.array((TILE_ROWS, THREADS), real)  # one number of each thread of a row
        q_held = cuda.local.array(ROWS_HELD, real)  # on the way from memory to q_slice
        k_held = cuda.local.array(KEYS_HELD, real)
        v_held = cuda.local.array((VALUES, DIMS), real)
        scores = cuda.local.array((ROWS, KEYS), real)
        part = cuda.local.array((ROWS, KEYS), real)  # scratch
        sums = cuda.local.array((ROWS, DIMS), real)  # out, before it is divided by total
        highest = cuda.local.array(ROWS, real)
        total = cuda.local.array(ROWS, real)  # over the keys of this thread
        weight = cuda.local.array(ROWS, real)

        first_row = i * block_size + cuda.blockIdx.x * TILE_ROWS
        last_row = min(min((i + 1) * block_size, first_row + TILE_ROWS), queries.shape[0])
        if first_row >= last_row:
            return
        for m in range(thread, TILE_ROWS, NUM_THREADS):
            query_rows[m] = first_row + m if first_row + m < last_row else -1
        for m in range(ROWS):
            highest[m] = LOWEST
            total[m] = 0
            for d in range(DIMS):
                sums[m, d] = 0

        num_blocks, num_anchors = counts[h, i, 0], counts[h, i, 1]
        num_attended = num_blocks * block_size + num_anchors
        for first_key in range(0, num_attended, TILE_KEYS):
            # ---- which keys: some of the kept tokens, wherever they lie ----
            cuda.syncthreads()  # the last tile is used up
            hidden = 0  # does any row have to look away from any key of this tile?
            for n in range(thread, TILE_KEYS, NUM_THREADS):
                position = attended_position(first_key + n, kept_blocks[h, i], kept_anchors[h, i], num_blocks, num_anchors, block_size)
                if position >= keys.shape[0]:  # behind the end of a ragged last block
                    position = -1
                positions[n] = position
                if position < 0 or position > first_position + first_row:
                    hidden = 1
            hidden = cuda.syncthreads_or(hidden)

            # ---- scores = scale * q k^T, a slice of the dims at a time ----
            for m in range(ROWS):
                for n in range(KEYS):
                    scores[m, n] = 0
            for start in range(0, head_dim, SLICE):
                fetch_slice(q_held, queries, query_rows, start, head_dim, ty, tx)
                fetch_slice(k_held, keys, positions, start, head_dim, ty, tx)
                cuda.syncthreads()  # the last slice is used up
                keep_slice(q_slice, q_held, ty, tx)
                keep_slice(k_slice, k_held, ty, tx)
                cuda.syncthreads()
                add_products(scores, part, q_slice, k_slice, ty, tx)
            for m in range(ROWS):
                for n in range(KEYS):
                    scores[m, n] *= real(scale)
                    if hidden != 0:
                        position = positions[tx * KEYS + n]
                        if position < 0 or position > first_position + first_row + ty * ROWS + m:  # the causal rule
                            scores[m, n] = LOWEST

            # ---- highest' = max(highest, scores): each thread its own keys, then all threads of a row ----
            for m in range(ROWS):
                best = LOWEST
                for n in range(KEYS):
                    best = max(best, scores[m, n])
                of_threads[ty * ROWS + m, tx] = best
            cuda.syncthreads()

            # ---- weight = exp(score - highest'); total and sums shrink to the new highest ----
            for m in range(ROWS):
                row = ty * ROWS + m
                best = highest[m]
                for t in range(THREADS):
                    best = max(best, of_threads[row, t])
                base = best if best > LOWEST else ZERO  # a row that has seen nothing: exp(-inf - 0) = 0
                shrink = real(math.exp(highest[m] - base))
                highest[m] = best
                total[m] *= shrink
                for d in range(DIMS):
                    sums[m, d] *= shrink
                for n in range(KEYS):
                    w = real(math.exp(scores[m, n] - base))
                    total[m] += w
                    weights[row, tx * KEYS + n] = w

            # ---- sums += weight * v, a few keys at a time ----
            for first in range(0, TILE_KEYS, VALUE_KEYS):
                for m in range(VALUES):
                    n = ty + m * THREADS
                    exists = n < VALUE_KEYS and positions[first + n] >= 0
                    row = values[np.uint32(positions[first + n]) if exists else np.uint32(0)]
                    for d in range(DIMS):
                        v_held[m, d] = row[tx + d * THREADS] if exists and tx + d * THREADS < head_dim else ZERO
                cuda.syncthreads()  # the weights are written, the last values are used up
                for m in range(VALUES):
                    if ty + m * THREADS < VALUE_KEYS:
                        for d in range(DIMS):
                            v_slice[ty + m * THREADS, tx + d * THREADS] = v_held[m, d]
                cuda.syncthreads()
                n = 0
                while n < VALUE_KEYS:  # not range: see tile.py
                    for m in range(ROWS):
                        weight[m] = weights[ty * ROWS + m, first + n]
                    if hidden == 0:
                        for d in range(DIMS):
                            value = v_slice[n, own_dim(d, tx)]
                            for m in range(ROWS):
                                sums[m, d] += weight[m] * value
                    else:
                        for d in range(DIMS):
                            value = v_slice[n, own_dim(d, tx)]
                            for m in range(ROWS):
                                if weight[m] != 0:  # 0 * NaN is NaN: what a row may not see must not be multiplied
                                    sums[m, d] += weight[m] * value
                    n += 1

        # ---- out = sums / total, lse = highest + log(total) ----
        for m in range(ROWS):
            of_threads[ty * ROWS + m, tx] = total[m]
        cuda.syncthreads()
        for m in range(ROWS):
            row = first_row + ty * ROWS + m
            if row < last_row:
                whole = ZERO
                for t in range(THREADS):
                    whole += of_threads[ty * ROWS + m, t]
                empty_row = whole == 0  # nothing to attend: out is 0, lse is -inf
                for d in range(DIMS):
                    if own_dim(d, tx) < head_dim:
                        out[h, row, own_dim(d, tx)] = ZERO if empty_row else sums[m, d] / whole
                if tx == 0:
                    lse[h, row] = LOWEST if empty_row else highest[m] + real(math.log(whole))

    return attention
