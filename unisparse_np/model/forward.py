"""The forward pass of llama, mistral, qwen2 and qwen3 models, over the layers and the attention of any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..attention import AttentionConfig, attend
from ..errors import CheckpointError
from ..parallel import ONE_PROCESS, Ranks
from ..trace import Trace
from .config import ModelConfig
from .context_split import ContextSplit, TokenIds
from .kv_cache import KVCache
from .memory_plan import whole_blocks
from .sharding import join_vocabulary
from .weights import LayerWeights, Weights

Observer = Callable[[int, Any, Any, Any, Any, Trace], None]  # layer, q [Hq, T, d], k and v [Hkv, Lk, d], out [Hq, T, d], trace


class ForwardPass:
    """Token ids in, hidden states and logits out: x += attention(norm(x)), x += MLP(norm(x)), layer by layer.

    What is computed in which precision is the backend's: x, the residual stream, may be wider than what is multiplied.
    Each half layer is a function of its own, so that its arrays are free again when it returns.

    On several ranks each holds a part of the model (sharding.py) or computes a part of the chunk's rows (context_split.py). They
    exchange the products after attention and MLP, which are summands, a layer's keys and values, and the logits.

    Args:
        check_finite: look after every half layer for NaN and infinity, and name the first place; False costs nothing.
        ranks: who computes with this process; config and weights are those of its own part.
    """

    def __init__(self, config: ModelConfig, weights: Weights, backend: Any, check_finite: bool = False, ranks: Ranks = ONE_PROCESS) -> None:
        self.config, self.weights, self.backend, self.check_finite = config, weights, backend, check_finite
        self._tensor, self._context = ranks.tensor, ranks.context
        self.dtype = backend.layers.compute_dtype(weights.embedding.dtype)  # of products, q, k, v and the cache
        self._layers = backend.layers
        self._keep_pace = backend.layers.new_pacer()

    def hidden(
        self, token_ids: TokenIds, cache: KVCache, configs: Sequence[AttentionConfig], *, count: bool, observer: Observer | None = None
    ) -> Any:
        """T ids after those in the cache -> x [T, hidden] before the last norm; the cache holds them then.

        count: whether the layers' densities take this call in.
        """
        split, x = self._own_rows(token_ids, cache, configs, count, observer)
        return split.whole(self._layers.xp, x)

    def last_hidden(
        self, token_ids: TokenIds, cache: KVCache, configs: Sequence[AttentionConfig], *, count: bool, observer: Observer | None = None
    ) -> Any:
        """The same for the last position alone: [1, hidden], a copy."""
        split, x = self._own_rows(token_ids, cache, configs, count, observer)
        return split.last(x)

    def _own_rows(
        self, token_ids: TokenIds, cache: KVCache, configs: Sequence[AttentionConfig], count: bool, observer: Observer | None
    ) -> tuple[ContextSplit, Any]:
        """The rows of x that this rank computes; in one process all of them."""
        layers = self._layers
        split = ContextSplit.of(len(token_ids), whole_blocks(configs), self._context)
        x = layers.embedding(self.weights.embedding, split.own_tokens(token_ids), self.dtype)  # [own rows, hidden]
        rotations = [
            layers.rotary_table(cache.inv_freq, cache.length + start, stop - start, cache.rotary_factor, self.dtype)
            for start, stop in split.runs
        ]
        self._check(x, split, cache, "the embedding")
        alone = self._tensor.size == self._context.size == 1 and observer is None and not self.check_finite
        whole_layer = getattr(self.backend, "whole_layer", None) if alone else None
        for index, (weights, config) in enumerate(zip(self.weights.layers, configs, strict=True)):
            if whole_layer is not None and (trace := whole_layer(index, weights, x, rotations[0], self.config, cache, config)) is not None:
                self._keep_pace()
                if count:
                    cache.add_counts(index, trace)
                continue
            attended = self._attention(index, weights, x, rotations, split, cache, config, count, observer)
            self._add_product(x, attended, weights.output, weights.output_bias)
            del attended
            self._check(x, split, cache, f"the attention of layer {index}")
            self._add_product(x, self._gated(weights, x), weights.down, weights.down_bias)
            self._check(x, split, cache, f"the MLP of layer {index}")
            self._keep_pace()
        cache.advance(len(token_ids))
        return split, x

    def head(self, x: Any) -> Any:
        """x [T, hidden] -> logits [T, vocab], float32 (float64 in a float64 model), the backend's."""
        normed = self._layers.rms_norm(x, self.weights.norm, self.config.rms_norm_eps, self.dtype)
        return self.whole_logits(self._layers.head(normed, self.weights.head))

    def whole_logits(self, logits: Any) -> Any:
        """[T, this rank's rows of the vocabulary] -> [T, vocab]."""
        return join_vocabulary(self._layers.xp, logits, self.config.vocab_size, self._tensor)

    def _attention(
        self, index: int, weights: LayerWeights, x: Any, rotations: list[Any], split: ContextSplit, cache: KVCache,
        config: AttentionConfig, count: bool, observer: Observer | None,
    ) -> Any:  # fmt: skip
        """One layer's attention before its output product: x [own rows, hidden] -> [own rows, Hq d]."""
        running = cache.running_summary(index, config)
        rooms = cache.room(index, split.tokens)
        queries = self._queries(weights, x, rotations, split, rooms, config, running)
        summary = None if running is None else running.summary()
        keys, values = cache.upto(index, cache.length + split.tokens) if cache.length else rooms
        results = []
        for (start, _), (q, q_composites) in zip(split.runs, queries, strict=True):
            out, trace = attend(
                q, keys, values, config, q_offset=cache.length + start, backend=self.backend, key_summary=summary, q_composites=q_composites
            )  # [Hq, t, d]
            if count and (split.shared or self._context.rank == 0):  # what all ranks compute alike counts once
                cache.add_counts(index, trace)
            if observer is not None:
                observer(index, q, keys, values, out, trace)
            results.append(self._layers.merge_heads(out))  # [t, Hq d]
        return split.joined(self._layers.xp, results)

    def _queries(
        self, weights: LayerWeights, x: Any, rotations: list[Any], split: ContextSplit, rooms: tuple[Any, Any], config: AttentionConfig,
        running: Any,
    ) -> list[tuple[Any, Any]]:  # fmt: skip
        """Each own run's q [Hq, t, d] after rotary embedding, and its composites where the backend has pooled them.

        rooms, places in the cache [Hkv, T, d], and the running summary hold the keys and values of the whole chunk then.
        """
        layers, qkv, norms = self._layers, self._qkv(weights, x), self._norms(weights)
        if not split.shared:
            return [layers.rotate_heads(qkv, rotations[0], norms, *rooms, config, running)]
        own = [layers.xp.empty((len(room), len(x), room.shape[2]), dtype=room.dtype) for room in rooms]  # k, v [Hkv, own rows, d]
        queries = [
            layers.rotate_heads(qkv[rows], rotation, norms, *(part[:, rows] for part in own), config, None)
            for (rows, _), rotation in zip(split.rows(), rotations, strict=True)
        ]
        split.gather(layers.xp, *zip(own, rooms, strict=True))
        if running is not None:
            running.extend(rooms[0])
        return queries

    def _qkv(self, weights: LayerWeights, x: Any) -> Any:
        """x [T, hidden] -> [T, Hq + 2 Hkv, d], before rotary embedding."""
        product = self._layers.norm_linear(x, weights.input_norm, self.config.rms_norm_eps, weights.qkv, weights.qkv_bias)
        return product.reshape(len(x), -1, self.config.head_dim)

    def _norms(self, weights: LayerWeights) -> tuple[Any, Any, float] | None:
        """What q and k are normalised by, head by head, where the family does that."""
        return None if weights.q_norm is None else (weights.q_norm, weights.k_norm, self.config.rms_norm_eps)

    def _gated(self, weights: LayerWeights, x: Any) -> Any:
        """The MLP before its last product: x [T, hidden] -> [T, intermediate]."""
        norm, eps = weights.post_attention_norm, self.config.rms_norm_eps
        return self._layers.norm_linear_swiglu(x, norm, eps, weights.gate_up, weights.gate_up_bias)

    def _add_product(self, x: Any, y: Any, weight: Any, bias: Any) -> None:
        """x += y W^T + b, in place, of which each tensor-parallel rank has a summand."""
        if self._tensor.size == 1:
            self._layers.add_linear(x, y, weight, bias)
        else:
            self._layers.add(x, self._tensor.all_reduce(self._layers.linear(y, weight, bias)))

    def _check(self, x: Any, split: ContextSplit, cache: KVCache, place: str) -> None:
        """With check_finite: raises CheckpointError when x [own rows, hidden] holds NaN or infinity after this place."""
        if not self.check_finite:
            return
        rows = self._layers.to_host(self._layers.xp.isfinite(x).all(axis=1))  # [T]
        if not rows.all():
            token = cache.length + split.token_of(int(rows.argmin()))
            raise CheckpointError(
                f"NaN or infinite numbers first appear after {place}, at token {token} of the text: the "
                "weights there hold such values or the arithmetic overflowed, so check the checkpoint or load it with --dtype float32"
            )
