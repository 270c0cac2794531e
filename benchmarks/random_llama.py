"""A Llama of a real model's shape with random bfloat16 weights, made where the backend computes, or the part of one rank."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.sharding import Shard, local_config, vocabulary_rows
from unisparse_np.model.weights import LayerWeights, Weights
from unisparse_np.parallel import ONE_PROCESS, Ranks


def random_llama(config: ModelConfig, backend: Any, max_context: int, ranks: Ranks = ONE_PROCESS) -> Llama:
    """Every product keeps the size of what goes in. Ranks draw different numbers: times are the same, answers mean nothing."""
    return Llama(config, random_weights(config, backend, ranks), backend, max_context, ranks=ranks)


def random_weights(config: ModelConfig, backend: Any, ranks: Ranks) -> Weights:
    """Of the part that this rank holds."""
    xp, vector = backend.xp, backend.layers.vector_dtype(np.dtype(ml_dtypes.bfloat16))
    random = xp.random.default_rng(ranks.world.rank)
    part, shard = local_config(config, ranks.tensor.size), Shard(ranks.tensor.rank, ranks.tensor.size)
    hidden, inner, d = part.hidden_size, part.intermediate_size, part.head_dim
    heads, kv_heads = part.num_attention_heads, part.num_key_value_heads

    def matrix(rows: int, columns: int) -> Any:
        values = random.standard_normal(rows * columns, dtype=np.float32).reshape(rows, columns) * np.float32(columns**-0.5)
        bits = values.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return rounded.astype(np.uint16).view(ml_dtypes.bfloat16)

    def layer() -> LayerWeights:
        return LayerWeights(
            input_norm=xp.ones(hidden, vector), qkv=matrix((heads + 2 * kv_heads) * d, hidden), output=matrix(hidden, heads * d),
            post_attention_norm=xp.ones(hidden, vector), gate_up=matrix(2 * inner, hidden), down=matrix(hidden, inner),
        )  # fmt: skip

    own = vocabulary_rows(config.vocab_size, shard)
    return Weights(
        embedding=matrix(config.vocab_size, hidden),
        layers=[layer() for _ in range(config.num_hidden_layers)],
        norm=xp.ones(hidden, vector),
        head=matrix(own.stop - own.start, hidden),
    )
