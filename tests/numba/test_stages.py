"""Small problems, every feature of ALGORITHM.md, stage by stage against the reference."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig, audit, reference, unisparse_attention
from unisparse_np.gpu import numba_kernels

SMALL = {"block_size": 8, "q_compress": 2, "k_compress": 2, "top_p": 0.6}
COARSE = {"row_threshold": 0.2, "top_p_compress": 4}


def random_qkv(num_q_heads, num_kv_heads, q_len, k_len, dim, dtype=np.float32, seed=3):
    rng = np.random.default_rng(seed)
    shapes = ((num_q_heads, q_len, dim), (num_kv_heads, k_len, dim), (num_kv_heads, k_len, dim))
    return tuple((2 * rng.standard_normal(shape)).astype(dtype) for shape in shapes)


CASES = {  # (heads, kv heads, q_len, k_len, dim), config, causal, q_offset
    "default rules": ((2, 1, 30, 30, 8), SMALL, True, None),
    "bare rule of the paper": ((2, 2, 24, 24, 8), {**SMALL, "key_anchors": 0, "sink_blocks": 0, "local_blocks": 0}, True, None),
    "chunk": ((2, 1, 16, 45, 8), SMALL, True, None),
    "offset off the grid of blocks": ((2, 1, 11, 45, 8), {**SMALL, "local_blocks": 2, "sink_blocks": 2}, True, 13),
    "decode step": ((4, 2, 1, 37, 8), SMALL, True, None),
    "finer queries than keys": ((1, 1, 24, 24, 8), {**SMALL, "q_compress": 1, "k_compress": 4}, True, None),
    "finer keys than queries": ((1, 1, 24, 24, 8), {**SMALL, "q_compress": 8, "k_compress": 1}, True, None),
    "a block is one composite": ((1, 1, 24, 24, 8), {**SMALL, "q_compress": 8, "k_compress": 8}, True, None),
    "row threshold": ((2, 1, 24, 24, 8), {**SMALL, "top_p": None, "row_threshold": 0.15, "key_anchors": 3}, True, None),
    "both rules, one value a head": ((2, 1, 24, 24, 8), {**SMALL, "top_p": (0.3, 1.0), "row_threshold": (0.3, 0.02)}, True, None),
    "coarse composites for Top-P": ((2, 1, 27, 43, 8), {**SMALL, **COARSE, "k_compress": 1}, True, None),
    "coarse composites, heads averaged, offset": ((4, 2, 11, 37, 5), {**SMALL, **COARSE, "head_compress": 4}, True, 13),
    "coarse composites, decode step": ((2, 1, 1, 29, 8), {**SMALL, **COARSE}, True, None),
    "heads averaged in a group": ((4, 2, 24, 24, 8), {**SMALL, "head_compress": 2}, True, None),
    "heads averaged over groups": ((4, 2, 24, 24, 8), {**SMALL, "head_compress": 4}, True, None),
    "not causal": ((2, 1, 30, 21, 8), SMALL, False, None),
    "not causal, nothing forced": ((1, 1, 9, 30, 8), {**SMALL, "sink_blocks": 0, "key_anchors": 0, "top_p": 0.2}, False, None),
    "more anchors than a ragged block has keys": ((1, 1, 17, 17, 8), {**SMALL, "key_anchors": 8}, True, None),
    "blocks of an odd size": ((1, 1, 40, 40, 3), {**SMALL, "block_size": 9, "q_compress": 3, "k_compress": 9}, True, None),
    "blocks of one token": ((1, 1, 7, 7, 4), {**SMALL, "block_size": 1, "q_compress": 1, "k_compress": 1}, True, None),
    "wide heads": ((1, 1, 9, 9, 33), SMALL, True, None),
    "one number a head": ((1, 1, 20, 20, 1), SMALL, True, None),
    "dense by Top-P": ((1, 1, 20, 20, 4), {**SMALL, "top_p": 1.0}, True, None),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_stages_agree_with_the_reference(case):
    shape, values, causal, q_offset = case
    report = audit(*random_qkv(*shape), UniSparseConfig(**values), backend="numba", causal=causal, q_offset=q_offset)
    assert report.ok, str(report)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    report = audit(*random_qkv(2, 1, 24, 24, 8, dtype), UniSparseConfig(**SMALL), backend="numba")
    assert report.ok, str(report)


@pytest.mark.parametrize("causal", [True, False])
def test_whole_call(causal):
    q, k, v = random_qkv(2, 1, 30, 30, 8)
    config = UniSparseConfig(**SMALL)
    out, lse, trace = unisparse_attention(q, k, v, config, causal=causal, backend="numba", return_lse=True, return_trace=True)
    expected, expected_lse, expected_trace = unisparse_attention(q, k, v, config, causal=causal, return_lse=True, return_trace=True)
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    np.testing.assert_array_equal(trace.mask, expected_trace.mask)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=1e-5)
    assert trace.density == pytest.approx(expected_trace.density) and 0.2 < trace.density < 1
    assert trace.kernel.startswith("numba")
    np.testing.assert_array_equal(trace.anchors, expected_trace.anchors)
    np.testing.assert_allclose(trace.mean, expected_trace.mean, rtol=0, atol=1e-5)


def test_coarse_composites_are_means_over_the_tokens_that_exist():
    q, k, _ = random_qkv(4, 2, 27, 43, 5)
    problem = Problem(4, 2, 27, 43, 5, UniSparseConfig(**{**SMALL, **COARSE, "head_compress": 2}))
    found = numba_kernels.coarse_composites(*numba_kernels.compress(q, k, problem), problem)
    for x, expected in zip(found, reference.compress(q, k, problem.of_top_p()), strict=True):
        np.testing.assert_allclose(x, expected, rtol=0, atol=1e-6)


def test_dense_attention_and_a_batch():
    q, k, v = (np.stack([x, -x]) for x in random_qkv(2, 1, 20, 20, 4))
    out = unisparse_attention(q, k, v, "dense", backend="numba")
    np.testing.assert_allclose(out, unisparse_attention(q, k, v, "dense"), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rules", [{}, COARSE], ids=["Top-P", "coarse composites for Top-P"])
def test_the_same_bits_in_every_run_and_every_chunking(rules):
    q, k, v = random_qkv(2, 1, 32, 32, 4)
    config = UniSparseConfig(**SMALL, **rules)
    out, trace = unisparse_attention(q, k, v, config, backend="numba", return_trace=True)
    again, again_trace = unisparse_attention(q, k, v, config, backend="numba", return_trace=True)
    np.testing.assert_array_equal(out, again)
    np.testing.assert_array_equal(trace.mean, again_trace.mean)
    later, later_trace = unisparse_attention(q[:, 16:], k, v, config, backend="numba", return_trace=True)
    np.testing.assert_array_equal(later, out[:, 16:])
    np.testing.assert_array_equal(later_trace.mean, trace.mean[:, 2:])


def test_equal_scores_go_to_the_lower_block():
    """Four blocks of exactly 1/4 each: Top-P 0.5 keeps the first two, and only those."""
    config = UniSparseConfig(block_size=4, q_compress=4, k_compress=4, top_p=0.5, sink_blocks=0, local_blocks=0, key_anchors=0)
    problem = Problem(1, 1, 4, 16, 2, config, causal=False)
    mean = np.full((1, 1, 4), 0.25, np.float32)
    assert numba_kernels.select_blocks(mean, None, problem).tolist() == [[[True, True, False, False]]]


def test_equal_norms_go_to_the_earlier_key():
    k = np.ones((1, 6, 2), np.float32)
    k[0, 4] = 0.5
    assert numba_kernels.find_anchors(k, 3, 2).tolist() == [[[0, 1], [4, 3]]]


def test_the_select_kernel_agrees_on_many_random_rows():
    """Wide rows of scores with ties, zeros and one dominant block."""
    rng = np.random.default_rng(5)
    for rules in ({"top_p": 0.7}, {"top_p": None, "row_threshold": 0.05}, {"top_p": 0.4, "row_threshold": 0.05}):
        config = UniSparseConfig(block_size=4, q_compress=4, k_compress=4, **rules)
        problem = Problem(2, 1, 48, 160, 2, config)
        mean = rng.integers(0, 4, (2, 12, 40)).astype(np.float64)
        mean[:, :, 0] += 1  # no row is empty
        mean *= reference.select.visible_blocks(problem)
        mean /= mean.sum(axis=-1, keepdims=True)
        np.testing.assert_array_equal(
            numba_kernels.select_blocks(mean, mean, problem), reference.select_blocks(mean, mean, problem), err_msg=str(rules)
        )
