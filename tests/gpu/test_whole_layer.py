"""A prompt's layers in one call each, on a real device: to the bit what their parts give, and in no more memory than is planned."""

from functools import lru_cache

import numpy as np
import pytest

from benchmarks.random_llama import random_llama
from unisparse_np import UniSparseConfig
from unisparse_np.attention import load_model_backend
from unisparse_np.model.config import ModelConfig

pytestmark = pytest.mark.gpu

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 3, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "hidden_act": "silu",
    "max_position_embeddings": 16384, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
ATTENTIONS = {
    "dense": "dense",
    "Top-P": UniSparseConfig(top_p=0.6),
    "row threshold": UniSparseConfig(64, 2, 4, top_p=None, row_threshold=0.02),
    "two sizes": UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.1, top_p_compress=8),
    "no anchors": UniSparseConfig(128, 8, 8, 3, top_p=0.5, key_anchors=0),
}
CHUNKS = [(4096, 8), (8128,), (1024, 1024, 200), (70, 100)]  # tokens of each call; the cache has room for 8,192
CASES = [*((64, name) for name in ATTENTIONS), (128, "Top-P")]


@lru_cache(maxsize=1)
def model_of(head_dim):
    return random_llama(ModelConfig.from_dict(SHAPE | {"head_dim": head_dim}), load_model_backend("cupy"), 16384)


def read(model, attention, chunks):
    ids = np.random.default_rng(1).integers(0, 512, sum(chunks)).tolist()
    cache, start, rows = model.new_cache(8192, attention), 0, []
    for tokens in chunks:
        rows.append(model.prefill(ids[start : start + tokens], cache, attention))
        start += tokens
    keys_and_values = [x.view(np.uint16).get() for layer in range(3) for x in cache.upto(layer, start)]
    return [*rows, *keys_and_values], cache.densities()


@pytest.mark.parametrize(("head_dim", "name"), CASES)
def test_layers_in_one_call_are_their_parts(head_dim, name, monkeypatch):
    model, attention = model_of(head_dim), ATTENTIONS[name]
    found = [read(model, attention, chunks) for chunks in CHUNKS]
    monkeypatch.setattr(model.backend, "whole_layer", None)
    for (arrays, densities), chunks in zip(found, CHUNKS, strict=True):
        expected, densities_by_parts = read(model, attention, chunks)
        for a, b in zip(arrays, expected, strict=True):
            np.testing.assert_array_equal(a, b)
        assert densities == densities_by_parts


def test_a_layer_takes_no_more_memory_than_is_planned(cupy):
    model, pool, attention, tokens = model_of(64), cupy.get_default_memory_pool(), ATTENTIONS["row threshold"], 8000
    model.prefill([3] * tokens, model.new_cache(8192, attention), attention)  # what is made once
    cache = model.new_cache(8192, attention)
    for layer in range(3):
        cache.running_summary(layer, attention)
    pool.free_all_blocks()
    held = pool.total_bytes()
    model.prefill([5] * tokens, cache, attention)
    assert pool.total_bytes() - held <= model._plan([attention] * 3).chunk_bytes(tokens, tokens)
