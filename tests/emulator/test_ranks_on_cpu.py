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
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.sharding import Shard
from unisparse_np.model.weights import load_weights
from unisparse_np.parallel import ONE_PROCESS

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")
CASE = load_case("qwen3_bias_head_dim_transformers5")
CONFIG = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)
TOKENS = 77


@pytest.fixture
def engine():
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        yield backend


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
