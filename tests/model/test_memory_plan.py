"""The memory plan: chunks as large as pay and fit, and refusals that say how many tokens would fit."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.llama_checkpoints import load_case
from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.memory_plan import LARGEST_CHUNK, MemoryPlan

GIB = 1 << 30
SMALL = ModelConfig.from_dict(load_case("llama_transformers5").config)
LLAMA_8B = ModelConfig.from_dict(
    {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "silu",
    }
)  # fmt: skip


def plan(config: ModelConfig, free: float, attention="dense") -> MemoryPlan:
    """Of attention its outputs alone count, and of key summaries the composites."""
    memory = SimpleNamespace(
        free_bytes=lambda: int(free),
        attention_bytes=lambda p, itemsize, sparse: itemsize * p.num_q_heads * p.q_len * p.head_dim,
        summary_bytes=lambda p, itemsize: itemsize * p.num_kv_heads * p.num_k_composites * p.head_dim,
    )
    return MemoryPlan(config, [attention] * config.num_hidden_layers, 2, memory)


def test_the_cache_is_keys_values_and_what_sparse_layers_keep():
    dense = plan(LLAMA_8B, 0).cache_bytes(131072)
    assert dense == 2 * 32 * 8 * 131072 * 128 * 2  # 17.2 GB
    sparse = plan(LLAMA_8B, 0, UniSparseConfig()).cache_bytes(131072)
    assert sparse - dense == 32 * 8 * 16384 * 128 * 2


@pytest.mark.parametrize(
    ("decode", "composites"),
    [("dense", 16384), (UniSparseConfig(), 16384), (UniSparseConfig(top_p=0.5), 16384), (UniSparseConfig(k_compress=4), 3 * 16384)],
)
def test_steps_that_pool_keys_in_their_own_way_need_their_own_summaries(decode, composites):
    both = replace(plan(LLAMA_8B, 0, UniSparseConfig()), decode_attentions=[decode] * 32).cache_bytes(131072)
    assert both - plan(LLAMA_8B, 0).cache_bytes(131072) == 32 * 8 * composites * 128 * 2
    alone = replace(plan(LLAMA_8B, 0), decode_attentions=[UniSparseConfig()] * 32).cache_bytes(131072)
    assert alone == plan(LLAMA_8B, 0, UniSparseConfig()).cache_bytes(131072)


def test_chunks_are_as_large_as_pay_and_fit():
    assert plan(LLAMA_8B, 60 * GIB).chunk_size(131072, 131072) == 8192
    assert plan(SMALL, 60 * GIB).chunk_size(131072, 131072) == LARGEST_CHUNK
    sizes = [plan(LLAMA_8B, free * GIB).chunk_size(131072, 131072) for free in (2, 1, 0.6, 0.35)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == 8192 and 256 <= sizes[-1] < 1024
    for free, size in zip((2, 1, 0.6, 0.35), sizes, strict=True):
        assert plan(LLAMA_8B, 0).chunk_bytes(size, 131072) <= free * GIB


def test_chunks_are_whole_blocks():
    for block_size in (96, 320, 1000):
        config = UniSparseConfig(block_size=block_size, q_compress=8, k_compress=8)
        for free in (0.5, 1, 20):
            assert plan(LLAMA_8B, free * GIB, config).chunk_size(131072, 131072) % block_size == 0


def test_a_short_prompt_needs_no_more_than_itself():
    assert plan(LLAMA_8B, 0.3 * GIB).chunk_size(100, 100) >= 100


def test_logits_of_every_position_make_chunks_smaller():
    assert plan(LLAMA_8B, 2 * GIB).chunk_size(131072, 131072, all_logits=True) < plan(LLAMA_8B, 2 * GIB).chunk_size(131072, 131072)


def test_no_chunk_fits():
    with pytest.raises(InvalidInput, match=r"reading 256 tokens at a time needs 0.28 GiB, and the GPU has 0.10 GiB free"):
        plan(LLAMA_8B, 0.1 * GIB).chunk_size(131072, 131072)


def test_what_would_fit_fits_and_one_more_does_not():
    short = plan(LLAMA_8B, 10 * GIB, UniSparseConfig())
    with pytest.raises(InvalidInput, match=r"131072 tokens need 1\d.\d GiB beside the weights, and the GPU has 10.0 GiB free") as refusal:
        short.require(131072)
    fitting = int(str(refusal.value).split("free: ")[1].split()[0])
    assert 60000 < fitting < 80000
    short.require(fitting)
    with pytest.raises(InvalidInput, match=f"{fitting} tokens would fit"):
        short.require(fitting + 1)
