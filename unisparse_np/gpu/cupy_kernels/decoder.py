"""One decode step as a CUDA graph: every launch of the model for one token, recorded once and replayed for each.

Token and position are read from device memory, all buffers are made beforehand, and the only thing the host does per token is to
write those two numbers and to start the graph. A step is bound by reading the weights, so the products (cuda/gemv.cu) take in what
lies between them: RMSNorm in front, SwiGLU and the residual sum behind. On Hopper a product fetches its first weights while the launch
before it ends (overlap.py).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import KeySummary, Problem
from . import gemv, layers
from .decode_attention import DecodeAttention, can_decode
from .device import kernel
from .overlap import overlap_is_possible
from .rotation import element, rotation_of, write_rotary_table


class LayerStep(NamedTuple):
    """What one layer's part of a step reads and writes."""

    weights: Any  # model.weights.LayerWeights
    keys: Any  # [Hkv, capacity, d], all of the cache
    values: Any
    attention: DecodeAttention
    summary: KeySummary | None


def new_decoder(config: Any, weights: Any, cache: Any, attention: Sequence[Any], tensor: Any = None) -> Decoder | None:
    """The decoder of a model over a cache, or None where its shapes or dtype are not those of the decode kernels (float32, and head
    dims that are no multiple of 16): its steps then go layer by layer like a prefill of one token.

    Args:
        config: the ModelConfig; weights: its Weights; cache: the KVCache that the steps extend.
        attention: "dense" or a UniSparseConfig for each layer.
        tensor: a Communicator of CuPy arrays among the ranks that share the model, where there are several; config, weights and
            cache are then this rank's part, and so are the logits.
    """
    dtype = weights.embedding.dtype
    heads = (config.num_attention_heads, config.num_key_value_heads)
    for choice in set(attention):
        sparse = isinstance(choice, UniSparseConfig)
        problem = Problem(*heads, 1, cache.capacity, config.head_dim, choice if sparse else UniSparseConfig())
        if not can_decode(problem, dtype, sparse):
            return None
    return Decoder(config, weights, cache, attention, tensor)


