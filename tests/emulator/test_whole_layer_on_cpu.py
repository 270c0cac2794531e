"""A prompt's layers in one call each, on the CPU by the emulator: to the bit what their parts give one by one."""

import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.emulator.models import open_model, write_qwen3
from unisparse_np import UniSparseConfig

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

SPARSE = UniSparseConfig(block_size=64, top_p=0.4, sink_blocks=0, local_blocks=0)
TWO_SIZES = UniSparseConfig(64, 8, 4, 2, top_p=0.6, row_threshold=0.1, top_p_compress=16, key_anchors=2)
NO_ANCHORS = UniSparseConfig(128, 8, 8, top_p=None, row_threshold=0.05, key_anchors=0)
PROMPT, ROOM = 150, 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_qwen3(tmp_path_factory.mktemp("model"))


def read(model, attention, capacity, chunks):
    """Logits after each piece of a prompt, the cache, and the kernels in the order of their launches."""
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT).tolist()
    cache, start, rows = model.new_cache(capacity, attention), 0, []
    cupy_on_cpu.Kernel.launched.clear()
    for tokens in chunks:
        rows.append(model.prefill(ids[start : start + tokens], cache, attention))
        start += tokens
    return np.stack(rows), cache, list(cupy_on_cpu.Kernel.launched)


@pytest.mark.parametrize(
    ("capability", "attention", "capacity", "chunks"),
    [
        ("90", SPARSE, 300, (128, 22)),
        ("80", "dense", 192, (150,)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("90", "dense", 300, (128, 22)),
                ("80", SPARSE, 192, (150,)),
                ("90", TWO_SIZES, 192, (150,)),
                ("80", TWO_SIZES, 300, (128, 22)),
                ("90", NO_ANCHORS, 300, (128, 22)),
                ("80", NO_ANCHORS, 192, (150,)),
            )
        ),
    ],
)
def test_layers_in_one_call_are_their_parts(capability, attention, capacity, chunks, folder, monkeypatch):
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed(capability) as backend:
        model, calls, whole = open_model(folder, backend, ROOM), [], backend.whole_layer

        def watched(*arguments):
            calls.append(whole(*arguments))
            return calls[-1]

        monkeypatch.setattr(backend, "whole_layer", watched)
        found, cache, launched = read(model, attention, capacity, chunks)
        assert len(calls) == 2 * len(chunks)
        assert all(trace is not None for trace in calls)
        monkeypatch.setattr(backend, "whole_layer", None)
        expected, by_parts, launched_by_parts = read(model, attention, capacity, chunks)
        np.testing.assert_array_equal(found, expected)
        assert cache.densities() == by_parts.densities()
        assert launched == launched_by_parts
        for layer in range(2):
            for a, b in zip(cache.upto(layer, PROMPT), by_parts.upto(layer, PROMPT), strict=True):
                np.testing.assert_array_equal(a, b)
            if attention != "dense":
                summaries = (held.running_summary(layer, attention).summary() for held in (cache, by_parts))
                for a, b in zip(*summaries, strict=True):
                    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_what_no_single_call_can_do_goes_part_by_part(folder, monkeypatch):
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        model = open_model(folder, backend, ROOM)
        logits, cache, _ = read(model, SPARSE, ROOM, (70, 5, 75))  # inside a block; few tokens; inside a block
        with monkeypatch.context() as patched:
            patched.setattr(backend, "whole_layer", None)
            expected, by_parts, _ = read(model, SPARSE, ROOM, (70, 5, 75))
        np.testing.assert_array_equal(logits, expected)
        assert cache.densities() == by_parts.densities()
        wide = open_model(folder, backend, ROOM, "float32")
        x = backend.xp.zeros((20, wide.config.hidden_size), np.float32)
        assert backend.whole_layer(0, wide.weights.layers[0], x, None, wide.config, wide.new_cache(ROOM), "dense") is None
