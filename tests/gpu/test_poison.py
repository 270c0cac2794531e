"""What selection must not look at, on a real device: NaN after what a chunk may read leaves its mask and outputs as they are."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.gpu
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
TOP_P = UniSparseConfig(top_p=0.5, sink_blocks=0, local_blocks=0)
ROW_THRESHOLD = UniSparseConfig(64, 2, 4, top_p=None, row_threshold=0.02)
BOTH = UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.1, top_p_compress=8, key_anchors=2)


@pytest.mark.parametrize("q_len", [150, 5])
def test_a_row_that_sees_one_number_that_is_not_finite_is_nan_as_a_whole(q_len, path, cupy):
    from unisparse_np.gpu import cupy_kernels as engine

    problem = Problem(4, 2, q_len, 700, 64, UniSparseConfig(top_p=1.0))
    rng = np.random.default_rng(q_len)
    q, k, v = (
        cupy.asarray(rng.standard_normal((heads, length, 64)).astype(BFLOAT16)) for heads, length in ((4, q_len), (2, 700), (2, 700))
    )
    v[:, 699, 5] = np.inf
    out = cupy.asnumpy(engine.run_sparse(q, k, v, problem)[0]).astype(np.float32)
    assert np.isnan(out[:, -1]).all() and np.isfinite(out[:, :-1]).all()


@pytest.mark.parametrize("q_len", [150, 5])
@pytest.mark.parametrize("config", [TOP_P, ROW_THRESHOLD, BOTH], ids=["top_p", "row_threshold", "both"])
def test_selection_reads_no_further_than_the_composite_of_the_last_position(config, q_len, path, cupy):
    """The mask stays to the bit. Outputs of rows that are repaired have float32 weights instead of 16-bit ones."""
    from unisparse_np.gpu import cupy_kernels as engine

    problem = Problem(4, 2, q_len, 700, 64, config, q_offset=303)
    rng = np.random.default_rng(q_len)
    q, k, v = (
        cupy.asarray(rng.standard_normal((heads, length, 64)).astype(BFLOAT16)) for heads, length in ((4, q_len), (2, 700), (2, 700))
    )
    out, trace = engine.run_sparse(q, k, v, problem)
    k[:, problem.keys_read :] = np.nan
    v[:, problem.q_offset + q_len :] = np.nan
    poisoned, poisoned_trace = engine.run_sparse(q, k, v, problem)
    assert (cupy.asnumpy(poisoned_trace.mask) == cupy.asnumpy(trace.mask)).all()
    difference = np.abs(cupy.asnumpy(poisoned).astype(np.float64) - cupy.asnumpy(out).astype(np.float64))
    assert difference.max() <= 0.02
    np.testing.assert_allclose(cupy.asnumpy(poisoned_trace.lse), cupy.asnumpy(trace.lse), atol=1e-3)
