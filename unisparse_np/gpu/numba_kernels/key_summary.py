"""RunningKeySummary: composite keys and anchors of a growing KV cache, on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...config import UniSparseConfig
from ...errors import InvalidInput
from ...problem import KeySummary, Problem, ceil_div
from .run import summarise_keys


class RunningKeySummary:
    """Steps 1 and 6 for keys that arrive in parts: what `compress` and `find_anchors` give for all of them at once, bit for bit.

    A block's composite keys and anchors depend on its own keys alone. So the keys of the last block are held while it is not
    full, and it is summarised again, with what has come, until it is: at most block_size keys a call beside the new ones.

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
        self._num_q_heads = num_q_heads
        self._open_block: np.ndarray = np.empty((num_kv_heads, 0, head_dim), dtype=dtype)  # the keys of the last block until it is full
        self._kc: np.ndarray = np.empty((shape.num_composite_kv_heads, shape.num_k_composites, head_dim), dtype=dtype)
        self._anchors: np.ndarray = np.empty((num_kv_heads, shape.num_k_blocks, config.key_anchors), dtype=np.int32)

    def extend(self, k_new: Any) -> None:
        """Take in the next keys: k_new [Hkv, T, d]. Raises InvalidInput when they do not fit."""
        keys = np.concatenate([self._open_block, np.asarray(k_new).astype(self._kc.dtype, copy=False)], axis=1)
        size = self.config.block_size
        first = self.length // size * size  # position of keys[:, 0]: the start of a block
        length = first + keys.shape[1]
        if length > self.capacity:
            raise InvalidInput(f"{length} keys do not fit a key summary of capacity {self.capacity}: reserve more")
        if keys.shape[1] == 0:
            return
        part = Problem(self._num_q_heads, keys.shape[0], q_len=1, k_len=keys.shape[1], head_dim=keys.shape[2], config=self.config)
        kc, anchors = (np.asarray(summary) for summary in summarise_keys(keys, part))
        composite = first // self.config.k_compress
        self._kc[:, composite : composite + kc.shape[1]] = kc
        self._anchors[:, first // size : first // size + anchors.shape[1]] = np.where(anchors < 0, -1, anchors + first)
        self._open_block = keys[:, length // size * size - first :].copy()
        self.length = length

    def summary(self) -> KeySummary:
        """kc [Hkc, Tk, d] and anchors [Hkv, Nk, r] of the keys so far: views, valid until the next extend."""
        composites = ceil_div(self.length, self.config.k_compress)
        return KeySummary(self._kc[:, :composites], self._anchors[:, : ceil_div(self.length, self.config.block_size)])
