"""Steps 2 and 3 of ALGORITHM.md on a GPU, in one kernel: attend in the compressed space and sum the attention per block.

The same step: reference/scores.py in NumPy, cupy_kernels/scores.py in CUDA C++.

The compressed attention A is [Hc, Tq, Tk]: 34 GB for 32 heads at 131,072 tokens, so it is never written. The kernel goes
over the keys twice instead:

    pass 1    highest[row] = max over u of Z[row, u],   total[row] = sum over u of exp(Z[row, u] - highest[row])
    pass 2    A[row, u] = exp(Z[row, u] - highest[row]) / total[row], added to its key block at once
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

from ...problem import Problem
from .compress import coarse_composites
from .device import computing, empty, hand_back
from .shapes import shapes_of
from .tile import ALIGNMENT, PAD, product_adder, score_tile, slice_loader


def score_blocks(qc: Any, kc: Any, problem: Problem) -> tuple[Any, Any]:
    """Steps 2-3. qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean [Hc, Nq, Nk] (B) and peak [Hc, Nq, Nk] (R).

    peak is None when the row threshold is off. Blocks that are not visible hold 0. A query block is computed in the same
    way wherever its chunk begins, so chunking changes no bit. With top_p_compress the mean comes from coarse composites and
    the peak from qc, kc: two launches.
    """
    if problem.config.top_p_compress is not None:
        mean, _ = score_blocks(*coarse_composites(qc, kc, problem), problem.of_top_p())
        _, peak = score_blocks(qc, kc, problem.of_row_threshold())
        return mean, peak
    queries, keys = computing(qc), computing(kc)
    shape = (problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks)
    mean, peak = empty(shape, queries.dtype), empty(shape, queries.dtype)
    shapes, config = shapes_of(problem), problem.config
    real = queries.dtype.type
    threads = score_tile(real).threads
    score_kernel(real)[(problem.num_q_blocks, problem.num_composite_heads), (threads, threads)](
        queries.data,
        keys.data,
        shapes.visible_composites,
        shapes.visible_blocks,
        problem.heads_per_composite_kv_head,
        config.block_size // config.q_compress,
        config.block_size // config.k_compress,
        problem.scale,
        mean.data,
        peak.data,
    )
    return hand_back(mean, qc), None if config.row_threshold is None else hand_back(peak, qc)


@cache
def score_kernel(real: type) -> Any:
    """The kernel for float32 or float64."""
    tile = score_tile(real)
    THREADS, ROWS, KEYS, SLICE, _ = tile
    TILE_ROWS, TILE_KEYS = THREADS * ROWS, THREADS * KEYS
    NUM_THREADS = THREADS * THREADS
    ROW_SLICE, KEY_SLICE, SQUARE = (SLICE, TILE_ROWS + PAD), (SLICE, TILE_KEYS + PAD), (TILE_ROWS, TILE_KEYS + PAD)
    ROWS_HELD, KEYS_HELD = (ROWS, SLICE // THREADS), (KEYS, SLICE // THREADS)
    LOWEST, ZERO = real(-math.inf), real(0)
    (fetch_slice, keep_slice), add_products = slice_loader(tile), product_adder(tile)

    @cuda.jit(device=True)
    def tile_logits(logits, part, queries, keys, query_rows, key_rows, q_slice, k_slice, scale, ty, tx):
        """logits [ROWS, KEYS] of thread (ty, tx) = scale * Q~ K~^T for the rows and keys listed."""
        head_dim = queries.shape[1]
        q_held = cuda.local.array(ROWS_HELD, real)  # on the way from memory to q_slice
        k_held = cuda.local.array(KEYS_HELD, real)
        for m in range(ROWS):
            for n in range(KEYS):
                logits[m, n] = 0
        for start in range(0, head_dim, SLICE):
            cuda.syncthreads()  # the lists are written, the last slice is used up
            fetch_slice(q_held, queries, query_rows, start, head_dim, ty, tx)
            fetch_slice(k_held, keys, key_rows, start, head_dim, ty, tx)
            keep_slice(q_slice, q_held, ty, tx)
            keep_slice(k_slice, k_held, ty, tx)
            cuda.syncthreads()
            add_products(logits, part, q_slice, k_slice, ty, tx)
        for m in range(ROWS):
            for n in range(KEYS):
                logits[m, n] *= real(scale)

    @cuda.jit
    def score(qc, kc, visible_composites, visible_blocks, heads_per_kv_head, rows_per_block, keys_per_block, scale, mean, peak):
        """CUDA block (i, h): query block i of composite head h. Its composite queries go through TILE_ROWS at a time.

        Thread (ty, tx): a square of logits (tile.py). For sums per key block: one (row, key block) pair; at the end of
        them: one key block.
        """
        i, h = cuda.blockIdx.x, cuda.blockIdx.y
        tx, ty = np.uint32(cuda.threadIdx.x), np.uint32(cuda.threadIdx.y)
        thread = ty * THREADS + tx
        queries, keys = qc[h], kc[h // heads_per_kv_head]  # [Tq, d], [Tk, d]

        query_rows = cuda.shared.array(TILE_ROWS, np.int32)  # composite queries of this tile, -1 past the last
        key_rows = cuda.shared.array(TILE_KEYS, np.int32)  # composite keys of this tile, -1 past the last
        limits = cuda.shared.array(TILE_ROWS, np.int32)  # composite keys before this one are visible to the row
        q_slice = cuda.shared.array(ROW_SLICE, real, ALIGNMENT)
        k_slice = cuda.shared.array(KEY_SLICE, real, ALIGNMENT)
        weights = cuda.shared.array(SQUARE, real, ALIGNMENT)  # exp(Z - highest)
        mass = cuda.shared.array(SQUARE, real, ALIGNMENT)  # the same, summed per key block
        highest_of_thread = cuda.shared.array((TILE_ROWS, THREADS), real)
        total_of_thread = cuda.shared.array((TILE_ROWS, THREADS), real)
        highest = cuda.shared.array(TILE_ROWS, real)
        total = cuda.shared.array(TILE_ROWS, real)
        logits = cuda.local.array((ROWS, KEYS), real)
        part = cuda.local.array((ROWS, KEYS), real)  # scratch
        my_highest = cuda.local.array(ROWS, real)
        my_total = cuda.local.array(ROWS, real)

        first_row = i * rows_per_block
        last_row = min(first_row + rows_per_block, queries.shape[0])
        visible = visible_composites[last_row - 1]  # the last row sees the most
        num_blocks = visible_blocks[i]
        blocks_per_group = max(1, TILE_KEYS // keys_per_block)  # key blocks that one tile holds, or one block in several tiles
        keys_per_group = blocks_per_group * keys_per_block

        for j in range(thread, mean.shape[2], NUM_THREADS):
            mean[h, i, j] = ZERO
            peak[h, i, j] = ZERO

        for tile_row in range(first_row, last_row, TILE_ROWS):
            cuda.syncthreads()
            for m in range(thread, TILE_ROWS, NUM_THREADS):
                exists = tile_row + m < last_row
                query_rows[m] = tile_row + m if exists else -1
                limits[m] = visible_composites[tile_row + m] if exists else 0

            # ---- pass 1: highest and total of every row, first over the keys of each thread ----
            for m in range(ROWS):
                my_highest[m] = LOWEST
                my_total[m] = 0
            for tile_key in range(0, visible, TILE_KEYS):
                cuda.syncthreads()
                for n in range(thread, TILE_KEYS, NUM_THREADS):
                    key_rows[n] = tile_key + n if tile_key + n < visible else -1
                tile_logits(logits, part, queries, keys, query_rows, key_rows, q_slice, k_slice, scale, ty, tx)
                for m in range(ROWS):
                    for n in range(KEYS):
                        if tile_key + tx * KEYS + n < limits[ty * ROWS + m]:
                            z = logits[m, n]
                            if z > my_highest[m]:  # online softmax: bring the sum so far to the new maximum
                                my_total[m] *= real(math.exp(my_highest[m] - z))
                                my_highest[m] = z
                            my_total[m] += real(math.exp(z - my_highest[m]))
            for m in range(ROWS):
                highest_of_thread[ty * ROWS + m, tx] = my_highest[m]
                total_of_thread[ty * ROWS + m, tx] = my_total[m]
            cuda.syncthreads()
            for m in range(thread, TILE_ROWS, NUM_THREADS):  # then over the threads of a row
                best = LOWEST
                for t in range(THREADS):
                    best = max(best, highest_of_thread[m, t])
                all_of_row = ZERO
                for t in range(THREADS):
                    if total_of_thread[m, t] != 0:
                        all_of_row += total_of_thread[m, t] * real(math.exp(highest_of_thread[m, t] - best))
                highest[m] = best
                total[m] = all_of_row

            # ---- pass 2: the mass of every key block, a group of blocks at a time ----
            for group in range(0, num_blocks, blocks_per_group):
                cuda.syncthreads()
                for item in range(thread, TILE_ROWS * blocks_per_group, NUM_THREADS):
                    mass[item // blocks_per_group, item % blocks_per_group] = ZERO
                first_key = group * keys_per_block
                for tile_key in range(first_key, min(first_key + keys_per_group, visible), TILE_KEYS):
                    stop = min(min(tile_key + TILE_KEYS, first_key + keys_per_group), visible)
                    cuda.syncthreads()
                    for n in range(thread, TILE_KEYS, NUM_THREADS):
                        key_rows[n] = tile_key + n if tile_key + n < stop else -1
                    tile_logits(logits, part, queries, keys, query_rows, key_rows, q_slice, k_slice, scale, ty, tx)
                    for m in range(ROWS):
                        row = ty * ROWS + m
                        for n in range(KEYS):
                            weight = ZERO
                            if tile_key + tx * KEYS + n < min(stop, limits[row]):
                                weight = real(math.exp(logits[m, n] - highest[row]))
                            weights[row, tx * KEYS + n] = weight
                    cuda.syncthreads()
                    for item in range(thread, TILE_ROWS * blocks_per_group, NUM_THREADS):
                        row, b = item // blocks_per_group, item % blocks_per_group
                        start_of_block = first_key + b * keys_per_block
                        for u in range(max(start_of_block, tile_key), min(start_of_block + keys_per_block, stop)):
                            mass[row, b] += weights[row, u - tile_key]
                cuda.syncthreads()
                for b in range(thread, min(blocks_per_group, num_blocks - group), NUM_THREADS):
                    for m in range(min(TILE_ROWS, last_row - tile_row)):
                        share = mass[m, b] / total[m]  # sum of A[row, u] over the composite keys of the block
                        mean[h, i, group + b] += share / real(last_row - first_row)  # step 3, B
                        peak[h, i, group + b] = max(peak[h, i, group + b], share)  # step 3, R

    return score
