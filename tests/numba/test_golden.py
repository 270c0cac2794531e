"""Every golden vector through every kernel. The simulator is slow, so steps 2-3 and 6 see a part of each vector there.

Step 1: some dims. Steps 4 and 5: all of it. Anchors: the last KV head. Steps 2-3: one query block of the last composite head.
Step 6: the last rows of the last query head, or of block 1 where head_dim is 128. `-m slow` runs whole vectors.
"""

from dataclasses import replace

import numpy as np
import pytest

from tests.golden import FILES, load
from unisparse_np import Problem, UniSparseConfig, audit, reference
from unisparse_np.comparison import TOLERANCES
from unisparse_np.gpu import numba_kernels

ROWS = 8  # of step 6
DIMS = 8  # of step 1, where no dim knows of another
TOLERANCE = TOLERANCES["float32"]


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request):
    return load(request.param)


def test_compress_select_and_anchors(golden):
    problem = golden.problem
    q64, k64 = golden.q.astype(np.float64), golden.k.astype(np.float64)
    qc, kc = reference.compress(q64, k64, problem)
    mean, peak = reference.score_blocks(qc, kc, problem)
    found_qc, found_kc = numba_kernels.compress(golden.q[..., :DIMS], golden.k[..., :DIMS], problem)
    np.testing.assert_allclose(found_qc, qc[..., :DIMS], rtol=0, atol=TOLERANCE.scores)
    np.testing.assert_allclose(found_kc, kc[..., :DIMS], rtol=0, atol=TOLERANCE.scores)
    np.testing.assert_array_equal(numba_kernels.select_blocks(mean, peak, problem), golden.mask)
    k64 = k64[-1:]
    anchors = numba_kernels.find_anchors(k64, problem.config.block_size, problem.config.key_anchors)
    np.testing.assert_array_equal(anchors, reference.find_anchors(k64, problem.config.block_size, problem.config.key_anchors))


def test_scores_of_one_query_block(golden):
    problem, config = golden.problem, golden.problem.config
    qc, kc = (x[-1:].astype(np.float32) for x in reference.compress(golden.q.astype(np.float64), golden.k.astype(np.float64), problem))
    i = problem.num_q_blocks // 2
    first, last = problem.query_composite_range(i)
    tokens = slice(*problem.query_range(i))
    one_block = replace(
        problem,
        num_q_heads=1,
        num_kv_heads=1,
        q_len=tokens.stop - tokens.start,
        q_offset=problem.q_offset + tokens.start if problem.causal else None,
        config=replace(config, head_compress=1),
    )
    mean, peak = numba_kernels.score_blocks(qc[:, first:last], kc, one_block)
    np.testing.assert_allclose(mean[0, 0], golden.scores[-1, i], rtol=0, atol=TOLERANCE.scores)
    if peak is not None:
        np.testing.assert_allclose(peak[0, 0], golden.peak[-1, i], rtol=0, atol=TOLERANCE.scores)


def test_attention_of_some_rows(golden):
    problem = golden.problem
    i = problem.num_q_blocks - 1 if problem.head_dim < 128 else 1
    first, last = problem.query_range(i)
    rows = slice(max(first, last - ROWS), last)
    some = replace(
        problem,
        num_q_heads=1,
        num_kv_heads=1,
        q_len=rows.stop - rows.start,
        q_offset=problem.q_offset + rows.start if problem.causal else None,
        config=replace(problem.config, head_compress=1),
    )
    q, k, v = (x.astype(np.float32) for x in (golden.q[-1:, rows], golden.k[-1:], golden.v[-1:]))
    out, lse = numba_kernels.sparse_attention(q, k, v, golden.mask[-1:, i : i + 1], some)
    np.testing.assert_allclose(out, golden.out[-1:, rows], rtol=0, atol=TOLERANCE.output)
    np.testing.assert_allclose(lse, golden.lse[-1:, rows], rtol=0, atol=TOLERANCE.output)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_whole_vector_by_audit(golden, dtype):
    """Seconds on a GPU, an hour in the simulator."""
    problem = golden.problem
    q, k, v = (x.astype(dtype) for x in (golden.q, golden.k, golden.v))
    q_offset = problem.q_offset if problem.causal else None
    report = audit(q, k, v, problem.config, backend="numba", causal=problem.causal, q_offset=q_offset)
    assert report.ok, str(report)


def test_the_parts_are_problems_of_their_own():
    """What the tests above rely on: one row block, alone, is the same problem."""
    config = UniSparseConfig(block_size=8, q_compress=2, k_compress=4)
    problem = Problem(2, 1, 24, 40, 4, config)
    part = replace(problem, q_len=8, q_offset=problem.q_offset + 8)
    assert part.visible_keys(0) == problem.visible_keys(1)
    assert part.visible_composites(0) == problem.visible_composites(4)
