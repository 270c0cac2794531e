"""Two ranks, as threads, through the whole CuPy backend in the emulator: tensor- and context-parallel logits are those of one."""

import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.llama_checkpoints import load_case, write_checkpoint
from tests.parallel.in_threads import on_ranks
from unisparse_np import UniSparseConfig
from unisparse_np.model.checkpoint import expected_tensors
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.sharding import Shard
from unisparse_np.model.weights import load_weights
from unisparse_np.parallel import ONE_PROCESS, Ranks, Single

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")
CASE = load_case("qwen2_transformers5")  # without a norm of k, which makes anchors near ties that rounding decides
CONFIG = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)
TOKENS = 70


@pytest.fixture
def engine():
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        yield backend


class OneOfTwo:
    """The first of two ranks whose other is silent: sums are its own summands, which a recorded graph can replay."""

    rank, size = 0, 2

    def all_reduce(self, x):
        return x

    def all_gather(self, x):
        return np.stack([x, x])


def test_recorded_steps_of_a_rank_are_those_taken_layer_by_layer(engine, tmp_path):
    raw = CASE.config | {"head_dim": 64, "layer_types": None}
    shapes = {name: list(slot.shape) for name, slot in expected_tensors(ModelConfig.from_dict(raw)).items()}
    folder, found = write_checkpoint(tmp_path, raw, shapes, "bfloat16"), []
    weights = load_weights(folder, ModelConfig.from_folder(folder), engine.layers, shard=Shard(0, 2))
    for recorded in (True, False):
        model = Llama(ModelConfig.from_folder(folder), weights, engine, ranks=Ranks(Single(), OneOfTwo(), Single()))
        if not recorded:
            model._new_decoder = None
        cache = model.new_cache(TOKENS + 4, "dense")
        model.prefill(list(range(20)), cache, "dense")
        found.append(np.stack([model.step(token_id, cache, "dense") for token_id in (3, 5, 7, 9)]))
        assert len(cache.decoders) == recorded
    assert found[0].shape == (4, model.config.vocab_size)
    np.testing.assert_allclose(found[0], found[1], atol=0.03 * np.abs(found[1]).max())


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_logits_on_two_ranks(tensor, context, engine, tmp_path):
    folder = write_checkpoint(tmp_path, CASE.config, CASE.tensors)
    config = replace(ModelConfig.from_folder(folder), max_position_embeddings=TOKENS + 1)
    token_ids = np.random.default_rng(3).integers(0, config.vocab_size, TOKENS).tolist()

    def logits(ranks):
        weights = load_weights(folder, config, engine.layers, "float32", shard=Shard(ranks.tensor.rank, ranks.tensor.size))
        model = Llama(config, weights, engine, ranks=ranks)
        cache = model.new_cache(TOKENS + 1, CONFIG)
        return model.logits(token_ids, CONFIG, cache=cache), model.step(5, cache, CONFIG), model.layer_densities(cache)

    expected, expected_step, expected_densities = logits(ONE_PROCESS)
    for found, found_step, densities in on_ranks(engine.xp, tensor, context, logits):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(found_step, expected_step, atol=1e-4 * np.abs(expected).max())
        assert densities == pytest.approx(expected_densities)
