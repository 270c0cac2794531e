"""A tiny model on this backend: the reference's logits, prefill and decode."""

import numpy as np
import pytest

from tests.llama_checkpoints import load_case, write_checkpoint
from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.weights import load_weights

CONFIG = UniSparseConfig(block_size=4, q_compress=2, k_compress=2, top_p=0.6, sink_blocks=0, local_blocks=0)


@pytest.fixture
def models(tmp_path):
    """The same checkpoint on the reference and on this backend."""
    case = load_case("qwen3_bias_head_dim_transformers5")
    write_checkpoint(tmp_path, case.config, case.tensors, case.dtype, case.shards)
    config = ModelConfig.from_folder(tmp_path)
    backends = [load_backend(name) for name in ("reference", "numba")]
    return [Llama(config, load_weights(tmp_path, config, b.layers, "float32"), b, 64) for b in backends]


def test_prefill_in_chunks_and_decode_steps(models):
    ids = load_case("qwen3_bias_head_dim_transformers5").token_ids.tolist()[:20]
    found = []
    for model in models:
        cache = model.new_cache(32, CONFIG)
        logits = [model.prefill(ids, cache, CONFIG, chunk_size=12), model.step(3, cache, CONFIG), model.step(7, cache, "dense")]
        found.append((np.stack(logits), model.layer_densities(cache)))
    (expected, expected_densities), (logits, densities) = found
    assert np.abs(logits - expected).max() < 1e-4 * np.abs(expected).max()
    assert densities == pytest.approx(expected_densities) and min(densities) < 1


def test_layers_are_those_of_the_reference():
    mine, theirs = (load_backend(name).layers for name in ("numba", "reference"))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    weight, bias, norm = rng.standard_normal((6, 8)).astype(np.float32), np.ones(6, np.float32), rng.random(8).astype(np.float32)
    for name, arguments in {
        "linear": (x, weight, bias),
        "rms_norm": (x, norm, 1e-5, x.dtype),
        "swiglu": (np.concatenate([100 * x, x], axis=1),),
        "embedding": (weight, [3, 0, 3], np.dtype(np.float32)),
    }.items():
        np.testing.assert_allclose(getattr(mine, name)(*arguments), getattr(theirs, name)(*arguments), rtol=1e-5, atol=1e-6, err_msg=name)
    heads, results = rng.standard_normal((5, 4, 4)).astype(np.float32), []
    for layers in (mine, theirs):
        table = layers.rotary_table(np.array([1.0, 0.1], np.float32), 7, 5, 1.5, np.dtype(np.float32))
        k_room, v_room = np.empty((1, 5, 4), np.float32), np.empty((1, 5, 4), np.float32)
        q, _ = layers.rotate_heads(heads, table, (norm[:4], norm[4:], 1e-5), k_room, v_room, "dense", None)
        stream = np.ones((5, 6), np.float32)
        layers.add_linear(stream, x, weight, bias)
        results.append((q, k_room, v_room, stream, layers.head(x, weight)))
    for found, expected in zip(*results, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    public = {name for name, value in vars(theirs).items() if callable(value) and getattr(value, "__module__", "") == theirs.__name__}
    inner = {"widen"}  # how the reference does it
    assert {name for name in public if not name.startswith("_")} - inner <= vars(mine).keys()
    assert {"HELD_DTYPES", "memory", "xp"} <= vars(mine).keys()


def test_several_processes_are_refused():
    with pytest.raises(InvalidInput, match="the numba backend runs in one process"):
        load_backend("numba").take_device(0, 2)
