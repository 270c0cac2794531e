"""A tiny model through the whole CuPy backend, run on the CPU by the emulator: prefill in chunks, decode, and what is refused."""

import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.emulator.models import open_model
from tests.llama_checkpoints import load_case, write_checkpoint
from unisparse_np import CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.attention import load_backend

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

CASE = load_case("qwen3_bias_head_dim_transformers5")  # biases, norms of q and k, a head_dim of its own
ROOM = len(CASE.token_ids)
CONFIG = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)
TWO_SIZES = UniSparseConfig(block_size=16, q_compress=4, k_compress=2, top_p=0.5, row_threshold=0.2, top_p_compress=8)
TOKENS = 40


@pytest.fixture
def folder(tmp_path):
    return write_checkpoint(tmp_path, CASE.config, CASE.tensors)


@pytest.fixture
def engine():
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        yield backend
    cupy_on_cpu.MemoryPool.limit = 0


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("attention", ["dense", CONFIG, TWO_SIZES], ids=["dense", "unisparse", "two sizes of composites"])
def test_float32_logits_are_those_of_the_reference(attention, folder, engine):
    ids = CASE.token_ids.tolist()[:TOKENS]
    found, densities = [], []
    for backend in (load_backend("reference"), engine):
        model = open_model(folder, backend, ROOM, "float32")
        cache = model.new_cache(TOKENS + 2, attention)
        logits = [model.prefill(ids[:32], cache, attention, chunk_size=16)]  # on the blocks' boundaries
        logits += [model.prefill(ids[32:37], cache, attention), model.prefill(ids[37:], cache, attention)]  # and off them
        logits += [model.step(3, cache, attention), model.step(7, cache, "dense")]
        assert all(isinstance(row, np.ndarray) and row.dtype == np.float32 for row in logits)
        found.append(np.stack(logits))
        densities.append(model.layer_densities(cache))
    assert relative_error(found[1], found[0]) < 1e-4
    assert densities[1] == pytest.approx(densities[0])


def test_bfloat16_weights_and_activations(folder, engine):
    ids = CASE.token_ids.tolist()[:TOKENS]
    expected = open_model(folder, load_backend("reference"), ROOM).logits(ids)
    assert relative_error(open_model(folder, engine, ROOM).logits(ids), expected) < 0.03


def test_a_prompt_that_does_not_fit_the_gpu_is_refused_with_what_would(folder, engine):
    model = open_model(folder, engine, ROOM, "float32")
    cupy_on_cpu.MemoryPool.limit = 100 << 20
    with pytest.raises(InvalidInput, match=r"40 tokens need 0.3 GiB beside the weights, and the GPU has 0.1 GiB free: 0 tokens would fit"):
        model.new_cache(TOKENS)


def test_a_checkpoint_larger_than_the_gpu_is_refused_before_it_is_read(folder, engine, monkeypatch):
    from unisparse_np.model import weights

    monkeypatch.setattr(weights, "_read", None)
    cupy_on_cpu.MemoryPool.limit = 1000
    with pytest.raises(CheckpointError, match=r"the checkpoint needs .* GiB as float32, and the GPU has 0.0 GiB free"):
        open_model(folder, engine, ROOM, "float32")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_weights_that_are_not_finite_are_found_on_the_device(tmp_path, engine, dtype):
    name = "model.layers.1.mlp.down_proj.weight"
    values = np.ones(CASE.tensors[name], np.float32)
    values[-1, -1] = -np.inf
    write_checkpoint(tmp_path, CASE.config, CASE.tensors, **{name.replace(".", "__"): values})
    with pytest.raises(CheckpointError, match=f"{name} holds NaN or infinite weights"):
        open_model(tmp_path, engine, ROOM, dtype)


@pytest.mark.parametrize(("heads", "tokens", "dim"), [(3, 5, 64), (2, 7, 8), (3, 4, 18)])
def test_heads_are_merged_as_they_lie_and_as_they_should(heads, tokens, dim, engine):
    x = sys.modules["cupy"].asarray(np.random.default_rng(0).standard_normal((heads, tokens, dim)).astype(np.float16))
    expected = np.asarray(x).transpose(1, 0, 2).reshape(tokens, heads * dim)
    np.testing.assert_array_equal(engine.layers.merge_heads(x), expected)
    by_token = sys.modules["cupy"].ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)
    np.testing.assert_array_equal(engine.layers.merge_heads(by_token), expected)


def test_memory_that_runs_out_on_the_way_is_one_sentence(folder, engine, monkeypatch):
    model = open_model(folder, engine, ROOM, "float32")
    cache = model.new_cache(20)
    released = []
    monkeypatch.setattr(engine.layers.memory, "release", lambda: released.append(True))

    def no_memory(*_):
        raise MemoryError("Out of memory allocating 12 bytes")

    monkeypatch.setattr(engine.layers, "norm_linear_swiglu", no_memory)
    with pytest.raises(InvalidInput, match=r"memory ran out while 20 tokens were read at once \(Out of memory allocating 12 bytes\)"):
        model.prefill([1] * 20, cache, "dense")
    assert released


def test_not_finite_numbers_are_found_where_they_first_appear(folder, engine):
    model = open_model(folder, engine, ROOM, "float32", check_finite=True)
    cache = model.new_cache(20)
    model.prefill([1] * 10, cache, "dense")
    model.weights.layers[1].down[3, 5] = np.inf
    with pytest.raises(CheckpointError, match="first appear after the MLP of layer 1, at token 10 of the text"):
        model.step(1, cache, "dense")
