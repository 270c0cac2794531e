"""Attention of a few queries a head on the GPU (cuda/decode_attention.cu): the keys are split over all multiprocessors.

`attend_few` is step 6 for calls with up to 16 queries; `DecodeAttention` is the whole attention of a decode step, steps 1-6 or dense,
as launches alone, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import ml_dtypes
import numpy as np

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import KeySummary, Problem, ceil_div
from .decode_select import CELL, DecodeSelector, coarse_keys, launch
from .device import kernel, num_multiprocessors
from .plan import Plan
from .select import BlockMask
from .shapes import MAX_HEAD_DIM, element_strides, positions, shape_of, uses_tensor_cores

FILE = "decode_attention.cu"
FEW_QUERIES = 16
WARPS, THREADS, TILE = 6, 192, 16  # of decode_attention.cu
NULL = np.uint64(0)


def splits_keys(problem: Problem, dtype: Any) -> bool:
    """Whether these kernels take the problem: at most 16 queries in 16 bits, head_dim a multiple of 16, block_size a power of two."""
    size, dim = problem.config.block_size, problem.head_dim
    whole_tiles = dim % 16 == 0 and dim <= MAX_HEAD_DIM and size >= TILE and size & (size - 1) == 0
    return problem.q_len <= FEW_QUERIES and whole_tiles and dtype in (np.float16, ml_dtypes.bfloat16)


def attend_few(q: Any, k: Any, v: Any, mask: BlockMask | None, anchors: Any, plan: Plan) -> tuple[Any, Any, str]:
    """Step 6 for at most 16 queries: q [Hq, Lq, d], k, v [Hkv, Lk, d], mask None for dense, anchors [Hkv, Nk, r] or None.

    Rows are contiguous and begin on 16-byte boundaries (shapes.aligned), and `splits_keys` holds. Returns out [Hq, Lq, d] in the
    dtype of q, lse [Hq, Lq] float32 and the name of the kernel.
    """
    problem = plan.problem
    anchors = None if mask is None or anchors is None else positions(anchors)
    heads_per_mask, key_anchors = (0, 0) if mask is None else (mask.heads_per_row, 0 if anchors is None else anchors.shape[2])
    split = split_of(problem, q.dtype == np.float16, heads_per_mask, key_anchors, cupy.cuda.runtime.getDevice())
    out = cupy.empty((problem.num_q_heads, problem.q_len, problem.head_dim), q.dtype)
    lse = cupy.empty(out.shape[:2], np.float32)
    split.launch(q, k, v, out, lse, NULL, NULL if mask is None else mask.words, NULL if anchors is None else anchors, split.workspace())
    return out, lse, split.name


class Workspace(NamedTuple):
    """What thread blocks found, [grid, rows, d] and {max, sum} [grid, rows, 2] float32; how many of each group are done, [groups] int32."""

    found: Any
    statistics: Any
    arrived: Any


class Split:
    """One problem's launch: the kernel, its grid and its memory. Masks have a row for heads_per_mask query heads; 0 is dense."""

    def __init__(self, problem: Problem, is_float16: bool, heads_per_mask: int, key_anchors: int) -> None:
        row_tiles = row_tiles_of(problem)
        self.rows = 8 * row_tiles  # that a thread block serves
        self.groups = row_groups(problem)
        self.grid = max(self.groups, resident_thread_blocks(problem))
        self.shape = shape_of(problem, max(1, heads_per_mask), key_anchors)
        self.head_dim = problem.head_dim
        self.list_room = blocks_per_thread_block(problem, self.groups, self.grid) if heads_per_mask else 0
        merge = WARPS * self.rows * problem.head_dim + self.rows * self.grid
        row_pieces = row_tiles * ceil_div(problem.head_dim, 32) * 512
        self.shared = 4 * merge + 8 * WARPS * self.rows + row_pieces + 8 * self.list_room + 4 * self.groups
        self.function = kernel(
            FILE, "decode_attention", self.shared,
            IS_FLOAT16=int(is_float16), HEAD_DIM=problem.head_dim, ROW_TILES=row_tiles,
        )  # fmt: skip
        kind = f"S{problem.config.block_size}" if heads_per_mask else "dense"
        self.name = f"decode_attention d{problem.head_dim} {kind} {'float16' if is_float16 else 'bfloat16'}"

    def workspace(self) -> Workspace:
        """Memory for launches that follow one another; each leaves it ready for the next."""
        found = cupy.empty((self.grid, self.rows, self.head_dim), np.float32)
        return Workspace(found, cupy.empty((self.grid, self.rows, 2), np.float32), cupy.zeros(self.groups, np.int32))

    def launch(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any,
        lse: Any,
        position: Any,
        words: Any,
        anchors: Any,
        workspace: Workspace,
        overlap: bool = False,
    ) -> None:
        """q [Hq, Lq, d], k, v [Hkv, .., d]; position (device int32 [1]), words, anchors: or NULL; overlap: see `overlap.py`."""
        strides = (*element_strides(q), *element_strides(k), *element_strides(v))
        arguments = (q, k, v, out, lse, *strides, self.shape, position, words, anchors, np.int32(self.list_room), *workspace)
        launch(self.function, FILE, "decode_attention", (self.grid, 1), THREADS, self.shared, arguments, overlap)


