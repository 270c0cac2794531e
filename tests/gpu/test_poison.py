"""What a query must not look at, on a real device: NaN after what a chunk may read, and logits at the edges of the 16-bit types."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig, reference

pytestmark = pytest.mark.gpu
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)
TOP_P = UniSparseConfig(top_p=0.5, sink_blocks=0, local_blocks=0)
ROW_THRESHOLD = UniSparseConfig(64, 2, 4, top_p=None, row_threshold=0.02)
BOTH = UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.1, top_p_compress=8, key_anchors=2)


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


def extreme_inputs(kind, dtype):
    """q, k, v [1, 32768, 64] whose logits lie at an edge."""
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 32768, 64), dtype=np.float32) for _ in range(3))
    q[...] = 1.0
    if kind == "one huge":
        k[:, 1000] = 3e4
    elif kind == "all equal":
        k[...] = 1.0
    else:  # every key, or every other
        q[...] = 100.0
        k[:, :: 1 if kind == "all very low" else 2] = -6e4
    return tuple(x.astype(dtype) for x in (q, k, v))


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("kind", ["one huge", "all equal", "all very low", "half very low"])
def test_extreme_logits_of_32768_keys(kind, dtype, path, cupy):
    """Everything stays finite, and rows here and there are those of the softmax in float64 on the same mask.

    A float32 logit of 4e7 is a multiple of 4: the log-sum-exp is compared relative to it.
    """
    from unisparse_np.gpu import cupy_kernels as engine

    problem = Problem(1, 1, 32768, 32768, 64, UniSparseConfig(top_p=0.5))
    qkv = extreme_inputs(kind, dtype)
    out, trace = engine.run_sparse(*(cupy.asarray(x) for x in qkv), problem)
    out, lse = cupy.asnumpy(out)[0].astype(np.float64), cupy.asnumpy(trace.lse)[0]
    mask, anchors = cupy.asnumpy(trace.mask)[0], cupy.asnumpy(trace.anchors)[0]
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    q, k, v = (x[0].astype(np.float64) for x in qkv)
    for row in (0, 1, 999, 1000, 1001, 12345, 32767):
        block = row // problem.config.block_size
        positions = reference.attend.attended_positions(mask[block], anchors, block, problem)
        positions = positions[positions <= row]
        logits = k[positions] @ q[row] * problem.scale
        weights = np.exp(logits - logits.max())
        np.testing.assert_allclose(out[row], weights @ v[positions] / weights.sum(), atol=0.03)
        np.testing.assert_allclose(lse[row], logits.max() + np.log(weights.sum()), rtol=1e-6, atol=2e-3)
