"""Decode steps of a tiny model as one recorded graph, run on the CPU by the emulator and compared with steps layer by layer."""

import gc
import shutil
import sys
import weakref

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.emulator.models import open_model, write_qwen3
from unisparse_np import UniSparseConfig
from unisparse_np.attention import load_backend

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

SPARSE = UniSparseConfig(block_size=64, top_p=0.4, sink_blocks=0, local_blocks=0)
PROMPT, STEPS = 150, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine():
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        yield backend


def answer(model, attention, steps_attention):
    """Logits after the prompt and after each of STEPS tokens: [1 + STEPS, vocab]."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()
    cache = model.new_cache(PROMPT + STEPS, attention)
    rows = [model.prefill(ids, cache, attention, chunk_size=64)]
    rows += [model.step(5 + n, cache, steps_attention[n % len(steps_attention)]) for n in range(STEPS)]
    return np.stack(rows), cache


@pytest.mark.parametrize("attention", ["dense", SPARSE], ids=["dense", "unisparse"])
def test_recorded_steps_are_those_taken_layer_by_layer(attention, folder, engine):
    model = open_model(folder, engine, PROMPT + STEPS)
    cupy_on_cpu.Kernel.launched.clear()
    found, cache = answer(model, attention, [attention])
    assert list(cache.decoders) == [(attention, attention)]
    assert cupy_on_cpu.Kernel.launched[-2:] == ["set_step", "set_step"]  # all else is in the graph
    model._new_decoder = None
    expected, _ = answer(model, attention, [attention])
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())
    exact, _ = answer(open_model(folder, load_backend("reference"), PROMPT + STEPS, "float32"), attention, [attention])
    np.testing.assert_allclose(found, exact, atol=0.05 * np.abs(exact).max())


def test_two_kinds_of_attention_take_turns_over_one_cache(folder, engine):
    model = open_model(folder, engine, PROMPT + STEPS)
    found, cache = answer(model, SPARSE, ["dense", SPARSE])
    assert len(cache.decoders) == 2
    model._new_decoder = None
    expected, _ = answer(model, SPARSE, ["dense", SPARSE])
    np.testing.assert_allclose(found, expected, atol=0.03 * np.abs(expected).max())


def test_a_cache_gives_its_memory_back_when_it_is_dropped(folder, engine):
    model = open_model(folder, engine, PROMPT + STEPS)
    _, cache = answer(model, SPARSE, [SPARSE])
    memory = weakref.ref(cache._keys)
    gc.disable()  # as it may be long until Python looks for circles
    try:
        del cache
        assert memory() is None
    finally:
        gc.enable()


def test_float32_has_no_decoder(folder, engine):
    model = open_model(folder, engine, PROMPT + STEPS, "float32")
    assert engine.new_decoder(model.config, model.weights, model.new_cache(4), ["dense", "dense"]) is None
