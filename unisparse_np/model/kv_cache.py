"""KVCache: keys and values of the tokens so far, and their summaries, in room that is reserved once."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..trace import Trace
from .config import ModelConfig


class KVCache:
    """Keys and values per layer, [Hkv, capacity, d] each, filled from the front and never moved.

    Memory is reserved without being touched, so an operating system hands out pages only as tokens arrive. Beside the
    keys of each layer with sparse attention sits a RunningKeySummary that looks at every key once, whatever the chunks.

    Attributes:
        length, capacity: tokens held, and the most that fit.
        inv_freq, rotary_factor: the rotary frequencies, fixed when the first prompt's length is known; None before.
    """

    def __init__(self, config: ModelConfig, capacity: int, backend: Any, dtype: Any) -> None:
        if capacity < 1:
            raise InvalidInput(f"capacity={capacity} holds no token: give at least 1")
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        try:
            self._keys = backend.xp.empty(shape, dtype=dtype)  # [layers, Hkv, capacity, d]
            self._values = backend.xp.empty(shape, dtype=dtype)
        except MemoryError:
            self._keys = None
            where, way_out = "this machine's memory", "lower the context length"
            if (memory := backend.layers.memory) is not None:
                bytes_per_token = 2 * prod(shape) // capacity * np.dtype(dtype).itemsize
                where, way_out = "the GPU's memory", f"at most {memory.free_bytes() // bytes_per_token} would fit"
            raise InvalidInput(f"a cache of {capacity} tokens does not fit {where}: {way_out}") from None
        self.capacity = capacity
        self.length = 0
        self.decoders: dict[Any, Any] = {}  # what the model made for decode steps over this cache, by their attention
        self.inv_freq: Any = None
        self.rotary_factor = 1.0
        self._config, self._backend, self._dtype = config, backend, dtype
        self._summaries: list[dict[tuple, Any]] = [{} for _ in range(config.num_hidden_layers)]
        self._kept: list[list[Callable[[], float]]] = [[] for _ in range(config.num_hidden_layers)]  # a count a call not read yet
        self._counted, self._visible = [0.0] * config.num_hidden_layers, [0] * config.num_hidden_layers
        self._unfinished = False  # whether a call is writing what does not count yet, or was interrupted then
        self._counts_of_call: list[tuple[int, Callable[[], float], int]] = []  # layer, kept and visible blocks: not counted yet

    def begin(self) -> None:
        """A call begins. Where the one before was interrupted, summaries may hold keys that do not count: they are made anew."""
        if self._unfinished:
            self._summaries = [{} for _ in self._summaries]
            self._counts_of_call.clear()
            self._unfinished = False

    def require_room(self, tokens: int) -> None:
        """Raises InvalidInput when so many more tokens do not fit."""
        if self.length + tokens > self.capacity:
            raise InvalidInput(
                f"{self.length + tokens} tokens do not fit this cache of {self.capacity}: make it with a greater capacity (new_cache)"
            )

    def room(self, layer: int, tokens: int) -> tuple[Any, Any]:
        """Where the next tokens' keys and values go: two writable views [Hkv, tokens, d]."""
        self._unfinished = True
        place = slice(self.length, self.length + tokens)
        return self._keys[layer, :, place], self._values[layer, :, place]

    def whole(self) -> tuple[Any, Any]:
        """All layers' keys and values [layers, Hkv, capacity, d], for who writes the next tokens' himself, from position `length` on."""
        self._unfinished = True
        return self._keys, self._values

    def upto(self, layer: int, length: int) -> tuple[Any, Any]:
        """Keys and values of positions 0 .. length-1: two views [Hkv, length, d]."""
        return self._keys[layer, :, :length], self._values[layer, :, :length]

    def running_summary(self, layer: int, attention: AttentionConfig) -> Any:
        """The layer's RunningKeySummary for what this config pools by, of the `length` keys held now; None for dense attention.

        Made on first use. Whoever writes the next keys into `room` hands them to it, so that each key is looked at once.
        """
        if not isinstance(attention, UniSparseConfig):
            return None
        kind = pooled_by(attention)
        known = self._summaries[layer]
        if kind not in known or known[kind].length > self.length:  # ahead only after a call that was interrupted
            heads = (self._config.num_attention_heads, self._config.num_key_value_heads)
            known[kind] = self._backend.RunningKeySummary(attention, *heads, self._config.head_dim, self.capacity, self._dtype)
        running = known[kind]
        if running.length < self.length:  # steps with another attention came between
            self._unfinished = True
            running.extend(self._keys[layer, :, running.length : self.length])
        return running

    def add_counts(self, layer: int, trace: Trace) -> None:
        """Add one attention call's counts to the layer's density. They are read from the device when someone asks for it."""
        self._counts_of_call.append((layer, trace.kept_later(), trace.visible_blocks))

    def advance(self, tokens: int) -> None:
        """All layers have written the next tokens: they now count, and so do their blocks."""
        self.length += tokens
        for layer, kept, visible in self._counts_of_call:
            self._kept[layer].append(kept)
            self._visible[layer] += visible
        self._counts_of_call.clear()
        self._unfinished = False

    def release(self) -> None:
        """Give the memory of keys, values and what was made over them back. The densities stay."""
        self._keys = self._values = None
        self._summaries = [{} for _ in self._summaries]
        self.decoders.clear()

    def densities(self) -> list[float]:
        """One density a layer (kept over visible blocks of the prefill); empty before the first prefill."""
        return densities(self.counts())

    def counts(self) -> np.ndarray:
        """[layers, 2]: kept and visible blocks of the prefill, of the heads and queries that this process computed."""
        for layer, calls in enumerate(self._kept):
            self._counted[layer] += sum(count() for count in calls)
            calls.clear()
        return np.array([self._counted, self._visible], dtype=np.float64).T


def pooled_by(attention: AttentionConfig) -> tuple[int, ...]:
    """What decides a layer's key summary: attentions that agree in it share one; empty for dense attention, which has none."""
    if not isinstance(attention, UniSparseConfig):
        return ()
    return attention.block_size, attention.k_compress, attention.head_compress, attention.key_anchors


def densities(counts: np.ndarray) -> list[float]:
    """counts [layers, 2] as from `KVCache.counts` -> one density a layer; empty where nothing was counted."""
    return [float(kept / visible) for kept, visible in counts if visible]
