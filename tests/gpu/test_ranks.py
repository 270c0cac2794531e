"""Two ranks that share one GPU, as threads: the model's parts and the prompt's runs on the real kernels. NCCL: test_nccl.py."""

import numpy as np
import pytest

from tests.parallel.in_threads import on_ranks
from tests.parallel.model_cases import open_model
from unisparse_np import UniSparseConfig
from unisparse_np.parallel import ONE_PROCESS

pytestmark = pytest.mark.gpu
TOKENS = 1500
SPARSE = UniSparseConfig(block_size=64, top_p=0.8)


def results(ranks, dtype, attention, model="needle-llama"):
    model = open_model(None, model, ranks, "cupy", dtype)
    token_ids = np.random.default_rng(3).integers(0, model.config.vocab_size, TOKENS).tolist()
    cache = model.new_cache(TOKENS + 1, attention)
    logits = model.logits(token_ids, attention, chunk_size=1024, cache=cache)
    step = model.step(5, cache, attention)
    return np.concatenate([logits, step[None]]), model.layer_densities(cache)


@pytest.mark.parametrize(("dtype", "attention", "bound"), [("float32", SPARSE, 1e-3), ("bfloat16", "dense", 5e-2)])
@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_logits_on_two_ranks(tensor, context, dtype, attention, bound, cupy):
    expected, densities = results(ONE_PROCESS, dtype, attention)
    for found, found_densities in on_ranks(cupy, tensor, context, lambda ranks: results(ranks, dtype, attention)):
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
        assert found_densities == pytest.approx(densities, abs=1e-3)


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_sparse_attention_in_bfloat16_on_two_ranks(tensor, context, cupy):
    """Rounding moves block decisions here: densities and the likeliest tokens agree, single logits need not."""
    expected, densities = results(ONE_PROCESS, "bfloat16", SPARSE)
    for found, found_densities in on_ranks(cupy, tensor, context, lambda ranks: results(ranks, "bfloat16", SPARSE)):
        assert np.isfinite(found).all()
        assert found_densities == pytest.approx(densities, abs=0.02)
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9
