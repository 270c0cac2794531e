"""Two ranks that share one GPU, as threads: the model's parts and the prompt's runs on the real kernels.

NCCL does not connect two ranks of one GPU. What the ranks exchange goes through its calls with one rank, and between the threads.
"""

from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tests.parallel.in_threads import on_ranks
from tests.parallel.model_cases import open_model
from unisparse_np import UniSparseConfig
from unisparse_np.attention import attend, load_backend
from unisparse_np.model.context_split import ContextSplit
from unisparse_np.parallel import ONE_PROCESS, Ranks, Single

pytestmark = pytest.mark.gpu
TOKENS = 1500
SPARSE = UniSparseConfig(block_size=64, top_p=0.8)


class ThroughNccl:
    """A Communicator whose arrays pass NCCL on their way."""

    def __init__(self, group):
        from unisparse_np.gpu.cupy_kernels.nccl import Nccl

        self.rank, self.size, self._group, self._nccl = group.rank, group.size, group, Nccl(Single())

    def all_reduce(self, x):
        return self._nccl.all_reduce(self._group.all_reduce(x))

    def all_gather(self, x):
        return self._group.all_gather(self._nccl.all_gather(x)[0])


def results(ranks, dtype, attention):
    if ranks is not ONE_PROCESS:
        ranks = replace(ranks, tensor=ThroughNccl(ranks.tensor), context=ThroughNccl(ranks.context))
    model = open_model(None, "needle-llama", ranks, "cupy", dtype)
    token_ids = np.random.default_rng(3).integers(0, model.config.vocab_size, TOKENS).tolist()
    cache = model.new_cache(TOKENS + 1, attention)
    logits = model.logits(token_ids, attention, chunk_size=1024, cache=cache)
    step = model.step(5, cache, attention)
    return np.concatenate([logits, step[None]]), model.layer_densities(cache)


@cache
def of_one_rank(dtype, attention):
    return results(ONE_PROCESS, dtype, attention)


class SilentOther(ThroughNccl):
    """The first of two ranks whose other adds nothing: NCCL with one rank does the same in a recorded graph and outside."""

    def __init__(self):
        super().__init__(Single())
        self.size = 2

    def all_gather(self, x):
        gathered = self._nccl.all_gather(x)  # [1, ...]
        return gathered.repeat(2, axis=0)


def test_exchanges_are_recorded_with_the_decode_step(cupy):
    found = []
    for recorded in (True, False):
        model = open_model(None, "needle-llama", Ranks(Single(), SilentOther(), Single()), "cupy", "bfloat16")
        if not recorded:
            model._new_decoder = None
        cache = model.new_cache(TOKENS + 8, "dense")
        model.prefill(np.arange(TOKENS) % 1000, cache, "dense")
        found.append(np.stack([model.step(token_id, cache, "dense") for token_id in range(8)]))
        if recorded:
            assert all(decoder._graph is not None for decoder in cache.decoders.values()) and cache.decoders
    assert found[0].shape == (8, model.config.vocab_size)
    assert np.abs(found[0] - found[1]).max() <= 3e-2 * np.abs(found[1]).max()


@pytest.mark.parametrize(("dtype", "attention", "bound"), [("float32", SPARSE, 1e-3), ("bfloat16", "dense", 5e-2)])
@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_logits_on_two_ranks(tensor, context, dtype, attention, bound, cupy):
    expected, densities = of_one_rank(dtype, attention)
    for found, found_densities in on_ranks(cupy, tensor, context, lambda ranks: results(ranks, dtype, attention)):
        assert np.abs(found - expected).max() <= bound * np.abs(expected).max()
        assert found_densities == pytest.approx(densities, abs=1e-3)


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2)])
def test_sparse_attention_in_bfloat16_on_two_ranks(tensor, context, cupy):
    """Rounding moves block decisions here: densities and the likeliest tokens agree, single logits need not."""
    expected, densities = of_one_rank("bfloat16", SPARSE)
    for found, found_densities in on_ranks(cupy, tensor, context, lambda ranks: results(ranks, "bfloat16", SPARSE)):
        assert np.isfinite(found).all()
        assert found_densities == pytest.approx(densities, abs=0.02)
        assert (found.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.9


@pytest.mark.parametrize(
    "config", [UniSparseConfig(top_p=0.5), UniSparseConfig(block_size=64, head_compress=4, top_p=0.5, row_threshold=0.05)]
)
@pytest.mark.parametrize("before", [0, 1024])
def test_masks_of_the_runs_are_those_of_the_whole_bit_by_bit(config, before, cupy):
    backend, tokens = load_backend("cupy"), 2500
    rng = np.random.default_rng(before)
    q, k, v = (
        cupy.asarray(rng.standard_normal((heads, length, 128)).astype(ml_dtypes.bfloat16))
        for heads, length in ((8, tokens), (2, before + tokens), (2, before + tokens))
    )
    expected = backend.as_numpy(attend(q, k, v, config, q_offset=before, backend=backend)[1].mask)
    assert 0.1 < expected.mean() < 0.9
    for rank in range(3):
        for start, stop in ContextSplit.of(tokens, config.block_size, SimpleNamespace(rank=rank, size=3)).runs:
            _, trace = attend(q[:, start:stop], k, v, config, q_offset=before + start, backend=backend)
            mask, first = backend.as_numpy(trace.mask), start // config.block_size
            np.testing.assert_array_equal(mask, expected[:, first : first + mask.shape[1]])
