"""KVCache: keys and values of the tokens so far, and their summaries, in room that is reserved once."""

from __future__ import annotations

from typing import Any

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..problem import KeySummary
from .config import ModelConfig


class KVCache:
    """Keys and values per layer, [Hkv, capacity, d] each, filled from the front and never moved.

    Memory is reserved without being touched, so an operating system hands out pages only as tokens arrive. Beside the
    keys of each layer with sparse attention sits a RunningKeySummary that looks at every key once, whatever the chunks.

    Attributes:
        length, capacity: tokens held, and the most that fit.
        kept_blocks, visible_blocks: per layer, summed over the prefill's chunks; their ratio is the layer's density.
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
            raise InvalidInput(f"a cache of {capacity} tokens does not fit this machine's memory: lower the context length") from None
        self.capacity = capacity
        self.length = 0
        self.kept_blocks = [0.0] * config.num_hidden_layers
        self.visible_blocks = [0] * config.num_hidden_layers
        self.inv_freq: Any = None
        self.rotary_factor = 1.0
        self._config, self._backend, self._dtype = config, backend, dtype
        self._summaries: list[dict[tuple, Any]] = [{} for _ in range(config.num_hidden_layers)]

    def require_room(self, tokens: int) -> None:
        """Raises InvalidInput when so many more tokens do not fit."""
        if self.length + tokens > self.capacity:
            raise InvalidInput(
                f"{self.length + tokens} tokens do not fit this cache of {self.capacity}: make it with a greater capacity (new_cache)"
            )

    def room(self, layer: int, tokens: int) -> tuple[Any, Any]:
        """Where the next tokens' keys and values go: two writable views [Hkv, tokens, d]."""
        place = slice(self.length, self.length + tokens)
        return self._keys[layer, :, place], self._values[layer, :, place]

    def upto(self, layer: int, length: int) -> tuple[Any, Any]:
        """Keys and values of positions 0 .. length-1: two views [Hkv, length, d]."""
        return self._keys[layer, :, :length], self._values[layer, :, :length]

    def key_summary(self, layer: int, length: int, attention: AttentionConfig) -> KeySummary | None:
        """Composite keys and anchors of positions 0 .. length-1; None for dense attention. Each key is looked at once."""
        if not isinstance(attention, UniSparseConfig):
            return None
        running = self._running_summary(layer, attention)
        if running.length < length:
            running.extend(self._keys[layer, :, running.length : length])
        return running.summary()

    def add_counts(self, layer: int, kept_blocks: float, visible_blocks: int) -> None:
        """Add one chunk's counts to the layer's density."""
        self.kept_blocks[layer] += kept_blocks
        self.visible_blocks[layer] += visible_blocks

    def advance(self, tokens: int) -> None:
        """All layers have written the next tokens: they now count."""
        self.length += tokens

    def densities(self) -> list[float]:
        """One density a layer (kept over visible blocks of the prefill); empty before the first prefill."""
        return [kept / visible for kept, visible in zip(self.kept_blocks, self.visible_blocks, strict=True) if visible]

    def _running_summary(self, layer: int, attention: UniSparseConfig) -> Any:
        """The layer's summary for what this config pools by, made on first use."""
        kind = (attention.block_size, attention.k_compress, attention.head_compress, attention.key_anchors)
        known = self._summaries[layer]
        if kind not in known or known[kind].length > self.length:  # ahead only after a call that was interrupted
            heads = (self._config.num_attention_heads, self._config.num_key_value_heads)
            known[kind] = self._backend.RunningKeySummary(attention, *heads, self._config.head_dim, self.capacity, self._dtype)
        return known[kind]
