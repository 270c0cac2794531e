"""The cache: filled from the front without moving, each key pooled once."""

from types import SimpleNamespace

import numpy as np
import pytest

from tests.llama_checkpoints import load_case
from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.kv_cache import KVCache
from unisparse_np.trace import Trace

CONFIG = UniSparseConfig(block_size=8, q_compress=2, k_compress=4, key_anchors=2)


@pytest.fixture
def cache():
    config = ModelConfig.from_dict(load_case("llama_transformers5").config)
    return KVCache(config, 40, load_backend("reference"), np.float64)


def fill(cache: KVCache, keys: np.ndarray, attention="dense") -> None:
    """Append keys [layers, Hkv, T, d] (values are their negatives) the way the model does."""
    for layer, layer_keys in enumerate(keys):
        running = cache.running_summary(layer, attention)
        k_room, v_room = cache.room(layer, keys.shape[2])
        k_room[...], v_room[...] = layer_keys, -layer_keys
        if running is not None:
            running.extend(k_room)
    cache.advance(keys.shape[2])


def test_tokens_are_appended_in_place(cache):
    keys = np.random.default_rng(0).standard_normal((2, 2, 30, 16))
    fill(cache, keys[:, :, :11])
    early, _ = cache.upto(1, 11)
    fill(cache, keys[:, :, 11:])
    assert cache.length == 30
    k, v = cache.upto(1, 30)
    np.testing.assert_array_equal(k, keys[1])
    np.testing.assert_array_equal(v, -keys[1])
    assert np.shares_memory(early, k)


