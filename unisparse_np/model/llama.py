"""Llama: a loaded model and what callers do with it; forward.py computes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..parallel import ONE_PROCESS, Ranks
from ..problem import ceil_div
from .config import ModelConfig
from .forward import ForwardPass, Observer
from .kv_cache import KVCache, densities
from .memory_plan import MemoryPlan, whole_blocks
from .out_of_memory import giving_memory_back
from .sharding import Shard, check_split, local_attention, local_config
from .weights import Weights

Attention = AttentionConfig | Sequence[AttentionConfig]
Progress = Callable[[int, int, float], None]
# Where no device's memory is planned. SmolLM2, 4,096 tokens: 256, 512, 1,024 and 2,048 take the same processor time within
# 2 %, and 2,048 takes 51 MiB more than 1,024; smaller chunks widen 16-bit weights more often (6 % of the time at 256, 2 % at 1,024).
DEFAULT_CHUNK_SIZE = 1024


class Llama:
    """A loaded model. It holds no state between calls: what was read so far lives in the KVCache.

    `attention` is everywhere "dense", a UniSparseConfig, or a list of these, one a layer.

    Attributes:
        config: the ModelConfig; on several ranks that of this rank's part (sharding.local_config).
        backend: the loaded backend module.
        max_context: the most positions a sequence may have: max_position_embeddings, or what the caller set instead.
        forward: the ForwardPass.
        ranks: who computes with this process. All of them make the same calls, and get the same logits.

    Args:
        config: of the whole model. weights: of this rank's part.
        check_finite: look after every half layer for NaN and infinity, and name the first place; False costs nothing.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, backend: Any, max_context: int | None = None, *, check_finite: bool = False,
        ranks: Ranks = ONE_PROCESS,
    ) -> None:  # fmt: skip
        if max_context is not None and max_context < 1:
            raise InvalidInput(f"max_context={max_context} leaves no room: give at least 1, or None for the model's own limit")
        self._whole_config, self.ranks = config, ranks
        self.config, self.weights, self.backend = local_config(config, ranks.tensor.size), weights, backend
        self.max_context = config.max_position_embeddings if max_context is None else max_context
        self.forward = ForwardPass(self.config, weights, backend, check_finite, ranks)
        self._layers = backend.layers
        self._new_decoder = getattr(backend, "new_decoder", None)  # of steps as one call, where the backend has that

    # ---- what callers use ----
    def new_cache(
        self, capacity: int, attention: Attention = "dense", *, prompt_tokens: int | None = None, decode_attention: Attention = "dense"
    ) -> KVCache:
        """Room for `capacity` tokens.

        Args:
            prompt_tokens: length of a prompt that will be read in several calls, by which rotary frequencies that depend on
                the length are fixed. None: by the first call's length.
            decode_attention: of steps after the prompt, where it may be another: a device's memory is planned for both.

        Raises:
            InvalidInput: more than the model's positions, or than a device's free memory holds (says how many would fit); an
                attention list that does not fit the layers.
        """
        configs, later = self._attention_per_layer(attention), self._attention_per_layer(decode_attention)
        self._check_positions(capacity)
        if (plan := self._plan(configs, later)) is not None:
            plan.require(capacity)
        cache = KVCache(self.config, capacity, self.backend, self.forward.dtype)
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
        ids = self._checked_tokens(token_ids)
        self._begin(cache, len(token_ids))
        last: Any = None  # hidden state of the last position
        for start, stop in self._chunks(len(token_ids), cache, configs, chunk_size):
            with giving_memory_back(self._layers, stop - start):
                last = self.forward.last_hidden(ids[start:stop], cache, configs, count=True, observer=observer)
            if progress is not None:
                progress(stop, len(token_ids), sum(cache.densities()) / len(configs))
        return self.forward.head(last)[0]

    def step(self, token_id: int, cache: KVCache, attention: Attention) -> np.ndarray:
        """Read one more token (decode) -> logits [vocab], as from `prefill`. It does not change the densities."""
        return self._to_host(self.step_on_backend(token_id, cache, attention))

    def step_on_backend(self, token_id: int, cache: KVCache, attention: Attention) -> Any:
        """The same, but the logits stay the backend's array, valid until the next step over this cache."""
        configs = self._attention_per_layer(attention)
        self._checked_tokens([token_id])
        self._begin(cache, 1)
        with giving_memory_back(self._layers, 1):
            decoder = self._decoder(cache, configs)
            if decoder is None:
                return self.forward.head(self.forward.hidden([token_id], cache, configs, count=False))[0]
            return self.forward.whole_logits(decoder.step(token_id)[None])[0]

    def _decoder(self, cache: KVCache, configs: list[AttentionConfig]) -> Any:
        """What the backend made for steps over this cache; None where it has nothing for them, and with check_finite."""
        if self._new_decoder is None or self.forward.check_finite:
            return None
        key = tuple(configs)
        if key not in cache.decoders:
            cache.decoders[key] = self._new_decoder(self.config, self.weights, cache, configs, self.ranks.tensor)
        return cache.decoders[key]

    def logits(
        self, token_ids: Sequence[int], attention: Attention = "dense", *, chunk_size: int | None = None, cache: KVCache | None = None
    ) -> np.ndarray:
        """Logits of every position: T ids -> [T, vocab] float32 (float64 for a float64 model).

        With a cache the tokens follow what it holds, and are counted in its densities.
        """
        self._checked_tokens(token_ids)
        cache = self.new_cache(len(token_ids), attention) if cache is None else cache
        out = np.empty((len(token_ids), self.config.vocab_size), dtype=np.float64 if self.forward.dtype == np.float64 else np.float32)
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
        chunks = self.logits_on_backend(token_ids, cache, attention, chunk_size=chunk_size, observer=observer)
        return (self._to_host(logits) for logits in chunks)

    def logits_on_backend(
        self,
        token_ids: Sequence[int],
        cache: KVCache,
        attention: Attention,
        *,
        chunk_size: int | None = None,
        observer: Observer | None = None,
    ) -> Iterator[Any]:
        """The same, but the logits stay the backend's arrays."""
        configs = self._attention_per_layer(attention)
        ids = self._checked_tokens(token_ids)
        self._begin(cache, len(token_ids))
        chunks = self._chunks(len(token_ids), cache, configs, chunk_size, all_logits=True)

        def logits_of(start: int, stop: int) -> Any:
            with giving_memory_back(self._layers, stop - start):
                hidden = self.forward.hidden(ids[start:stop], cache, configs, count=True, observer=observer)
                return self.forward.head(hidden)

        return (logits_of(*chunk) for chunk in chunks)

    def layer_densities(self, cache: KVCache) -> list[float]:
        """The prefill's density, one ratio a layer, over the heads and blocks of all ranks; empty before the first prefill."""
        return densities(self.ranks.world.all_reduce(cache.counts()))

    # ---- before any work starts ----
    def _begin(self, cache: KVCache, tokens: int) -> None:
        """Check that the tokens fit, and fix the rotary frequencies by the first prompt's length."""
        self._check_positions(cache.length + tokens)
        cache.require_room(tokens)
        cache.begin()
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

    def _checked_tokens(self, token_ids: Sequence[int]) -> np.ndarray:
        """The ids as an array [T]. Raises InvalidInput for none, for one that is no whole number, and for one outside the vocabulary."""
        if len(token_ids) == 0:
            raise InvalidInput("the prompt has no tokens: give at least one")
        ids = np.asarray(token_ids)
        if ids.ndim != 1:
            raise InvalidInput(f"token ids of shape {ids.shape}: give those of one prompt, [T]")
        if ids.dtype.kind not in "iu":
            wrong = next(token_id for token_id in token_ids if isinstance(token_id, bool) or not isinstance(token_id, Integral))
            raise InvalidInput(f"token id {wrong!r} is not a whole number: give the ids that the tokenizer makes")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise InvalidInput(
                f"token id {wrong} is outside this model's vocabulary of {self.config.vocab_size}: use the tokenizer that belongs to it"
            )
        return ids

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
        if self.ranks.tensor.size == 1:
            return configs
        check_split(self._whole_config, self.ranks.tensor.size, configs)
        return [local_attention(config, Shard(self.ranks.tensor.rank, self.ranks.tensor.size)) for config in configs]

    def _plan(self, configs: list[AttentionConfig], later: Sequence[AttentionConfig] = ()) -> MemoryPlan | None:
        """What this attention will take of the device; None on a host, whose memory is not planned."""
        memory = self._layers.memory
        if memory is None:
            return None
        return MemoryPlan(self.config, configs, self.forward.dtype.itemsize, memory, self.ranks.context.size, later)

    def _chunks(
        self, tokens: int, cache: KVCache, configs: list[AttentionConfig], chunk_size: int | None, *, all_logits: bool = False
    ) -> list[tuple[int, int]]:
        """[start, stop) of the chunks: whole query blocks each, so that chunking cannot change a block decision."""
        if chunk_size is not None and chunk_size < 1:
            raise InvalidInput(f"chunk_size={chunk_size} is no chunk: give at least 1, or None for the default")
        unit, sharing = whole_blocks(configs), self.ranks.context.size
        plan = self._plan(configs)
        if chunk_size is None and plan is not None:
            for layer, config in enumerate(configs):
                cache.running_summary(layer, config)  # takes its memory now, so that what is free then is known
            own = plan.chunk_size(ceil_div(tokens, sharing), cache.length + tokens, all_logits=all_logits)
            chunk_size = min(self.ranks.world.gather_values(own)) * sharing  # devices differ in what is free
        size = ceil_div(chunk_size or DEFAULT_CHUNK_SIZE * sharing, unit) * unit
        if chunk_size is not None and size != chunk_size:
            warnings.warn(f"chunk_size {chunk_size} is rounded up to {size}, a multiple of the block size {unit}", stacklevel=3)
        return [(start, min(tokens, start + size)) for start in range(0, tokens, size)]

    def _to_host(self, logits: Any) -> np.ndarray:
        host: np.ndarray = self._layers.to_host(logits)
        return host
