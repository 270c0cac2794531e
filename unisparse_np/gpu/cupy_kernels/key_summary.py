"""RunningKeySummary: composite keys and anchors of a growing KV cache on the GPU."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import KeySummary, Problem, ceil_div
from .compress import pool
from .plan import plan_of
from .shapes import composite_dtype


class RunningKeySummary:
    """Steps 1 and 6 for keys that arrive in parts: what compress and find_anchors give for all of them at once, bit for bit.

    The keys of the last block that is not full are kept: with the next ones they are pooled again, by the same kernel.
    Everything else is looked at once. Room is reserved once. A kernel that has the keys in its registers anyway may pool them
    itself: it writes into `room` and hands the keys to `took`.

    Args:
        config: block_size, k_compress, head_compress and key_anchors are used.
        num_q_heads, num_kv_heads, head_dim: the layer's shape.
        capacity: the most keys that will come.
        dtype: of the keys. Composites are held as step 2 takes them: float16 (saturating at 65504) for the tensor cores, or float32.
    """

    def __init__(
        self, config: UniSparseConfig, num_q_heads: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: Any = np.float16
    ) -> None:
        shape = _shape_of(num_q_heads, num_kv_heads, max(1, capacity), head_dim, config)
        self.config = config
        self.capacity = capacity
        self.length = 0
        self.kv_heads_per_composite = shape.kv_heads_per_composite
        self._heads = num_q_heads, num_kv_heads
        self._held = composite_dtype(shape, np.dtype(dtype))
        self._kc = cupy.empty((shape.num_composite_kv_heads, shape.num_k_composites, head_dim), self._held)
        self._anchors = cupy.empty((num_kv_heads, shape.num_k_blocks, config.key_anchors), np.int32)
        self._open_block: Any = None  # keys [Hkv, n < block_size, d] of the block that is not full

    def extend(self, k_new: Any) -> None:
        """Take in the next keys: k_new [Hkv, T, d]. Raises InvalidInput when they do not fit."""
        self._require_room(k_new.shape[1])
        if k_new.shape[1] == 0:
            return
        recent = k_new if self._open_block is None else cupy.concatenate([self._open_block, k_new], axis=1)
        first = self.length // self.config.block_size * self.config.block_size  # position of recent's first key
        problem = Problem(*self._heads, 1, recent.shape[1], recent.shape[2], self.config)
        pooled = pool(None, recent, plan_of(problem), self._held, with_keys=True, with_anchors=True)
        room = self._places(first, recent.shape[1])
        room.kc[...] = pooled.kc
        if pooled.anchors is not None:
            room.anchors[...] = cupy.where(pooled.anchors < 0, np.int32(-1), pooled.anchors + np.int32(first))
        self._count(k_new.shape[1], recent)
        if self._open_block is not None:
            self._open_block = self._open_block.copy()  # the caller's array may change

    def room(self, tokens: int) -> KeySummary | None:
        """Where composites and anchors of the next keys belong, as views; None when the keys so far end inside a block."""
        if self.length % self.config.block_size:
            return None
        self._require_room(tokens)
        return self._places(self.length, tokens)

    def took(self, k_new: Any) -> None:
        """`room` for these next keys, k_new [Hkv, T, d], has been filled: they now count. k_new is of a cache: it stays as it is."""
        self._count(k_new.shape[1], k_new)

    def summary(self) -> KeySummary:
        """kc [Hkc, Tk, d] and anchors [Hkv, Nk, r] of the keys so far: views, valid until the next extend."""
        return self._places(0, self.length)

    def whole(self) -> KeySummary:
        """All room for composites and anchors, [Hkc, .., d] and [Hkv, .., r]: a decode step's kernels keep it up by themselves.

        Keys pooled that way are not counted here: `extend` takes them again, with the same result, should anyone call it.
        """
        return KeySummary(self._kc, self._anchors)

    def _places(self, first: int, tokens: int) -> KeySummary:
        """Views of the composites and blocks of `tokens` keys from position `first` on, which begins a block."""
        width, size = self.config.k_compress, self.config.block_size
        composites, blocks = ceil_div(tokens, width), ceil_div(tokens, size)
        return KeySummary(
            self._kc[:, first // width : first // width + composites], self._anchors[:, first // size : first // size + blocks]
        )

    def _require_room(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise InvalidInput(f"{self.length + tokens} keys do not fit a key summary of capacity {self.capacity}: reserve more")

    def _count(self, tokens: int, recent: Any) -> None:
        """`tokens` more keys are in; recent [Hkv, T, d] ends with them and holds all of the last block that is not full."""
        self.length += tokens
        left = self.length % self.config.block_size
        self._open_block = recent[:, recent.shape[1] - left :] if left else None


@lru_cache(maxsize=64)
def _shape_of(num_q_heads: int, num_kv_heads: int, capacity: int, head_dim: int, config: UniSparseConfig) -> Problem:
    """Sizes of a summary, worked out once for all layers."""
    return Problem(num_q_heads, num_kv_heads, q_len=1, k_len=capacity, head_dim=head_dim, config=config)
