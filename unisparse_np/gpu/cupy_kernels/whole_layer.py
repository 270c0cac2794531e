"""A layer of a prompt's chunk in one call, from the residual stream to the residual stream, with half of the host's work.

The kernels are those of layers.py, rotation.py and run.py, in the same order and over the same numbers: results are the same to the bit.
Only the host's part differs: all arrays between lie in one piece of memory, selection and attention are one recorded program, and from
layer to layer nothing but addresses changes. Small models would wait for their host otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import Problem
from ...trace import Trace
from .attend import attending, kernel_name, runs_on_hopper, work_layout
from .decode_attention import splits_keys
from .key_summary import NO_PLACES
from .layers import add_linear_at, merging, mlp_layout, norm_linear_at, norm_linear_swiglu_at
from .plan import plan_of
from .program import Launch, Program, base
from .room import Layout, allocate
from .rotation import rotation_of
from .run import DeviceTrace, selection, selection_layout
from .scores import adds_to_scores
from .select import empty_mask
from .shapes import NO_ROWS, Rows, contiguous_rows, is_float16, positions, uses_tensor_cores

KEYS, VALUES, COMPOSITES, ANCHORS, WORDS, COUNTS, ROOM = map(base, range(7))  # of a program's call


def whole_layer(index: int, weights: Any, x: Any, table: Any, config: Any, cache: Any, attention: Any) -> Trace | None:
    """x [T, hidden] float32 += attention(norm(x)), then += MLP(norm(x)), in place; keys, values and their summary go into the cache.

    Args:
        index: of the layer; weights: its LayerWeights. table: as `rotary_table` makes it for these T positions.
        config: the ModelConfig. cache: the KVCache, with all tokens before these. attention: "dense" or the layer's UniSparseConfig.

    Returns:
        The attention's Trace with its counts alone, or None where nothing was done: the layer's parts have to be called one by one.
    """
    tokens, start, dtype = x.shape[0], cache.length, weights.qkv.dtype
    heads, mlp, device = (config.num_attention_heads, config.num_key_value_heads), weights.gate_up.shape, cupy.cuda.runtime.getDevice()
    shape = _shape(*heads, config.head_dim, mlp, tokens, start, cache.capacity, attention, dtype, device)
    if not shape.possible:
        return None
    running = cache.running_summary(index, attention)
    return shape.run(index, weights, x, table, config.rms_norm_eps, cache.whole(), running)


@lru_cache(maxsize=256)
def _shape(*shape: Any) -> WholeLayer:
    """Worked out once, for the current device, which the last of them names."""
    return WholeLayer(*shape[:-1])


class WholeLayer:
    """What the layers of one chunk have in common.

    Attributes:
        possible: whether these shapes and this dtype run so.

    Args:
        q_heads, kv_heads, dim: of attention. mlp: shape [2 intermediate, hidden] of the MLP's first weight.
        tokens, start: of the chunk. capacity: tokens that the cache has room for.
        attention: "dense" or a UniSparseConfig. dtype: of the weights.
    """

    def __init__(
        self, q_heads: int, kv_heads: int, dim: int, mlp: tuple[int, int], tokens: int, start: int, capacity: int, attention: Any,
        dtype: np.dtype,
    ) -> None:  # fmt: skip
        self._sparse = isinstance(attention, UniSparseConfig)
        pooling = attention if self._sparse else UniSparseConfig()
        problem = Problem(q_heads, kv_heads, tokens, start + tokens, dim, pooling)
        self.possible = q_heads > 1 and uses_tensor_cores(problem, dtype) and not splits_keys(problem, dtype)
        self.possible &= not self._sparse or start % pooling.block_size == 0  # the key summary goes on where a block begins
        if not self.possible:
            return
        self._plan, self._dtype, self._tokens, self._start = plan_of(problem), dtype, tokens, start
        self.possible &= not (self._sparse and self._plan.once(adds_to_scores))
        self._rotation = rotation_of(q_heads, kv_heads, tokens, dim, dtype, pooling if self._sparse else None)
        self._strides = (capacity * dim, dim) * 2  # of keys and values
        self._layer_bytes = kv_heads * capacity * dim * dtype.itemsize
        self._name = kernel_name(dim, pooling.block_size, runs_on_hopper(problem), is_float16(dtype))
        self._layout, self._mlp = self._attention_layout(mlp[1]), mlp_layout(tokens, *mlp, dtype.itemsize)
        self._with_anchors = self._sparse and pooling.key_anchors > 0
        composites = Problem(q_heads, kv_heads, 1, capacity, dim, pooling).num_k_composites
        self._composites = Rows(None, COMPOSITES, composites * dim, dim)
        self._program = Program(self._launches())

    def _attention_layout(self, hidden: int) -> Layout:
        """Memory up to the second product; merged heads lie over the norm's result and the output over qkv, which nobody reads by then."""
        problem, row = self._plan.problem, self._tokens * self._dtype.itemsize
        width = problem.num_q_heads * problem.head_dim
        stages = self._plan.once(work_layout).size
        if self._sparse:
            stages = max(stages, self._plan.once(selection_layout).offsets["kc"])
        return Layout(
            normed=row * max(hidden, width),
            qkv=row * (width + 2 * problem.num_kv_heads * problem.head_dim),
            q=row * width,
            q_composites=2 * int(np.prod(self._rotation.q_composites)) if self._sparse else 0,
            lse=4 * problem.num_q_heads * self._tokens,
            stages=stages,
        )

    def _launches(self) -> Iterator[Launch]:
        """Selection, attention, and heads side by side."""
        plan, room, of_float16 = self._plan, self._layout.addresses(ROOM), is_float16(self._dtype)
        problem = plan.problem
        heads, tokens, dim = plan.out_shape
        anchors = ANCHORS if self._with_anchors else 0
        words, counts = (WORDS, COUNTS) if self._sparse else (0, 0)
        if self._sparse:
            kc, qc = self._composites, room["q_composites"]
            yield from selection(NO_ROWS, NO_ROWS, kc, qc, room["stages"], words, counts, anchors, plan, of_float16, keep_scores=False)
        k, v = (Rows(None, at, *self._strides[:2]) for at in (KEYS, VALUES))
        q, out = contiguous_rows(room["q"], plan.out_shape), room["qkv"]
        heads_per_mask = problem.config.head_compress if self._sparse else 1
        yield from attending(
            q, k, v, out, room["lse"], room["stages"], words, counts, anchors, heads_per_mask, plan, of_float16, runs_on_hopper(problem)
        )
        yield merging(out, room["normed"], heads, tokens, dim, self._dtype)

    def run(self, index: int, weights: Any, x: Any, table: Any, eps: float, cache: tuple[Any, Any], running: Any) -> Trace:
        """The layer; cache: all layers' keys and values [layers, Hkv, capacity, d]."""
        keys, start, tokens = cache[0], self._start, self._tokens
        k_at, v_at = (part.data.ptr + index * self._layer_bytes for part in cache)
        memory = allocate(max(self._layout.size, self._mlp.size))
        room = self._layout.addresses(memory.ptr)
        norm_linear_at(x, weights.input_norm, eps, weights.qkv, weights.qkv_bias, room["normed"], room["qkv"])
        places = running.room(tokens) if self._sparse else NO_PLACES
        new_at = start * self._strides[1] * self._dtype.itemsize
        q_composites = room["q_composites"] if self._sparse else 0
        norms = None if weights.q_norm is None else (weights.q_norm, weights.k_norm, eps)
        addresses = (room["qkv"], table.data.ptr, 0, room["q"], k_at + new_at, v_at + new_at, q_composites)
        self._rotation.launch_at(addresses, norms, self._strides, places, start if self._sparse else 0)
        kc_at = anchors_at = words_at = counts_at = 0
        if self._sparse:
            running.took(tokens, lambda: keys[index, :, start : start + tokens])
            (kc_at, anchors_at), mask = running.addresses(), empty_mask(self._plan)
            if self._with_anchors and not anchors_at:
                anchors = positions(running.summary().anchors)
                anchors_at = anchors.data.ptr
            words_at, counts_at = mask.words_at, mask.counts_at
            trace: Trace = DeviceTrace(self._name, None, mask, None, self._plan)
        else:
            trace = Trace(f"{self._name} dense", self._plan.visible_blocks, self._plan.visible_blocks, None)
        self._program.run(k_at, v_at, kc_at, anchors_at, words_at, counts_at, memory.ptr)
        add_linear_at(x, room["normed"], weights.output, weights.output_bias)
        room = self._mlp.addresses(memory.ptr)
        norm_linear_swiglu_at(x, weights.post_attention_norm, eps, weights.gate_up, weights.gate_up_bias, room)
        add_linear_at(x, room["gated"], weights.down, weights.down_bias)
        return trace
