"""RunningKeySummary: composite keys and anchors of a growing KV cache, each key looked at once."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..problem import KeySummary, Problem, ceil_div
from .attend import squared_norms
from .compress import mean_of_heads, sum_in_order
from .precision import widen


class RunningKeySummary:
    """Steps 1 and 6 for keys that arrive in parts: what `compress` and `find_anchors` give for all of them at once, bit for bit.

    The last composite key that is not full is a running sum; the last block that is not full keeps its best anchors so far
    with their norms. Room is reserved once: pages of it are touched only as keys arrive.

    Args:
        config: block_size, k_compress, head_compress and key_anchors are used.
        num_q_heads, num_kv_heads, head_dim: the layer's shape.
        capacity: the most keys that will come.
        dtype: float32 or float64, the precision of the keys after widening.
    """

    def __init__(
        self, config: UniSparseConfig, num_q_heads: int, num_kv_heads: int, head_dim: int, capacity: int, dtype: type = np.float32
    ) -> None:
        shape = Problem(num_q_heads, num_kv_heads, q_len=1, k_len=max(1, capacity), head_dim=head_dim, config=config)
        self.config = config
        self.capacity = capacity
        self.length = 0
        self._kv_heads_per_composite = shape.kv_heads_per_composite
        self._kc: np.ndarray = np.empty((shape.num_composite_kv_heads, shape.num_k_composites, head_dim), dtype=dtype)
        self._partial_sum: np.ndarray = np.zeros((num_kv_heads, head_dim), dtype=dtype)  # of the composite that is not full yet
        self._anchors = np.full((num_kv_heads, shape.num_k_blocks, config.key_anchors), -1, dtype=np.int32)
        self._anchor_norms: np.ndarray = np.full(
            (num_kv_heads, config.key_anchors), np.inf, dtype=dtype
        )  # of the block that is not full yet

    def extend(self, k_new: np.ndarray) -> None:
        """Take in the next keys: k_new [Hkv, T, d]. Raises InvalidInput when they do not fit."""
        count = k_new.shape[1]
        if self.length + count > self.capacity:
            raise InvalidInput(f"{self.length + count} keys do not fit a key summary of capacity {self.capacity}: reserve more")
        k_new = widen(k_new)
        self._extend_composites(k_new)
        self._extend_anchors(k_new)
        self.length += count

    def summary(self) -> KeySummary:
        """kc [Hkc, Tk, d] and anchors [Hkv, Nk, r] of the keys so far: views, valid until the next extend."""
        composites = ceil_div(self.length, self.config.k_compress)
        blocks = ceil_div(self.length, self.config.block_size)
        return KeySummary(self._kc[:, :composites], self._anchors[:, :blocks])

    def _extend_composites(self, k_new: np.ndarray) -> None:
        for start, stop in _pieces(self.length, k_new.shape[1], self.config.k_compress):
            self._add_to_composites(k_new[:, start - self.length : stop - self.length], start)

    def _add_to_composites(self, k: np.ndarray, start: int) -> None:
        """k [Hkv, n, d] at positions start ..: either whole composites, or part of one."""
        width = self.config.k_compress
        heads, count, dim = k.shape
        first = start // width
        if start % width == 0 and count % width == 0:
            sums = sum_in_order(k.reshape(heads, count // width, width, dim), axis=2)  # [Hkv, count / width, d]
            self._kc[:, first : first + count // width] = mean_of_heads(sums / width, self._kv_heads_per_composite)
            return
        if start % width == 0:
            self._partial_sum[:] = k[:, 0]
            k = k[:, 1:]
        for token in np.moveaxis(k, 1, 0):
            self._partial_sum += token
        mean = self._partial_sum[:, None] / (start % width + count)  # [Hkv, 1, d]
        self._kc[:, first : first + 1] = mean_of_heads(mean, self._kv_heads_per_composite)

    def _extend_anchors(self, k_new: np.ndarray) -> None:
        if self.config.key_anchors == 0:
            return
        norms = squared_norms(k_new)  # [Hkv, T]
        for start, stop in _pieces(self.length, k_new.shape[1], self.config.block_size):
            self._add_to_anchors(norms[:, start - self.length : stop - self.length], start)

    def _add_to_anchors(self, norms: np.ndarray, start: int) -> None:
        """norms [Hkv, n] of the keys at positions start ..: either whole blocks, or part of one."""
        size, width = self.config.block_size, self.config.key_anchors
        heads, count = norms.shape
        first, whole_blocks = start // size, count // size
        if start % size == 0 and whole_blocks:
            kept = min(width, size)
            order = np.argsort(norms.reshape(heads, whole_blocks, size), axis=-1, kind="stable")[..., :kept]
            self._anchors[:, first : first + whole_blocks, :kept] = order + start + size * np.arange(whole_blocks)[:, None]
            return
        if start % size == 0:
            self._anchor_norms[:] = np.inf
        positions = np.concatenate(
            [self._anchors[:, first], np.broadcast_to(np.arange(start, start + count, dtype=np.int32), norms.shape)], axis=1
        )  # [Hkv, r + n]: earlier positions first, so that ties go to them
        norms = np.concatenate([self._anchor_norms, norms], axis=1)
        norms[positions < 0] = np.inf
        order = np.argsort(np.where(positions < 0, np.nan, norms), axis=-1, kind="stable")[:, :width]  # empty places sort last
        self._anchors[:, first] = np.take_along_axis(positions, order, axis=1)
        self._anchor_norms[:] = np.take_along_axis(norms, order, axis=1)


def _pieces(start: int, count: int, width: int) -> list[tuple[int, int]]:
    """Cut positions start .. start+count-1 into: the rest of an open group, the whole groups, the start of the next."""
    stop = start + count
    to_boundary = min(stop, ceil_div(start, width) * width)
    whole_stop = max(to_boundary, stop // width * width)
    edges = [start, to_boundary, whole_stop, stop]
    return [(a, b) for a, b in pairwise(edges) if b > a]
