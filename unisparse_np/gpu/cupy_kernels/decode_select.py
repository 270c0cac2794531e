"""Steps 1-5 for a decode step on the GPU (cuda/decode_select.cu): one query a head, the number of keys in device memory."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import KeySummary, Problem, ceil_div
from .device import kernel, num_multiprocessors
from .overlap import address, launcher_of
from .select import BlockMask, per_head
from .shapes import element_strides, shape_of, words_per_row

FILE = "decode_select.cu"
SCORE_WARPS, SELECT_WARPS, CELL, ROW_BYTES = 8, 16, 16, 512  # of decode_select.cu and few_rows.cuh
BINS, CUT_ROOM = 2048, SELECT_WARPS + 4  # of decode_cut.cuh
NULL = np.uint64(0)


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
            "KEYS_PER_BLOCK": keys_per_block, "ROW_TILES": row_tiles, "COARSE": coarse_keys(config),
        }  # fmt: skip
        self.problem = problem
        self.mask = BlockMask(
            cupy.zeros((problem.num_composite_heads, 1, words_per_row(problem)), np.uint32),
            cupy.zeros((problem.num_composite_heads, 1), np.int32),
            config.head_compress,
        )
        self._shape = shape_of(problem, config.head_compress, config.key_anchors)
        cells = ceil_div(problem.num_k_composites, min(keys_per_block, CELL))
        softmaxes = cupy.empty((problem.num_composite_heads, cells, 2), np.float32)
        of_coarse_keys = NULL if coarse_keys(config) == 1 else cupy.empty_like(softmaxes)
        self._scores = softmaxes, of_coarse_keys, np.int64(cells)
        self._rules = (
            per_head(config.top_p, problem.num_composite_heads, "float64"),
            per_head(config.row_threshold, problem.num_composite_heads, "float32"),
        )
        columns = problem.num_composite_kv_heads * ceil_div(heads, 8 * row_tiles)
        resident = 2 if problem.head_dim > 128 or row_tiles > 1 else 3  # thread blocks a multiprocessor
        self._score_grid = max(2, num_multiprocessors() * resident // columns), columns
        self._score_shared = row_tiles * ceil_div(problem.head_dim, 32) * ROW_BYTES
        arrays = 2 if coarse_keys(config) == 1 else 3  # of a number a block
        self._select_shared = 4 * ((32 * arrays + 1) * words_per_row(problem) + BINS + CUT_ROOM)
        self._score = kernel(FILE, "decode_scores", self._score_shared, **defines)
        self._select = kernel(FILE, "decode_select", self._select_shared, **defines)

    def launch(self, q: Any, keys: Any, position: Any, summary: KeySummary, overlap: bool = False) -> BlockMask:
        """q [Hq, d], keys [Hkv, capacity, d], position: device int32 [1] of the query; summary as in DecodeAttention.launch.

        Only the scoring overlaps: what the others read first is what the launch before them writes, and thread blocks that wait early
        take room from those that work (128K: 52 us a layer instead of 49).
        """
        self.score(q, keys, position, summary, overlap)
        selecting = (*self._scores, *self._rules, self._shape, position, self.mask.words, self.mask.counts)
        grid = self.problem.num_composite_heads, 1
        launch(self._select, FILE, "decode_select", grid, 32 * SELECT_WARPS, self._select_shared, selecting, overlap=False)
        return self.mask

    def score(self, q: Any, keys: Any, position: Any, summary: KeySummary, overlap: bool = False) -> None:
        """Steps 1 and 2 alone."""
        q_head_stride = np.int64(q.strides[0] // q.itemsize)
        scoring = (q, keys, q_head_stride, *element_strides(keys), self._shape, position, *summary, *self._scores)
        launch(self._score, FILE, "decode_scores", self._score_grid, 32 * SCORE_WARPS, self._score_shared, scoring, overlap)


def coarse_keys(config: UniSparseConfig) -> int:
    """Composite keys in one of Top-P's own; 1 where it has none of its own."""
    return 1 if config.top_p_compress is None else config.top_p_compress // config.k_compress


def launch(
    function: Any, file: str, name: str, grid: tuple[int, int], threads: int, shared: int, arguments: tuple[Any, ...], overlap: bool
) -> None:
    """One launch of a kernel of `file`, which with `overlap` may begin while the launch before it ends (overlap.py)."""
    launcher_of(function, file, name, threads, shared, overlap)(*grid, *map(address, arguments))