class Decoder:
    """Reads one token after another into a cache; see `new_decoder`.

    The first step launches its kernels one by one, which compiles them; the second records the graph, exchanges of several ranks
    included.
    """

    def __init__(self, config: Any, weights: Any, cache: Any, attention: Sequence[Any], tensor: Any = None) -> None:
        self._config, self._weights, self._attention = config, weights, list(attention)
        self._cache = weakref.proxy(cache)  # which holds its decoders: a circle would keep its memory until Python looks for circles
        dtype, hidden, dim = weights.embedding.dtype, config.hidden_size, config.head_dim
        heads = (config.num_attention_heads, config.num_key_value_heads)
        self._attentions = {choice: DecodeAttention(*heads, dim, cache.capacity, choice, dtype) for choice in set(attention)}
        self._token_and_position = cupy.zeros(2, np.int32)
        self._token, self._position = self._token_and_position[:1], self._token_and_position[1:]
        self._inv_freq = cupy.asarray(cache.inv_freq, dtype=np.float32)
        self._table = cupy.empty((1, dim // 2, 2), np.float32)
        self._x = cupy.empty((1, hidden), np.float32)  # the residual stream
        self._qkv = cupy.empty((1, heads[0] + 2 * heads[1], dim), dtype)
        self._q = cupy.empty((heads[0], 1, dim), dtype)
        self._attended = cupy.empty((heads[0], dim), dtype)
        self._gated = cupy.empty((1, config.intermediate_size), dtype)
        self._logits = cupy.empty(len(weights.head), np.float32)
        self._tensor = None if tensor is None or tensor.size == 1 else tensor
        self._summand = cupy.empty((1, hidden), dtype)  # this rank's of a product, where there are several
        self._set_step = kernel("layers.cu", "set_step", 0, **element(dtype), WIDTH=hidden, THREADS=layers.threads_of_row(hidden))
        self._steps: list[LayerStep] = []
        self._running: list[Any] = []  # the layers' RunningKeySummary, None where dense
        self._length_expected = -1  # of the cache, if nobody else wrote to it since the last step
        self._overlap = overlap_is_possible()
        self._rotation = rotation_of(*heads, 1, dim, dtype, None, self._overlap)
        self._warm = False
        self._graph: Any = None

    def step(self, token_id: int) -> Any:
        """Append one token to the cache -> its logits [vocab] float32 on the device, valid until the next step. Waits for nothing.

        On several ranks: the logits of this rank's rows of the vocabulary.
        """
        if self._cache.length != self._length_expected:
            self._catch_up()
        self._set_step((1,), (1,), (self._token_and_position, np.int32(token_id), np.int32(self._cache.length)))
        if not self._warm:
            self._launch()
            self._warm = True
        else:
            if self._graph is None:
                self._graph = self._record()
            self._graph.launch()
        self._cache.advance(1)
        self._length_expected = self._cache.length
        return self._logits

    def attention_of(self, choice: Any) -> DecodeAttention:
        """What computes the attention of the layers with this "dense" or UniSparseConfig."""
        return self._attentions[choice]

    def _catch_up(self) -> None:
        """Others have written keys: have the key summaries take them in, and record anew where a summary is not the same object."""
        cache = self._cache
        running = [cache.running_summary(layer, choice) for layer, choice in enumerate(self._attention)]
        if self._steps and all(a is b for a, b in zip(running, self._running, strict=True)):
            return
        self._running, self._graph = running, None
        self._steps = [self._layer_step(layer, choice, running[layer]) for layer, choice in enumerate(self._attention)]

    def _layer_step(self, layer: int, choice: Any, running: Any) -> LayerStep:
        keys, values = self._cache.upto(layer, self._cache.capacity)
        summary = None if running is None else running.whole()
        return LayerStep(self._weights.layers[layer], keys, values, self._attentions[choice], summary)

    def _record(self) -> Any:
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            self._launch()
            return stream.end_capture()

    def _launch(self) -> None:
        """The whole step, from the token and position in device memory to the logits."""
        eps = self._config.rms_norm_eps
        layers.write_embedding(self._weights.embedding, self._token, self._x)
        write_rotary_table(self._inv_freq, 0, self._position, self._cache.rotary_factor, self._table)
        for step in self._steps:
            self._launch_attention(step, eps)
            weights = step.weights
            norm = weights.post_attention_norm
            gemv.norm_gemv_swiglu(weights.gate_up, self._x, norm, eps, weights.gate_up_bias, self._gated, self._overlap)
            self._add_product(self._gated, weights.down, weights.down_bias)
        gemv.norm_gemv_float32(self._weights.head, self._x, self._weights.norm, eps, self._logits, self._overlap)

    def _launch_attention(self, step: LayerStep, eps: float) -> None:
        weights, overlap = step.weights, self._overlap
        gemv.norm_gemv(weights.qkv, self._x, weights.input_norm, eps, weights.qkv_bias, self._qkv, overlap)
        norms = None if weights.q_norm is None else (weights.q_norm, weights.k_norm, eps)
        outputs = (self._q, step.keys, step.values)
        self._rotation.launch(self._qkv, self._table, norms, self._position, outputs)
        step.attention.launch(self._q[:, 0], step.keys, step.values, self._position, step.summary, self._attended, overlap)
        self._add_product(self._attended, weights.output, weights.output_bias)

    def _add_product(self, y: Any, weight: Any, bias: Any) -> None:
        """x += y W^T + b, of which each rank has a summand."""
        if self._tensor is None:
            gemv.gemv_add(weight, y, bias, self._x, self._overlap)
        else:
            gemv.gemv(weight, y, bias, self._summand)
            layers.add(self._x, self._tensor.all_reduce(self._summand))
