"""How much memory a prompt takes on a device, as a function of its chunks, worked out before the first token is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..problem import Problem, ceil_div
from .config import ModelConfig
from .kv_cache import pooled_by

STREAM_BYTES = 4  # of a number of the residual stream
RESERVE_BYTES = 256 << 20  # for the libraries' own workspaces and what the pool cannot use of its blocks
PREFERRED_BYTES = 1 << 30  # of activations: larger chunks no longer make products or attention faster
LEAST_CHUNK, PREFERRED_CHUNK, LARGEST_CHUNK = 256, 8192, 32768  # tokens


def whole_blocks(attentions: Sequence[AttentionConfig]) -> int:
    """The fewest tokens that are whole query blocks in every layer: chunks are multiples of it."""
    return math.lcm(*(attention.block_size for attention in attentions if isinstance(attention, UniSparseConfig)))


@dataclass(frozen=True)
class MemoryPlan:
    """One model and one attention a layer, on a device.

    config: the model's. attentions: of the prompt, one a layer. itemsize: bytes of a number of q, k, v and activations between products.
    memory: the backend's (`layers.memory`), which knows what is free and what attention and key summaries take.
    context_ranks: processes that share out a chunk's rows and exchange its keys and values; tokens are those of one of them.
    decode_attentions: of the steps after the prompt, one a layer, which may keep summaries of their own; () plans none.
    """

    config: ModelConfig
    attentions: Sequence[AttentionConfig]
    itemsize: int
    memory: Any
    context_ranks: int = 1
    decode_attentions: Sequence[AttentionConfig] = ()

    def cache_bytes(self, capacity: int) -> int:
        """Keys, values and key summaries of `capacity` tokens."""
        config = self.config
        keys_and_values = 2 * config.num_hidden_layers * config.num_key_value_heads * capacity * config.head_dim * self.itemsize
        pairs = zip(self.attentions, self.decode_attentions, strict=False)
        later = Counter(after for before, after in pairs if pooled_by(after) != pooled_by(before))
        summaries = (layers * self._summary_bytes(capacity, attention) for attention, layers in (*self._kinds.items(), *later.items()))
        return keys_and_values + sum(summaries)

    def chunk_bytes(self, tokens: int, length: int, *, all_logits: bool = False) -> int:
        """The most that is held at once beside weights and cache while the last `tokens` of `length` tokens are read.

        all_logits: every position goes through the head, not the last alone.
        """
        config, item = self.config, self.itemsize
        heads = config.num_attention_heads
        normed = tokens * config.hidden_size * item
        q = tokens * heads * config.head_dim * item
        qkv = tokens * (heads + 2 * config.num_key_value_heads) * config.head_dim * item
        attention = max(self._attention_bytes(tokens, length, attention) for attention in self._kinds)
        exchange = 0
        if self.context_ranks > 1:  # own keys and values, those that are sent, and those of all ranks
            exchange = (2 + self.context_ranks) * 2 * tokens * config.num_key_value_heads * config.head_dim * item
        mlp = tokens * config.intermediate_size * item
        logits = (tokens if all_logits else 1) * config.vocab_size * 4
        most = max(normed + qkv + q + exchange, max(2 * q, normed + qkv) + attention, normed + 3 * mlp, normed + logits)
        return tokens * config.hidden_size * STREAM_BYTES + most + RESERVE_BYTES

    def require(self, capacity: int) -> None:
        """Raises InvalidInput when not even the smallest chunk leaves room for a cache of so many tokens, with how many would fit."""
        free = self.memory.free_bytes()
        if self._least(capacity) <= free:
            return
        low, high = 0, capacity  # `low` tokens fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._least(middle) <= free else (low, middle)
        raise InvalidInput(
            f"{capacity} tokens need {self._least(capacity) / 2**30:.1f} GiB beside the weights, and the GPU has {free / 2**30:.1f} GiB "
            f"free: {low} tokens would fit"
        )

    def chunk_size(self, tokens: int, length: int, *, all_logits: bool = False) -> int:
        """How many of `tokens` to read at a time when `length` are held at the end: as many as pay, fewer where memory is short.

        Raises InvalidInput when the smallest chunk does not fit.
        """
        free = self.memory.free_bytes()
        size = LARGEST_CHUNK
        while size > PREFERRED_CHUNK and self.chunk_bytes(size, length, all_logits=all_logits) - RESERVE_BYTES > PREFERRED_BYTES:
            size //= 2
        least = ceil_div(LEAST_CHUNK, self.unit) * self.unit
        size = max(least, size // self.unit * self.unit)
        while size > least and self.chunk_bytes(min(size, tokens), length, all_logits=all_logits) > free:
            size = max(least, size // 2 // self.unit * self.unit)
        needed = self.chunk_bytes(min(size, tokens), length, all_logits=all_logits)
        if needed > free:
            raise InvalidInput(
                f"reading {min(size, tokens)} tokens at a time needs {needed / 2**30:.2f} GiB, and the GPU has {free / 2**30:.2f} GiB "
                "free beside weights and cache: give fewer tokens, or free memory that other programs hold"
            )
        return size

    @property
    def unit(self) -> int:
        return whole_blocks(self.attentions)

    @cached_property
    def _kinds(self) -> Counter[AttentionConfig]:
        """Each attention and how many layers have it."""
        return Counter(self.attentions)

    def _least(self, capacity: int) -> int:
        least = min(capacity, ceil_div(LEAST_CHUNK, self.unit) * self.unit)
        return self.cache_bytes(capacity) + self.chunk_bytes(least, capacity)

    def _attention_bytes(self, tokens: int, length: int, attention: AttentionConfig) -> int:
        sparse = isinstance(attention, UniSparseConfig)
        config = attention if isinstance(attention, UniSparseConfig) else UniSparseConfig()
        shape = self.config
        problem = Problem(shape.num_attention_heads, shape.num_key_value_heads, tokens, max(tokens, length), shape.head_dim, config)
        needed: int = self.memory.attention_bytes(problem, self.itemsize, sparse)
        return needed

    def _summary_bytes(self, capacity: int, attention: AttentionConfig) -> int:
        if not isinstance(attention, UniSparseConfig):
            return 0
        shape = Problem(self.config.num_attention_heads, self.config.num_key_value_heads, 1, capacity, self.config.head_dim, attention)
        needed: int = self.memory.summary_bytes(shape, self.itemsize)
        return needed