def row_tiles_of(problem: Problem) -> int:
    """ROW_TILES of decode_attention.cu: eights of query rows that a thread block serves."""
    return 1 if problem.group_size * problem.q_len <= 8 or problem.head_dim > 128 else 2


def row_groups(problem: Problem) -> int:
    """Groups of query rows, each of which needs a thread block of its own."""
    return problem.num_kv_heads * ceil_div(problem.group_size * problem.q_len, 8 * row_tiles_of(problem))


def resident_thread_blocks(problem: Problem) -> int:
    """Thread blocks that the current device holds at once."""
    return num_multiprocessors() * (2 if row_tiles_of(problem) == 1 and problem.head_dim <= 128 else 1)


@lru_cache(maxsize=256)
def split_of(problem: Problem, is_float16: bool, heads_per_mask: int, key_anchors: int, device: int) -> Split:
    """The split of a problem, worked out once for the current device, which `device` names."""
    return Split(problem, is_float16, heads_per_mask, key_anchors)


def blocks_per_thread_block(problem: Problem, groups: int, grid: int) -> int:
    """The most selected blocks that `deal` of decode_attention.cu can give to one thread block, whatever is selected."""
    if grid == groups:
        return problem.num_k_blocks
    per_block = problem.config.block_size // TILE
    tiles = problem.num_k_blocks * per_block + ceil_div(problem.num_k_blocks * problem.config.key_anchors, TILE)
    most_tiles = max(WARPS, ceil_div(groups * tiles, grid - groups))
    return min(problem.num_k_blocks, ceil_div(most_tiles, per_block) + 1)


class DecodeAttention:
    """The attention of one new token over a cache, dense or sparse: what steps 1-6 give for q_len = 1 at its position.

    The position is read from device memory, all memory is taken here, and `launch` only launches. One object serves all layers with this
    config, as long as their launches follow one another on a stream.

    Args:
        num_q_heads, num_kv_heads, head_dim, capacity: shapes of q and of the cache.
        config: a UniSparseConfig, or "dense".
        dtype: float16 or bfloat16, of q, keys and values.
        scale: None for 1/sqrt(head_dim).

    Raises:
        InvalidInput: a shape or dtype that the kernels do not take (see `can_decode`).
    """

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        config: UniSparseConfig | str,
        dtype: Any,
        scale: float | None = None,
    ) -> None:
        sparse = isinstance(config, UniSparseConfig)
        rule = config if isinstance(config, UniSparseConfig) else UniSparseConfig()
        problem = Problem(num_q_heads, num_kv_heads, 1, capacity, head_dim, rule, scale=scale)
        dtype = np.dtype(dtype)
        if not can_decode(problem, dtype, sparse):
            raise InvalidInput(
                f"head_dim={head_dim}, block_size={problem.config.block_size}, {dtype.name}: decode kernels take 16-bit inputs with "
                "head_dim a multiple of 16 up to 256, for sparse decode also a block_size and head_dim of the tensor-core kernels and a "
                "top_p_compress of at most 16 k_compress; "
                "use unisparse_attention for each token, or backend='reference'"
            )
        self.problem = problem
        self.selector = DecodeSelector(problem, dtype) if sparse else None
        heads_per_mask, key_anchors = (problem.config.head_compress, problem.config.key_anchors) if sparse else (0, 0)
        self._split = split_of(problem, dtype == np.float16, heads_per_mask, key_anchors, cupy.cuda.runtime.getDevice())
        self._workspace = self._split.workspace()
        self._out = cupy.empty((num_q_heads, head_dim), dtype)
        self._lse = cupy.empty((num_q_heads, 1), np.float32)

    def launch(
        self, q: Any, keys: Any, values: Any, position: Any, summary: KeySummary | None = None, out: Any = None, overlap: bool = False
    ) -> Any:
        """Attention of the token at *position, whose key and value are in the cache already.

        q [Hq, d] contiguous, keys, values [Hkv, capacity, d], position: device int32 [1]. Sparse: summary is all room of the layer's
        running summary, kc [Hkc, ceil(capacity / c_k), d] float16 and anchors [Hkv, ceil(capacity / S), r], and takes the new key in.
        overlap: see `overlap.py`; position and all keys but the newest must be old. Returns out [Hq, d], this object's own unless given.
        """
        words = None
        if self.selector is not None:
            assert summary is not None, "sparse decode needs the layer's key summary"
            words = self.selector.launch(q, keys, position, summary, overlap).words
        return self.attend(q, keys, values, position, words, summary, out, overlap and words is None)

    def attend(
        self,
        q: Any,
        keys: Any,
        values: Any,
        position: Any,
        words: Any,
        summary: KeySummary | None = None,
        out: Any = None,
        overlap: bool = False,
    ) -> Any:
        """Step 6 alone: `launch` with the selected blocks given, words [mask rows, 1, ceil(capacity / S / 32)], None when dense."""
        out = self._out if out is None else out
        words = NULL if words is None else words
        anchors = NULL if summary is None or not self.problem.config.key_anchors else summary.anchors
        self._split.launch(q[:, None], keys, values, out, self._lse, position, words, anchors, self._workspace, overlap)
        return out


def can_decode(problem: Problem, dtype: Any, sparse: bool) -> bool:
    """Whether DecodeAttention takes this shape (one query) and dtype."""
    return splits_keys(problem, dtype) and (not sparse or (uses_tensor_cores(problem, dtype) and coarse_keys(problem.config) <= CELL))
