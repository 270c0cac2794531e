"""Lengths around a block, every legal head compression, every dtype, non-causal extremes; each against the oracle."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from tests.oracle import attend, oracle
from tests.problems import legal_head_compress
from unisparse_np import Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.comparison import TOLERANCES

SIZE = 16
SMALL = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=4, top_p=0.7)
EXACT = TOLERANCES["float64"].output


def random_qkv(num_q_heads, num_kv_heads, q_len, k_len, dim=8, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (num_q_heads, q_len, dim), (num_kv_heads, k_len, dim), (num_kv_heads, k_len, dim)
    return [(2.0 * rng.standard_normal(shape)).astype(dtype) for shape in shapes]


def assert_like_the_oracle(q, k, v, config, **keywords):
    out, trace = unisparse_attention(q, k, v, config, return_trace=True, **keywords)
    expected = oracle(q, k, v, config, **keywords)
    np.testing.assert_array_equal(trace.mask, expected["mask"])
    np.testing.assert_allclose(out, expected["out"], rtol=0, atol=EXACT)
    np.testing.assert_allclose(trace.lse, expected["lse"], rtol=0, atol=EXACT)
    return trace


@pytest.mark.parametrize("length", [1, 2, SIZE - 1, SIZE, SIZE + 1, 3 * SIZE - 1, 3 * SIZE + 1, 4 * SIZE + 5])
@pytest.mark.parametrize("rules", [{"top_p": 0.7}, {"top_p": None, "row_threshold": 0.1}])
def test_lengths_around_a_block(length, rules):
    config = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=8, **rules)
    assert_like_the_oracle(*random_qkv(4, 2, length, length), config)


@pytest.mark.parametrize(("num_q_heads", "num_kv_heads"), [(1, 1), (6, 6), (6, 1), (6, 2), (6, 3), (8, 2), (12, 3)])
def test_every_legal_head_compress(num_q_heads, num_kv_heads):
    q, k, v = random_qkv(num_q_heads, num_kv_heads, 37, 53)
    legal = legal_head_compress(num_q_heads, num_q_heads // num_kv_heads)
    assert legal[0] == 1 and legal[-1] == num_q_heads
    for head_compress in legal:
        config = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=2, head_compress=head_compress, top_p=0.6, row_threshold=0.2)
        trace = assert_like_the_oracle(q, k, v, config, q_offset=7)
        assert trace.mean.shape[0] == num_q_heads // head_compress


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize(
    "config", [SMALL, UniSparseConfig.balanced(), UniSparseConfig.precise(), "dense"], ids=["small", "balanced", "precise", "dense"]
)
def test_dtypes_come_out_as_they_went_in(dtype, config):
    q, k, v = random_qkv(4, 2, 150, 150, dtype=dtype)
    out, lse, trace = unisparse_attention(q, k, v, config, return_lse=True, return_trace=True)
    wide = np.float64 if dtype == np.float64 else np.float32
    assert out.dtype == dtype and lse.dtype == wide
    if config == "dense":
        return
    expected, _ = attend(*(x.astype(np.float64) for x in (q, k, v)), trace.mask, config, True, 0, 1 / np.sqrt(8))
    rounding = {np.float16: 2**-11, ml_dtypes.bfloat16: 2**-8}.get(dtype, 0.0)  # of the result alone: inside it is float32
    name = np.dtype(wide).name
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=rounding, atol=TOLERANCES[name].output)


def test_stages_compute_16_bit_input_in_float32():
    q, k, v = random_qkv(2, 1, 40, 40, dtype=np.float16)
    _, trace = unisparse_attention(q, k, v, SMALL, return_trace=True)
    assert {x.dtype for x in (trace.qc, trace.kc, trace.mean, trace.lse)} == {np.dtype(np.float32)}


def test_more_queries_than_keys_without_causality():
    assert_like_the_oracle(*random_qkv(2, 1, 90, 20), SMALL, causal=False)


def test_a_query_with_nothing_to_attend_is_zero():
    """Possible only without causality: a mask row that keeps nothing, and no anchors."""
    config = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=4, key_anchors=0, sink_blocks=0, local_blocks=0)
    q, k, v = random_qkv(2, 1, 20, 40)
    problem = _problem(q, k, config, causal=False)
    mask = np.ones((2, 2, 3), dtype=bool)
    mask[1, 0] = False
    out, lse = reference.sparse_attention(q, k, v, mask, problem)
    assert (out[1, :SIZE] == 0).all() and (lse[1, :SIZE] == -np.inf).all()
    assert np.isfinite(lse[0]).all() and np.isfinite(lse[1, SIZE:]).all()


def test_a_causal_mask_without_its_diagonal_leaves_early_queries_to_the_anchors():
    """The mask is an argument of step 6: rows may see nothing, or only an anchor that is not after them."""
    config = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=4, key_anchors=1)
    q, k, v = random_qkv(1, 1, 2 * SIZE, 2 * SIZE)
    mask = np.zeros((1, 2, 2), dtype=bool)
    out, lse = reference.sparse_attention(q, k, v, mask, _problem(q, k, config))
    expected, expected_lse = attend(q, k, v, mask, config, True, 0, 1 / np.sqrt(8))
    np.testing.assert_allclose(out, expected, rtol=0, atol=EXACT)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=EXACT)
    assert np.isinf(lse).any() and np.isfinite(lse).any()


def test_partial_results_merge_by_their_log_sum_exp():
    q, k, v = random_qkv(4, 2, 30, 90)
    whole, whole_lse = unisparse_attention(q, k, v, "dense", causal=False, return_lse=True)
    parts = [unisparse_attention(q, k[:, a:b], v[:, a:b], "dense", causal=False, return_lse=True) for a, b in ((0, 41), (41, 90))]
    total = np.logaddexp(parts[0][1], parts[1][1])
    merged = sum(np.exp(lse - total)[..., None] * out for out, lse in parts)
    np.testing.assert_allclose(merged, whole, rtol=0, atol=EXACT)
    np.testing.assert_allclose(total, whole_lse, rtol=0, atol=EXACT)


def test_density_counts_selected_blocks_and_anchors():
    q, k, v = random_qkv(2, 1, 64, 64)
    config = UniSparseConfig(block_size=SIZE, q_compress=4, k_compress=4, top_p=0.3, key_anchors=2)
    _, trace = unisparse_attention(q, k, v, config, return_trace=True)
    visible = 2 * (1 + 2 + 3 + 4)
    selected = int(trace.mask.sum())
    assert trace.visible_blocks == visible and 0 < selected < visible
    assert trace.density == (selected + 2 / SIZE * (visible - selected)) / visible


def test_memory_grows_with_the_length_not_its_square():
    """32K tokens of one small head stay far below one L x L matrix (4.3 GB in float32)."""
    length = 32768
    q, k, v = random_qkv(1, 1, length, length, dim=4, dtype=np.float32)
    tracemalloc.start()
    unisparse_attention(q, k, v, UniSparseConfig(top_p=0.3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < length * length * 4 / 20


def _problem(q, k, config, causal=True):
    return Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], config, causal)
