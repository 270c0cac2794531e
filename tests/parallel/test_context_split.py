"""The zig-zag split of queries: balanced, in whole blocks, and with the masks of one process bit by bit."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_np import UniSparseConfig
from unisparse_np.attention import attend, load_backend
from unisparse_np.model.context_split import ContextSplit
from unisparse_np.parallel import Single

from .in_threads import InThreads, Meeting, on_ranks


def splits(tokens: int, block_size: int, size: int) -> list[ContextSplit]:
    return [ContextSplit.of(tokens, block_size, InThreads(np, rank, Meeting(size, threading.Lock()))) for rank in range(size)]


@given(tokens=st.integers(1, 2000), block_size=st.sampled_from([1, 16, 64]), size=st.integers(1, 8))
@settings(deadline=None, max_examples=150)
def test_each_token_is_computed_once_and_runs_start_on_blocks(tokens, block_size, size):
    parts = splits(tokens, block_size, size)
    if not parts[0].shared:
        assert all(part.runs == ((0, tokens),) for part in parts)
        assert size == 1 or tokens <= (2 * size - 1) * block_size
        return
    computed = np.zeros(tokens, dtype=int)
    for part in parts:
        for start, stop in part.runs:
            assert start < stop and start % block_size == 0
            computed[start:stop] += 1
    assert (computed == 1).all()


def test_the_work_is_balanced_under_causality():
    costs = [sum(stop**2 - start**2 for start, stop in part.runs) for part in splits(131072, 128, 8)]
    assert max(costs) <= 1.001 * min(costs)
    plain = [(stop**2 - start**2) for start, stop in ((n * 16384, (n + 1) * 16384) for n in range(8))]
    assert max(plain) > 10 * min(plain)  # what a split into eight neighbouring parts would cost


@pytest.mark.parametrize(("tokens", "size"), [(1000, 2), (1000, 3), (1024, 4), (113, 3)])
def test_rows_come_together_in_order(tokens, size):
    rng = np.random.default_rng(tokens)
    k, v = rng.standard_normal((2, 2, tokens, 8))
    token_ids = list(range(tokens))

    def work(ranks):
        split = ContextSplit.of(tokens, 16, ranks.context)
        own = split.own_tokens(token_ids)
        assert [split.token_of(row) for row in range(len(own))] == own
        k_out, v_out = np.empty_like(k), np.empty_like(v)
        split.gather(np, (k[:, own], k_out), (v[:, own], v_out))
        return k_out, v_out, split.whole(np, k[0][own]), split.last(k[0][own])

    for k_out, v_out, whole, last in on_ranks(np, 1, size, work):
        np.testing.assert_array_equal(k_out, k)
        np.testing.assert_array_equal(v_out, v)
        np.testing.assert_array_equal(whole, k[0])
        np.testing.assert_array_equal(last, k[0][-1:])


CONFIGS = {
    "top p": UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6),
    "finer queries and both rules": UniSparseConfig(block_size=16, q_compress=2, k_compress=8, top_p=0.5, row_threshold=0.1),
    "coarse composites for Top-P": UniSparseConfig(16, 2, 4, top_p=0.5, row_threshold=0.2, top_p_compress=8),
    "composite heads": UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6, head_compress=4, key_anchors=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(("before", "tokens"), [(0, 256), (0, 251), (48, 203), (37, 219)])
def test_masks_are_those_of_one_process_bit_by_bit(config, before, tokens):
    """`before`: keys of earlier chunks, also where the chunk starts inside a block."""
    rng, backend = np.random.default_rng(before + tokens), load_backend("reference")
    q = rng.standard_normal((4, tokens, 16), dtype=np.float32)
    k, v = (rng.standard_normal((2, before + tokens, 16), dtype=np.float32) for _ in range(2))
    whole, whole_trace = attend(q, k, v, config, q_offset=before, backend=backend)
    for size in (2, 3):
        mask, out = np.zeros_like(whole_trace.mask), np.zeros_like(whole)
        for split in splits(tokens, 16, size):
            for start, stop in split.runs:
                part, trace = attend(q[:, start:stop], k, v, config, q_offset=before + start, backend=backend)
                mask[:, start // 16 : start // 16 + trace.mask.shape[1]] = trace.mask
                out[:, start:stop] = part
        np.testing.assert_array_equal(mask, whole_trace.mask)
        np.testing.assert_allclose(out, whole, atol=1e-6)


def test_one_rank_computes_all():
    split = ContextSplit.of(100, 16, Single())
    x = np.arange(100.0)[:, None]
    assert not split.shared and split.runs == ((0, 100),) and split.rows() == [(slice(0, 100), (0, 100))]
    assert split.own_tokens(range(100)) == range(100) and split.token_of(7) == 7
    assert split.whole(np, x) is x and split.last(x).tolist() == [[99.0]]
