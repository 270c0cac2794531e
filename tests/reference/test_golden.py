"""Every golden vector, stage by stage and end to end, in float64 and float32 and as the 16-bit input it is."""

import numpy as np
import pytest

from tests.golden import FILES, load
from unisparse_np import audit, reference, unisparse_attention

# The answers are stored in float32, so half a unit in its last place (6e-8 of values up to about 16) is all that may differ.
STORED = 1e-6


def test_every_vector_is_there():
    assert len(FILES) == 23


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestGolden:
    def test_stages_in_float64(self, path):
        golden = load(path)
        problem = golden.problem
        q, k, v = (x.astype(np.float64) for x in (golden.q, golden.k, golden.v))
        qc, kc = reference.compress(q, k, problem)
        mean, peak = reference.score_blocks(qc, kc, problem)
        mask = reference.select_blocks(mean, peak, problem)
        out, lse = reference.sparse_attention(q, k, v, mask, problem)
        assert {x.dtype for x in (qc, kc, mean, out, lse)} == {np.dtype(np.float64)}
        repeat = problem.config.head_compress
        np.testing.assert_allclose(np.repeat(mean, repeat, axis=0), golden.scores, rtol=0, atol=STORED)
        if peak is not None:
            np.testing.assert_allclose(np.repeat(peak, repeat, axis=0), golden.peak, rtol=0, atol=STORED)
        np.testing.assert_array_equal(mask, golden.mask)
        np.testing.assert_allclose(out, golden.out, rtol=0, atol=STORED)
        np.testing.assert_allclose(lse, golden.lse, rtol=0, atol=STORED)

    def test_whole_call_in_float64(self, path):
        golden = load(path)
        problem = golden.problem
        q, k, v = (x.astype(np.float64) for x in (golden.q, golden.k, golden.v))
        q_offset = problem.q_offset if problem.causal else None
        out, trace = unisparse_attention(q, k, v, problem.config, causal=problem.causal, q_offset=q_offset, return_trace=True)
        np.testing.assert_array_equal(trace.mask, golden.mask)
        np.testing.assert_allclose(out, golden.out, rtol=0, atol=STORED)
        np.testing.assert_allclose(trace.lse, golden.lse, rtol=0, atol=STORED)

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_audit(self, path, dtype):
        golden = load(path)
        problem = golden.problem
        q, k, v = (x.astype(dtype) for x in (golden.q, golden.k, golden.v))
        q_offset = problem.q_offset if problem.causal else None
        report = audit(q, k, v, problem.config, causal=problem.causal, q_offset=q_offset)
        assert report.ok, str(report)
