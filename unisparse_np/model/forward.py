"""The forward pass of llama, mistral, qwen2 and qwen3 models, over the layers and the attention of any backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..attention import AttentionConfig, attend
from ..errors import CheckpointError
from ..trace import Trace
from .config import ModelConfig
from .kv_cache import KVCache
from .weights import LayerWeights, Weights

Observer = Callable[[int, Any, Any, Any, Any, Trace], None]  # layer, q [Hq, T, d], k and v [Hkv, Lk, d], out [Hq, T, d], trace


class ForwardPass:
    """Token ids in, hidden states and logits out: x += attention(norm(x)), x += MLP(norm(x)), layer by layer.

    What is computed in which precision is the backend's: x, the residual stream, may be wider than what is multiplied.
    Each half layer is a function of its own, so that its arrays are free again when it returns.

    Args:
        check_finite: look after every half layer for NaN and infinity, and name the first place; False costs nothing.
    """

    def __init__(self, config: ModelConfig, weights: Weights, backend: Any, check_finite: bool = False) -> None:
        self.config, self.weights, self.backend, self.check_finite = config, weights, backend, check_finite
        self.dtype = backend.layers.compute_dtype(weights.embedding.dtype)  # of products, q, k, v and the cache
        self._layers = backend.layers
        self._keep_pace = backend.layers.new_pacer()

    def hidden(
        self, token_ids: Sequence[int], cache: KVCache, configs: Sequence[AttentionConfig], *, count: bool, observer: Observer | None = None
    ) -> Any:
        """T ids after those in the cache -> x [T, hidden] before the last norm; the cache holds them then.

        count: whether the layers' densities take this call in.
        """
        layers = self._layers
        x = layers.embedding(self.weights.embedding, token_ids, self.dtype)  # [T, hidden]
        rotation = layers.rotary_table(cache.inv_freq, cache.length, len(token_ids), cache.rotary_factor, self.dtype)
        self._check(x, cache, "the embedding")
        for index, (weights, config) in enumerate(zip(self.weights.layers, configs, strict=True)):
            attended = self._attention(index, weights, x, rotation, cache, config, count, observer)
            layers.add_linear(x, attended, weights.output, weights.output_bias)
            del attended
            self._check(x, cache, f"the attention of layer {index}")
            layers.add_linear(x, self._gated(weights, x), weights.down, weights.down_bias)
            self._check(x, cache, f"the MLP of layer {index}")
            self._keep_pace()
        cache.advance(len(token_ids))
        return x

    def head(self, x: Any) -> Any:
        """x [T, hidden] -> logits [T, vocab], float32 (float64 in a float64 model), the backend's."""
        normed = self._layers.rms_norm(x, self.weights.norm, self.config.rms_norm_eps, self.dtype)
        return self._layers.head(normed, self.weights.head)

    def _attention(
        self, index: int, weights: LayerWeights, x: Any, rotation: Any, cache: KVCache, config: AttentionConfig, count: bool,
        observer: Observer | None,
    ) -> Any:  # fmt: skip
        """One layer's attention before its output product: x [T, hidden] -> [T, Hq d]."""
        tokens, stop = len(x), cache.length + len(x)
        running = cache.running_summary(index, config)
        q, q_composites = self._layers.rotate_heads(
            self._qkv(weights, x), rotation, self._norms(weights), *cache.room(index, tokens), config, running
        )  # [Hq, T, d]
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

    def _qkv(self, weights: LayerWeights, x: Any) -> Any:
        """x [T, hidden] -> [T, Hq + 2 Hkv, d], before rotary embedding."""
        normed = self._layers.rms_norm(x, weights.input_norm, self.config.rms_norm_eps, self.dtype)
        return self._layers.linear(normed, weights.qkv, weights.qkv_bias).reshape(len(x), -1, self.config.head_dim)

    def _norms(self, weights: LayerWeights) -> tuple[Any, Any, float] | None:
        """What q and k are normalised by, head by head, where the family does that."""
        return None if weights.q_norm is None else (weights.q_norm, weights.k_norm, self.config.rms_norm_eps)

    def _gated(self, weights: LayerWeights, x: Any) -> Any:
        """The MLP before its last product: x [T, hidden] -> [T, intermediate]."""
        normed = self._layers.rms_norm(x, weights.post_attention_norm, self.config.rms_norm_eps, self.dtype)
        return self._layers.swiglu(self._layers.linear(normed, weights.gate_up, weights.gate_up_bias))

    def _check(self, x: Any, cache: KVCache, place: str) -> None:
        """With check_finite: raises CheckpointError when x [T, hidden] holds NaN or infinity after this place."""
        if not self.check_finite:
            return
        rows = self._layers.to_host(self._layers.xp.isfinite(x).all(axis=1))  # [T]
        if not rows.all():
            raise CheckpointError(
                f"NaN or infinite numbers first appear after {place}, at token {cache.length + int(rows.argmin())} of the text: the "
                "weights there hold such values or the arithmetic overflowed, so check the checkpoint or load it with --dtype float32"
            )
