"""RunningKeySummary: composite keys and anchors of a growing KV cache on the GPU."""

from __future__ import annotations

from typing import Any

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import KeySummary, Problem, ceil_div
from .compress import pool
from .plan import plan_of
from .shapes import check_dtype


class RunningKeySummary:
    """Steps 1 and 6 for keys that arrive in parts: what compress and find_anchors give for all of them at once, bit for bit.

    The keys of the last block that is not full are kept: with the next ones they are pooled again, by the same kernel.
    Everything else is looked at once. Room is reserved once.

    Args:
        config: block_size, k_compress, head_compress and key_anchors are used.
        num_q_heads, num_kv_heads, head_dim: the layer's shape.
        capacity: the most keys that will come.
        dtype: float32, the only precision of the summary here.
    """

    def __init__(
        self, config: UniSparseConfig, num_q_heads: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: Any = np.float32
    ) -> None:
        if dtype != np.float32:
            raise InvalidInput(
                f"dtype {np.dtype(dtype).name}: the cupy backend keeps key summaries in float32; leave it, or use the reference"
            )
        shape = Problem(num_q_heads, num_kv_heads, q_len=1, k_len=max(1, capacity), head_dim=head_dim, config=config)
        self.config = config
        self.capacity = capacity
        self.length = 0
        self._heads = num_q_heads, num_kv_heads
        self._kc = cupy.empty((shape.num_composite_kv_heads, shape.num_k_composites, head_dim), np.float32)
        self._anchors = cupy.empty((num_kv_heads, shape.num_k_blocks, config.key_anchors), np.int32)
        self._open_block: Any = None  # keys [Hkv, n < block_size, d] of the block that is not full

    def extend(self, k_new: Any) -> None:
        """Take in the next keys: k_new [Hkv, T, d] float16 or bfloat16. Raises InvalidInput when they do not fit."""
        check_dtype(k_new.dtype)
        if self.length + k_new.shape[1] > self.capacity:
            raise InvalidInput(f"{self.length + k_new.shape[1]} keys do not fit a key summary of capacity {self.capacity}: reserve more")
        if k_new.shape[1] == 0:
            return
        size = self.config.block_size
        first_block = self.length // size
        recent = k_new if self._open_block is None else cupy.concatenate([self._open_block, k_new], axis=1)
        problem = Problem(*self._heads, 1, recent.shape[1], recent.shape[2], self.config)
        pooled = pool(None, recent, plan_of(problem), np.float32, with_keys=True, with_anchors=True)
        first_composite = first_block * (size // self.config.k_compress)
        self._kc[:, first_composite : first_composite + problem.num_k_composites] = pooled.kc
        if pooled.anchors is not None:
            positions = pooled.anchors + np.int32(first_block * size)
            self._anchors[:, first_block : first_block + problem.num_k_blocks] = cupy.where(pooled.anchors < 0, np.int32(-1), positions)
        self.length += k_new.shape[1]
        left = self.length % size
        self._open_block = recent[:, recent.shape[1] - left :].copy() if left else None

    def summary(self) -> KeySummary:
        """kc [Hkc, Tk, d] and anchors [Hkv, Nk, r] of the keys so far: views, valid until the next extend."""
        composites = ceil_div(self.length, self.config.k_compress)
        blocks = ceil_div(self.length, self.config.block_size)
        return KeySummary(self._kc[:, :composites], self._anchors[:, :blocks])
