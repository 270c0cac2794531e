"""Steps 1-5 for a decode step on the GPU (cuda/decode_select.cu): one query a head, the number of keys in device memory."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...problem import KeySummary, Problem, ceil_div
from .device import kernel, num_multiprocessors
from .select import BlockMask, per_head
from .shapes import element_strides, shape_of, words_per_row

SCORE_WARPS, SELECT_WARPS, CELL, ROW_BYTES = 8, 16, 16, 512  # of decode_select.cu and few_rows.cuh


class DecodeSelector:
    """Pools the new key into the running summary, scores the query against all composite keys and selects blocks.

    Args:
        problem: one query and as many keys as the cache can hold.
        dtype: float16 or bfloat16, of q and keys.
    """

    def __init__(self, problem: Problem, dtype: Any) -> None:
        config = problem.config
        heads = problem.heads_per_composite_kv_head
        row_tiles = 1 if heads <= 8 else 2
        keys_per_block = config.block_size // config.k_compress
        defines = {
            "IS_FLOAT16": int(dtype == np.float16), "HEAD_DIM": problem.head_dim, "BLOCK_SIZE": config.block_size,
            "KEYS_PER_BLOCK": keys_per_block, "ROW_TILES": row_tiles,
        }  # fmt: skip
        self.problem = problem
        self.mask = BlockMask(
            cupy.zeros((problem.num_composite_heads, 1, words_per_row(problem)), np.uint32),
            cupy.zeros((problem.num_composite_heads, 1), np.int32),
            config.head_compress,
        )
        self._shape = shape_of(problem, config.head_compress, config.key_anchors)
        cells = ceil_div(problem.num_k_composites, min(keys_per_block, CELL))
        self._cells = cupy.empty((problem.num_composite_heads, cells, 2), np.float32)
        self._rules = (
            per_head(config.top_p, problem.num_composite_heads, "float64"),
            per_head(config.row_threshold, problem.num_composite_heads, "float32"),
        )
        columns = problem.num_composite_kv_heads * ceil_div(heads, 8 * row_tiles)
        resident = 2 if problem.head_dim > 128 or row_tiles > 1 else 3  # thread blocks a multiprocessor
        self._score_grid = max(2, num_multiprocessors() * resident // columns), columns
        norms = 4 * problem.kv_heads_per_composite * config.block_size
        self._score_shared = norms + row_tiles * ceil_div(problem.head_dim, 32) * ROW_BYTES
        self._select_shared = 2 * 4 * 32 * words_per_row(problem) + 2 * 4 * SELECT_WARPS
        self._score = kernel("decode_select.cu", "decode_scores", self._score_shared, **defines)
        self._select = kernel("decode_select.cu", "decode_select", self._select_shared, **defines)

    def launch(self, q: Any, keys: Any, position: Any, summary: KeySummary) -> BlockMask:
        """q [Hq, d], keys [Hkv, capacity, d], position: device int32 [1] of the query; summary as in DecodeAttention.launch."""
        pitch = np.int64(self._cells.shape[1])
        q_head_stride = np.int64(q.strides[0] // q.itemsize)
        scoring = (q, keys, q_head_stride, *element_strides(keys), self._shape, position, *summary, self._cells, pitch)
        self._score(self._score_grid, (32 * SCORE_WARPS,), scoring, shared_mem=self._score_shared)
        selecting = (self._cells, pitch, *self._rules, self._shape, position, self.mask.words, self.mask.counts)
        self._select((self.problem.num_composite_heads,), (32 * SELECT_WARPS,), selecting, shared_mem=self._select_shared)
        return self.mask
