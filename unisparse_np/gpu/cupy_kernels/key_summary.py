"""RunningKeySummary: composite keys and anchors of a growing KV cache on the GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import KeySummary, Problem, ceil_div
from .compress import pool
from .plan import plan_of
from .room import INT32, Room
from .shapes import composite_dtype


class Places(NamedTuple):
    """Where composites [Hkc, .., d] and anchors [Hkv, .., r] of keys belong: the first one's address and from head to head, in elements."""

    composites: int
    composites_stride: int
    anchors: int  # 0: none are kept
    anchors_stride: int


NO_PLACES = Places(0, 0, 0, 0)


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
        sizes = _sizes_of(num_q_heads, num_kv_heads, max(1, capacity), head_dim, config, np.dtype(dtype))
        self.config = config
        self.capacity = capacity
        self.length = 0
        self.kv_heads_per_composite = sizes.kv_heads_per_composite
        self._heads = num_q_heads, num_kv_heads
        self._sizes = sizes
        self._kc, self._anchors = Room(sizes.composites, sizes.held), Room(sizes.anchors, INT32)
        self._recent: Callable[[], Any]  # gives keys [Hkv, T, d] that end with those of the block that is not full

    def extend(self, k_new: Any) -> None:
        """Take in the next keys: k_new [Hkv, T, d]. Raises InvalidInput when they do not fit."""
        self._require_room(k_new.shape[1])
        if k_new.shape[1] == 0:
            return
        left = self.length % self.config.block_size
        recent = k_new
        if left:
            before = self._recent()
            recent = cupy.concatenate([before[:, before.shape[1] - left :], k_new], axis=1)
        first = self.length // self.config.block_size * self.config.block_size  # position of recent's first key
        problem = Problem(*self._heads, 1, recent.shape[1], recent.shape[2], self.config)
        pooled = pool(None, recent, plan_of(problem), self._sizes.held, with_keys=True, with_anchors=True)
        room = self._views(first, recent.shape[1])
        room.kc[...] = pooled.kc
        if pooled.anchors is not None:
            room.anchors[...] = cupy.where(pooled.anchors < 0, np.int32(-1), pooled.anchors + np.int32(first))
        self.length += k_new.shape[1]
        left = self.length % self.config.block_size
        kept = recent[:, recent.shape[1] - left :].copy()  # the caller's array may change
        self._recent = lambda: kept

    def room(self, tokens: int) -> Places | None:
        """Where composites and anchors of the next keys belong; None when the keys so far end inside a block."""
        if self.length % self.config.block_size:
            return None
        self._require_room(tokens)
        (_, composites, dim), (_, blocks, anchors), held = self._sizes.composites, self._sizes.anchors, self._sizes.held
        first_composite, first_anchor = self.length // self.config.k_compress * dim, self.length // self.config.block_size * anchors
        return Places(
            self._kc.address + first_composite * held.itemsize,
            composites * dim,
            self._anchors.address + first_anchor * INT32.itemsize if anchors else 0,
            blocks * anchors,
        )

    def took(self, tokens: int, k_new: Callable[[], Any]) -> None:
        """`room` for the next keys has been filled: they now count. k_new gives them, [Hkv, tokens, d] of a cache: they stay."""
        self.length += tokens
        self._recent = k_new

    def addresses(self) -> tuple[int, int]:
        """Those of all room for composites and anchors; the second is 0 where the anchors so far [Hkv, Nk, r] do not lie side by side."""
        heads, blocks, _ = self._sizes.anchors
        side_by_side = heads == 1 or blocks == ceil_div(self.length, self.config.block_size)
        return self._kc.address, self._anchors.address if side_by_side else 0

    def summary(self) -> KeySummary:
        """kc [Hkc, Tk, d] and anchors [Hkv, Nk, r] of the keys so far: views, valid until the next extend."""
        return self._views(0, self.length)

    def whole(self) -> KeySummary:
        """All room for composites and anchors, [Hkc, .., d] and [Hkv, .., r]: a decode step's kernels keep it up by themselves.

        Keys pooled that way are not counted here: `extend` takes them again, with the same result, should anyone call it.
        """
        return KeySummary(self._kc.array, self._anchors.array)

    def _views(self, first: int, tokens: int) -> KeySummary:
        """The composites and blocks of `tokens` keys from position `first` on, which begins a block."""
        width, size = self.config.k_compress, self.config.block_size
        return KeySummary(
            _rows(self._kc.array, first // width, ceil_div(tokens, width)),
            _rows(self._anchors.array, first // size, ceil_div(tokens, size)),
        )

    def _require_room(self, tokens: int) -> None:
        if self.length + tokens > self.capacity:
            raise InvalidInput(f"{self.length + tokens} keys do not fit a key summary of capacity {self.capacity}: reserve more")


def _rows(x: Any, start: int, count: int) -> Any:
    """x[:, start : start + count], and x itself where that is all of it: a view takes the host 2 us."""
    return x if count == x.shape[1] else x[:, start : start + count]


class Sizes(NamedTuple):
    """Of a summary: shapes of composites and anchors, the dtype of composites, and KV heads averaged into one of them."""

    composites: tuple[int, ...]
    anchors: tuple[int, ...]
    held: np.dtype
    kv_heads_per_composite: int


@lru_cache(maxsize=64)
def _sizes_of(num_q_heads: int, num_kv_heads: int, capacity: int, head_dim: int, config: UniSparseConfig, dtype: np.dtype) -> Sizes:
    """Worked out once for all layers."""
    shape = Problem(num_q_heads, num_kv_heads, q_len=1, k_len=capacity, head_dim=head_dim, config=config)
    composites = shape.num_composite_kv_heads, shape.num_k_composites, head_dim
    anchors = num_kv_heads, shape.num_k_blocks, config.key_anchors
    return Sizes(composites, anchors, np.dtype(composite_dtype(shape, dtype)), shape.kv_heads_per_composite)
