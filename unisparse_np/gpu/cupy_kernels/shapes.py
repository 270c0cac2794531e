"""A Problem as the kernels see it: the struct of cuda/shape.cuh, by value."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ...errors import InvalidInput
from ...problem import Problem, ceil_div

ANCHOR_TILE = 128  # compact anchor keys of one rank are padded to whole tiles
BLOCK_SIZES, HEAD_DIMS = (64, 128, 256), (64, 80, 96, 128, 256)  # of the tensor-core kernels
MAX_BLOCK_SIZE, MAX_HEAD_DIM, MAX_BLOCKS = 4096, 256, 24 << 10  # of all; key blocks whose scores fit shared memory
LOG2_E = 1.4426950408889634

_FIELDS = [
    "q_len", "k_len", "q_offset", "causal", "num_q_heads", "num_kv_heads", "num_composite_heads", "num_composite_kv_heads",
    "head_compress", "block_size", "q_compress", "k_compress", "heads_per_mask", "num_q_blocks", "num_k_blocks",
    "num_q_composites", "num_k_composites", "sink_blocks", "local_blocks", "key_anchors", "words_per_row", "anchor_pitch",
]  # fmt: skip
SHAPE = np.dtype([*((name, np.int32) for name in _FIELDS), ("scale_log2", np.float32)])


def shape_of(problem: Problem, heads_per_mask: int, key_anchors: int) -> np.ndarray:
    """The struct for one problem. heads_per_mask: query heads that share a row of the block mask; key_anchors: 0 for dense."""
    config = problem.config
    values = {
        **{name: getattr(problem, name) for name in _FIELDS if hasattr(problem, name)},
        **{name: getattr(config, name) for name in _FIELDS if hasattr(config, name)},
        "q_offset": problem.q_offset or 0,
        "heads_per_mask": heads_per_mask,
        "key_anchors": key_anchors,
        "words_per_row": words_per_row(problem),
        "anchor_pitch": anchor_pitch(problem),
        "scale_log2": (problem.scale or 0.0) * LOG2_E,
    }
    shape = np.zeros(1, SHAPE)
    for name in SHAPE.names or ():
        shape[name] = values[name]
    return shape.view(f"V{SHAPE.itemsize}")


def words_per_row(problem: Problem) -> int:
    """32-bit words of one row of the block mask."""
    return ceil_div(problem.num_k_blocks, 32)


def anchor_pitch(problem: Problem) -> int:
    """Rows of the compact anchors of one rank: a key block each, in whole tiles."""
    return ceil_div(problem.num_k_blocks, ANCHOR_TILE) * ANCHOR_TILE


def check_dtype(dtype: Any) -> None:
    """Raises InvalidInput for dtypes that these kernels do not take."""
    if dtype not in (np.float16, np.float32, ml_dtypes.bfloat16):
        raise InvalidInput(f"dtype {dtype}: the cupy backend takes float16, bfloat16 and float32; cast q, k, v, or use backend='reference'")


@lru_cache
def is_float16(dtype: Any) -> bool:
    """Whether the tensor-core kernels work in float16, or else in bfloat16. Raises InvalidInput for dtypes that they do not take."""
    check_dtype(dtype)
    return bool(dtype == np.float16)


def check_shape(problem: Problem) -> None:
    """Raises InvalidInput for what these kernels do not do: larger heads and blocks, and more blocks."""
    if problem.head_dim > MAX_HEAD_DIM:
        raise InvalidInput(f"head_dim={problem.head_dim}: the cupy backend takes up to {MAX_HEAD_DIM}; use backend='reference'")
    if problem.config.block_size > MAX_BLOCK_SIZE:
        raise InvalidInput(
            f"block_size={problem.config.block_size}: the cupy backend takes up to {MAX_BLOCK_SIZE}; take less, or use backend='reference'"
        )
    if problem.num_k_blocks > MAX_BLOCKS:
        raise InvalidInput(
            f"k_len={problem.k_len} with block_size={problem.config.block_size} makes {problem.num_k_blocks} key blocks: "
            f"the cupy backend takes up to {MAX_BLOCKS}; take larger blocks"
        )


def uses_tensor_cores(problem: Problem, dtype: Any) -> bool:
    """Whether inputs of this dtype take the tensor-core kernels. Everything else takes the plain ones (plain_stages.py).

    The only place that decides it, so that all stages of a problem go the same way.
    """
    return (
        dtype != np.float32
        and problem.config.block_size in BLOCK_SIZES
        and problem.head_dim in HEAD_DIMS
        and (problem.scale or 0.0) > 0.0  # their softmax takes the largest product for the largest logit
    )


def composite_dtype(problem: Problem, dtype: Any) -> Any:
    """In which dtype composites go from step 1 to step 2: float16 for the tensor cores, otherwise float32."""
    return np.float16 if uses_tensor_cores(problem, dtype) else np.float32


def element_strides(x: Any) -> tuple[np.int64, np.int64]:
    """Head and row stride of x [H, L, d] in elements."""
    return np.int64(x.strides[0] // x.itemsize), np.int64(x.strides[1] // x.itemsize)


def aligned(x: Any) -> Any:
    """x [H, L, d] itself when rows are contiguous and begin on 16-byte boundaries (what the loads need), otherwise a copy."""
    contiguous_rows = x.strides[2] == x.itemsize and x.strides[0] % 16 == 0 and x.strides[1] % 16 == 0 and x.data.ptr % 16 == 0
    return x if contiguous_rows and min(x.strides) > 0 else x.copy(order="C")


def positions(anchors: Any) -> Any:
    """Anchors [Hkv, Nk, r] as the kernels take them, C-contiguous int32; CuPy's own function takes 3 us to find that they are."""
    return anchors if anchors.dtype == np.int32 and anchors.flags.c_contiguous else anchors.astype(np.int32, order="C")


class Rows(NamedTuple):
    """An array [H, L, d] of 16-bit elements as the kernels take it: contiguous rows from 16-byte boundaries, any strides in between."""

    array: Any  # keeps the memory
    address: int
    head_stride: int  # in elements
    row_stride: int


NO_ROWS = Rows(None, 0, 0, 0)


def rows_of(x: Any) -> Rows:
    """x [H, L, d] itself where its rows are contiguous and begin on 16-byte boundaries (what the loads need), otherwise a copy."""
    head_bytes, row_bytes, element_bytes = x.strides
    address = x.data.ptr
    if element_bytes != 2 or (head_bytes | row_bytes | address) & 15 or head_bytes <= 0 or row_bytes <= 0:
        x = x.copy(order="C")
        head_bytes, row_bytes, _ = x.strides
        address = x.data.ptr
    return Rows(x, address, head_bytes // 2, row_bytes // 2)


def composite_rows(x: Any) -> Rows:
    """rows_of composites [H, T, d], whose rows lie side by side: the score kernels are told of the head stride alone."""
    return rows_of(x if x.strides[1] == x.shape[2] * x.itemsize else x.copy(order="C"))


def contiguous_rows(address: int, shape: tuple[int, int, int]) -> Rows:
    """A C-contiguous array of this shape at an address that the caller keeps."""
    return Rows(None, address, shape[1] * shape[2], shape[2])