def test_each_key_is_pooled_once_and_the_summary_is_that_of_all_keys(cache, monkeypatch):
    keys = np.random.default_rng(1).standard_normal((2, 2, 30, 16))
    backend = load_backend("reference")
    pooled: list[int] = []
    extend = backend.RunningKeySummary.extend
    monkeypatch.setattr(backend.RunningKeySummary, "extend", lambda self, k: (pooled.append(k.shape[1]), extend(self, k))[1])
    for start, stop in ((0, 8), (8, 9), (9, 30)):
        fill(cache, keys[:, :, start:stop], CONFIG)
    summary = cache.running_summary(0, CONFIG).summary()
    assert pooled == [8, 8, 1, 1, 21, 21]  # two layers
    fresh = backend.RunningKeySummary(CONFIG, 4, 2, 16, 30, np.float64)
    fresh.extend(keys[0])
    for mine, theirs in zip(summary, fresh.summary(), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_a_summary_made_late_or_left_behind_catches_up(cache):
    keys = np.random.default_rng(2).standard_normal((2, 2, 20, 16))
    fill(cache, keys[:, :, :5])
    assert cache.running_summary(0, "dense") is None
    assert cache.running_summary(1, CONFIG).length == 5
    fill(cache, keys[:, :, 5:])  # dense steps
    running = cache.running_summary(1, CONFIG)
    assert running.length == 20
    np.testing.assert_allclose(running.summary().kc[:, 1], keys[1][:, 4:8].mean(axis=1))


def test_a_summary_that_ran_ahead_of_an_interrupted_call_is_made_anew(cache):
    keys = np.random.default_rng(3).standard_normal((2, 2, 20, 16))
    fill(cache, keys[:, :, :8], CONFIG)
    k_room, _ = cache.room(0, 12)
    k_room[...] = 99.0
    cache.running_summary(0, CONFIG).extend(k_room)  # and then the call was interrupted: no advance
    fill(cache, keys[:, :, 8:], CONFIG)
    np.testing.assert_allclose(cache.running_summary(0, CONFIG).summary().kc[:, 4], keys[0][:, 16:20].mean(axis=1))


def test_configs_that_pool_alike_share_one_summary(cache):
    fill(cache, np.ones((2, 2, 8, 16)))
    other_rule = UniSparseConfig(block_size=8, q_compress=4, k_compress=4, key_anchors=2, top_p=0.5)
    other_pool = UniSparseConfig(block_size=8, q_compress=2, k_compress=2, key_anchors=2)
    coarse = UniSparseConfig(block_size=8, q_compress=4, k_compress=4, key_anchors=2, row_threshold=0.1, top_p_compress=8)
    assert cache.running_summary(0, CONFIG) is cache.running_summary(0, other_rule) is cache.running_summary(0, coarse)
    assert cache.running_summary(0, other_pool).summary().kc.shape[1] == 4


def test_counts_are_read_only_when_densities_are_asked_for(cache):
    class LateTrace(Trace):
        def kept_later(self):
            return lambda: read.append(1) or 3.0

    read: list[int] = []
    assert cache.densities() == []
    for layer in (0, 0, 1):
        cache.add_counts(layer, LateTrace("late", 0.0, 4, None))
    cache.advance(8)
    assert read == []
    assert cache.densities() == [0.75, 0.75]
    assert len(read) == 3


def test_a_call_that_was_interrupted_does_not_count_in_the_densities(cache):
    cache.room(0, 8)
    cache.add_counts(0, Trace("some", 3.0, 4, None))  # and then it was interrupted: no advance
    assert cache.densities() == []
    cache.begin()
    cache.add_counts(0, Trace("some", 1.0, 4, None))
    fill(cache, np.ones((2, 2, 8, 16)), CONFIG)
    assert cache.densities() == [0.25]


def test_overflow_is_refused(cache):
    with pytest.raises(InvalidInput, match="41 tokens do not fit this cache of 40"):
        cache.require_room(41)


def test_memory_that_cannot_be_had_is_a_sentence():
    config = ModelConfig.from_dict(load_case("llama_transformers5").config)
    with pytest.raises(InvalidInput, match="does not fit this machine's memory"):
        KVCache(config, 1 << 45, load_backend("reference"), np.float32)


def test_memory_that_a_device_lacks_is_a_sentence_with_what_would_fit(monkeypatch):
    config, backend = ModelConfig.from_dict(load_case("llama_transformers5").config), load_backend("reference")
    bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    monkeypatch.setattr(backend.layers, "memory", SimpleNamespace(free_bytes=lambda: 100 * bytes_per_token + 7))
    with pytest.raises(InvalidInput, match="does not fit the GPU's memory: at most 100 would fit"):
        KVCache(config, 1 << 45, backend, np.float32)


def test_a_released_cache_keeps_its_densities_alone(cache):
    cache.add_counts(0, Trace("some", 3.0, 4, None))
    cache.add_counts(1, Trace("some", 1.0, 4, None))
    fill(cache, np.ones((2, 2, 8, 16)), CONFIG)
    cache.decoders["dense"] = object()
    cache.release()
    assert cache.densities() == [0.75, 0.25]
    assert cache._keys is None and cache._values is None and cache.decoders == {} and cache._summaries == [{}, {}]


def test_a_cache_goes_on_after_a_call_that_was_interrupted_anywhere(cache):
    """Half a chunk in the summaries of some layers, then as many tokens that no summary sees: the next one starts from the keys."""
    rng = np.random.default_rng(4)
    keys, lost = rng.standard_normal((2, 2, 30, 16)), rng.standard_normal((2, 6, 16))
    fill(cache, keys[:, :, :10], CONFIG)
    k_room, _ = cache.room(0, 6)
    k_room[...] = lost
    cache.running_summary(0, CONFIG).extend(k_room)  # and then the call was interrupted: no advance
    for start in range(10, 24):
        cache.begin()
        fill(cache, keys[:, :, start : start + 1], "dense")
    cache.begin()
    fill(cache, keys[:, :, 24:], CONFIG)
    fresh = load_backend("reference").RunningKeySummary(CONFIG, 4, 2, 16, 30, np.float64)
    fresh.extend(keys[0])
    for mine, theirs in zip(cache.running_summary(0, CONFIG).summary(), fresh.summary(), strict=True):
        np.testing.assert_allclose(mine, theirs)
