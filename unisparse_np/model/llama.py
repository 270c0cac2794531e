"""Llama: the forward pass of llama, mistral, qwen2 and qwen3 models, over the layers and attention of any backend."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from ..attention import AttentionConfig, attend
from ..config import UniSparseConfig
from ..errors import CheckpointError, InvalidInput
from ..problem import ceil_div
from ..trace import Trace
from .config import ModelConfig
from .kv_cache import KVCache
from .weights import LayerWeights, Weights

Attention = AttentionConfig | Sequence[AttentionConfig]
Progress = Callable[[int, int, float], None]
Observer = Callable[[int, Any, Any, Any, Any, Trace], None]  # layer, q [Hq, T, d], k and v [Hkv, Lk, d], out [Hq, T, d], trace
# SmolLM2, 4,096 tokens: 256, 512, 1,024 and 2,048 take the same processor time within 2 %, and 2,048 takes 51 MiB more than
# 1,024; smaller chunks widen 16-bit weights more often (6 % of the time at 256, 2 % at 1,024).
DEFAULT_CHUNK_SIZE = 1024


class Llama:
    """A loaded model. It holds no state between calls: what was read so far lives in the KVCache.

    `attention` is everywhere "dense", a UniSparseConfig, or a list of these, one a layer.

    Attributes:
        config: the ModelConfig.
        backend: the loaded backend module.
        max_context: the most positions a sequence may have: max_position_embeddings, or what the caller set instead.
        check_finite: look after every half layer for NaN and infinity, and name the first place; False, which costs nothing.
    """

    def __init__(self, config: ModelConfig, weights: Weights, backend: Any, max_context: int | None = None) -> None:
        if max_context is not None and max_context < 1:
            raise InvalidInput(f"max_context={max_context} leaves no room: give at least 1, or None for the model's own limit")
        self.config, self.weights, self.backend = config, weights, backend
        self.max_context = config.max_position_embeddings if max_context is None else max_context
        self.check_finite = False
        self._layers = backend.layers
        self._keep_pace = backend.layers.new_pacer()
        self._new_decoder = getattr(backend, "new_decoder", None)
        self._dtype = self._layers.compute_dtype(weights.embedding.dtype)

    # ---- what callers use ----
    def new_cache(self, capacity: int, attention: Attention = "dense", *, prompt_tokens: int | None = None) -> KVCache:
        """Room for `capacity` tokens.

        Args:
            prompt_tokens: length of a prompt that will be read in several calls, by which rotary frequencies that depend on
                the length are fixed. None: by the first call's length.

        Raises:
            InvalidInput: more than the model's positions, or an attention list that does not fit the layers.
        """
        self._attention_per_layer(attention)
        self._check_positions(capacity)
        cache = KVCache(self.config, capacity, self.backend, self._dtype)
        if prompt_tokens is not None:
            self._begin(cache, prompt_tokens)
        return cache

    def prefill(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        attention: Attention,
        *,
        chunk_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
    ) -> np.ndarray:
        """Read a prompt in chunks; only its last position goes through the head.

        Args:
            token_ids: T ids; their keys and values are appended to the cache.
            chunk_size: tokens at a time; rounded up to a multiple of the block size, with a warning. The result does not
                depend on it.
            progress: called after each chunk with (tokens done, tokens in all, mean density of the layers so far). A device
                is waited for then.
            observer: called at every layer of every chunk with (layer, q, k, v, out, trace) of its attention call: the
                backend's arrays, after rotary embedding, q of the chunk and k, v of all tokens so far. Views, valid
                during the call.

        Returns:
            logits [vocab] float32 (float64 for a float64 model) of the last position.

        Raises:
            InvalidInput: no token, an id outside the vocabulary, or more tokens than the cache or the model can hold.
        """
        return self._to_host(
            self.prefill_on_backend(token_ids, cache, attention, chunk_size=chunk_size, progress=progress, observer=observer)
        )

    def prefill_on_backend(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        attention: Attention,
        *,
        chunk_size: int | None = None,
        progress: Progress | None = None,
        observer: Observer | None = None,
    ) -> Any:
        """The same, but the logits stay the backend's array."""
        configs = self._attention_per_layer(attention)
        self._check_tokens(token_ids)
        self._begin(cache, len(token_ids))
        hidden: Any = None
        for start, stop in self._chunks(len(token_ids), configs, chunk_size):
            hidden = self._forward(token_ids[start:stop], cache, configs, count=True, observer=observer)
            if progress is not None:
                progress(stop, len(token_ids), sum(cache.densities()) / len(configs))
        return self._head(hidden[-1:])[0]

    def step(self, token_id: int, cache: KVCache, attention: Attention) -> np.ndarray:
        """Read one more token (decode) -> logits [vocab], as from `prefill`. It does not change the densities."""
        return self._to_host(self.step_on_backend(token_id, cache, attention))

    def step_on_backend(self, token_id: int, cache: KVCache, attention: Attention) -> Any:
        """The same, but the logits stay the backend's array, valid until the next step over this cache."""
        configs = self._attention_per_layer(attention)
        self._check_tokens([token_id])
        self._begin(cache, 1)
        if self._new_decoder is None or self.check_finite:
            return self._head(self._forward([token_id], cache, configs, count=False))[0]
        key = tuple(configs)
        if key not in cache.decoders:
            cache.decoders[key] = self._new_decoder(self.config, self.weights, cache, configs)
        return cache.decoders[key].step(token_id)

    def logits(
        self, token_ids: Sequence[int], attention: Attention = "dense", *, chunk_size: int | None = None, cache: KVCache | None = None
    ) -> np.ndarray:
        """Logits of every position: T ids -> [T, vocab] float32 (float64 for a float64 model).

        With a cache the tokens follow what it holds, and are counted in its densities.
        """
        self._check_tokens(token_ids)
        cache = self.new_cache(len(token_ids), attention) if cache is None else cache
        out = np.empty((len(token_ids), self.config.vocab_size), dtype=np.float64 if self._dtype == np.float64 else np.float32)
        start = 0
        for part in self.logits_by_chunk(token_ids, cache, attention, chunk_size=chunk_size):
            out[start : start + len(part)] = part
            start += len(part)
        return out

    def logits_by_chunk(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        attention: Attention,
        *,
        chunk_size: int | None = None,
        observer: Observer | None = None,
    ) -> Iterator[np.ndarray]:
        """The same, one chunk [t, vocab] after the other, for prompts whose logits do not fit memory together.

        The tokens follow what the cache holds; arguments and errors as in `prefill`.
        """
        configs = self._attention_per_layer(attention)
        self._check_tokens(token_ids)
        chunks = self._chunks(len(token_ids), configs, chunk_size)
        self._begin(cache, len(token_ids))
        return (
            self._to_host(self._head(self._forward(token_ids[start:stop], cache, configs, count=True, observer=observer)))
            for start, stop in chunks
        )

    def layer_densities(self, cache: KVCache) -> list[float]:
        """The prefill's density, one ratio a layer; empty before the first prefill."""
        return cache.densities()

    # ---- the forward pass ----
    def _forward(
        self, token_ids: Sequence[int], cache: KVCache, configs: list[AttentionConfig], count: bool, observer: Observer | None = None
    ) -> Any:
        """T ids after those in the cache -> their hidden states [T, hidden] before the last norm."""
        layers, eps = self._layers, self.config.rms_norm_eps
        x = layers.embedding(self.weights.embedding, token_ids, self._dtype)  # [T, hidden]
        rotation = layers.rotary_table(cache.inv_freq, cache.length, len(token_ids), cache.rotary_factor, self._dtype)
        self._check(x, cache, "the embedding")
        for index, (weights, config) in enumerate(zip(self.weights.layers, configs, strict=True)):
            normed = layers.rms_norm(x, weights.input_norm, eps, self._dtype)
            attended = self._attention(index, weights, normed, rotation, cache, config, count, observer)
            layers.add_linear(x, attended, weights.output, weights.output_bias)
            self._check(x, cache, f"layer {index}, in attention")
            normed = layers.rms_norm(x, weights.post_attention_norm, eps, self._dtype)
            gate_up = layers.linear(normed, weights.gate_up, weights.gate_up_bias)  # [T, 2 * intermediate]
            layers.add_linear(x, layers.swiglu(gate_up), weights.down, weights.down_bias)
            self._check(x, cache, f"layer {index}, in the MLP")
            self._keep_pace()
        cache.advance(len(token_ids))
        return x

    def _attention(
        self, index: int, weights: LayerWeights, x: Any, rotation: Any, cache: KVCache, config: AttentionConfig, count: bool,
        observer: Observer | None,
    ) -> Any:  # fmt: skip
        """One layer's attention before its output product: x [T, hidden], normed -> [T, Hq d]."""
        layers, shape = self._layers, self.config
        tokens, stop = len(x), cache.length + len(x)
        qkv = layers.linear(x, weights.qkv, weights.qkv_bias).reshape(tokens, -1, shape.head_dim)  # [T, Hq + 2 Hkv, d]
        norms = None if weights.q_norm is None else (weights.q_norm, weights.k_norm, shape.rms_norm_eps)
        running = cache.running_summary(index, config)
        q, q_composites = layers.rotate_heads(qkv, rotation, norms, *cache.room(index, tokens), config, running)  # [Hq, T, d]
        keys, values = cache.upto(index, stop)
        summary = None if running is None else running.summary()
        out, trace = attend(
            q, keys, values, config, q_offset=cache.length, backend=self.backend, key_summary=summary, q_composites=q_composites
        )  # [Hq, T, d]
        if count:
            cache.add_counts(index, trace)
        if observer is not None:
            observer(index, q, keys, values, out, trace)
        return out.transpose(1, 0, 2).reshape(tokens, -1)

    def _head(self, hidden: Any) -> Any:
        """hidden [T, hidden] -> logits [T, vocab], the backend's."""
        normed = self._layers.rms_norm(hidden, self.weights.norm, self.config.rms_norm_eps, self._dtype)
        return self._layers.head(normed, self.weights.head)

    def _to_host(self, logits: Any) -> np.ndarray:
        host: np.ndarray = self._layers.to_host(logits)
        return host

    def _check(self, x: Any, cache: KVCache, place: str) -> None:
        """With check_finite: raises CheckpointError when the stream x [T, hidden] holds NaN or infinity after this place."""
        if not self.check_finite:
            return
        rows = self._layers.to_host(self._layers.xp.isfinite(x).all(axis=1))  # [T]
        if not rows.all():
            raise CheckpointError(
                f"NaN or infinite numbers first appear after {place}, at token {cache.length + int(rows.argmin())} of the sequence: the "
                "weights there hold such values or the arithmetic overflowed, so check the checkpoint or load it with --dtype float32"
            )

    # ---- before any work starts ----
    def _begin(self, cache: KVCache, tokens: int) -> None:
        """Check that the tokens fit, and fix the rotary frequencies by the first prompt's length."""
        self._check_positions(cache.length + tokens)
        cache.require_room(tokens)
        if cache.inv_freq is None:
            inv_freq, cache.rotary_factor = self.config.rope_parameters.inverse_frequencies(self.config.head_dim, tokens)
            cache.inv_freq = self._layers.xp.asarray(inv_freq)  # [d/2]

    def _check_positions(self, positions: int) -> None:
        window = self.config.sliding_window
        if window is not None and positions > window:
            raise InvalidInput(
                f"{positions} tokens are more than this model's sliding window of {window}, and sliding attention is not computed: "
                f"give at most {window} tokens in all, prompt and answer"
            )
        if positions > self.max_context:
            raise InvalidInput(
                f"{positions} tokens are more than the {self.max_context} positions this model may use: "
                "shorten the prompt or the answer, or raise the limit with --max-context (max_context= in load)"
            )

    def _check_tokens(self, token_ids: Sequence[int]) -> None:
        if len(token_ids) == 0:
            raise InvalidInput("the prompt has no tokens: give at least one")
        for token_id in token_ids:
            if not isinstance(token_id, Integral):
                raise InvalidInput(f"token id {token_id!r} is not a whole number: give the ids that the tokenizer makes")
        low, high = min(token_ids), max(token_ids)
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidInput(
                f"token id {wrong} is outside this model's vocabulary of {self.config.vocab_size}: use the tokenizer that belongs to it"
            )

    def _attention_per_layer(self, attention: Attention) -> list[AttentionConfig]:
        layers = self.config.num_hidden_layers
        configs = [attention] * layers if isinstance(attention, (str, UniSparseConfig)) else list(attention)
        if len(configs) != layers:
            raise InvalidInput(
                f"attention lists {len(configs)} configs, but the model has {layers} layers: give one a layer, or a single one"
            )
        for config in configs:
            if config != "dense" and not isinstance(config, UniSparseConfig):
                raise InvalidInput(f"attention={config!r} is neither 'dense' nor a UniSparseConfig: give one of the two")
        return configs

    def _chunks(self, tokens: int, configs: list[AttentionConfig], chunk_size: int | None) -> list[tuple[int, int]]:
        """[start, stop) of the chunks: whole query blocks each, so that chunking cannot change a block decision."""
        if chunk_size is not None and chunk_size < 1:
            raise InvalidInput(f"chunk_size={chunk_size} is no chunk: give at least 1, or None for the default")
        unit = math.lcm(*(config.block_size for config in configs if isinstance(config, UniSparseConfig)))
        size = ceil_div(chunk_size or DEFAULT_CHUNK_SIZE, unit) * unit
        if chunk_size is not None and size != chunk_size:
            warnings.warn(f"chunk_size {chunk_size} is rounded up to {size}, a multiple of the block size {unit}", stacklevel=3)
        return [(start, min(tokens, start + size)) for start in range(0, tokens, size)]
