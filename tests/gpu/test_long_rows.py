"""Rows of 32,768 keys on a real device: logits at the edges of the 16-bit types, and how exact a long sum is."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig, reference
from unisparse_np.comparison import TOLERANCES, compare_outputs

pytestmark = pytest.mark.gpu
BFLOAT16, FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)


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


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("spread", [0.3, 4.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_outputs_of_32768_keys_are_as_exact_as_plain_16_bits(head_dim, spread, dtype, path, cupy):
    """The last 256 rows, dense and on a mask of every fourth block with anchors; the error is at most twice a plain computation's."""
    from unisparse_np.gpu import cupy_kernels as engine

    problem = Problem(2, 1, 256, 32768, head_dim)
    rng = np.random.default_rng(head_dim)
    qkv = tuple(
        (factor * rng.standard_normal((heads, length, head_dim), dtype=np.float32)).astype(dtype)
        for heads, length, factor in ((2, 256, spread), (1, 32768, 1.0), (1, 32768, 1.0))
    )
    given = [cupy.asarray(x) for x in qkv]
    blocks = np.arange(problem.num_k_blocks)
    for mask in (np.ones((2, 2, 256), bool), np.broadcast_to((blocks % 4 == 1) | (blocks >= 254), (2, 2, 256)).copy()):
        out, lse = engine.sparse_attention(*given, cupy.asarray(mask), problem)
        exact = tuple(x.astype(np.float64) for x in qkv)
        expected, expected_lse = reference.sparse_attention(*exact, mask, problem)
        report = compare_outputs(cupy.asnumpy(out), exact, expected, mask, problem, dtype.name)
        assert report.ok, report
        np.testing.assert_allclose(cupy.asnumpy(lse), expected_lse, atol=TOLERANCES[dtype.name].scores)
