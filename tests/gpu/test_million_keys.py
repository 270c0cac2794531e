"""A few queries over 1,048,576 keys on a real device, where keys lie more than 2^31 elements apart."""

import numpy as np
import pytest

from tests.gpu.million_tokens import SHIFTS, TOKENS, arrays, expected_blocks
from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("q_len", [1, 3, 200])
def test_a_few_queries_over_a_million_keys(q_len, dtype, cupy):
    from unisparse_np.gpu import cupy_kernels as engine

    config = UniSparseConfig(top_p=0.5)
    q, k, v = arrays(cupy, config, 2, 64, dtype, 1 << 31 if dtype == np.float16 else 0)
    end = TOKENS - 200
    part = q[:, end : end + q_len]
    out, trace = engine.run_sparse(part, k, v, Problem(2, 1, q_len, TOKENS, 64, config, q_offset=end))
    mask = cupy.asnumpy(trace.mask)
    for head in range(2):
        for row in {0, q_len - 1}:
            size = config.block_size
            first = end + row // size * size  # of the row's query block, which may begin inside a key block
            last = min(end + q_len, first + size) - 1
            assert np.isin(expected_blocks(first // size, SHIFTS[head]), np.flatnonzero(mask[head, row // size])).all()
            assert mask[head, row // size].sum() <= 8 and mask[head, row // size, last // size]
    dense, dense_trace = engine.run_dense(part, k, v, Problem(2, 1, q_len, TOKENS, 64, config, q_offset=end))
    for head in range(2):
        logits = cupy.asnumpy(k[0, : end + q_len]).astype(np.float32) @ cupy.asnumpy(part[head, q_len - 1]).astype(np.float32) / 8
        weights = np.exp(logits.astype(np.float64) - logits.max())
        expected = weights @ cupy.asnumpy(v[0, : end + q_len]).astype(np.float64) / weights.sum()
        np.testing.assert_allclose(cupy.asnumpy(dense[head, q_len - 1]).astype(np.float64), expected, atol=2e-3)
        np.testing.assert_allclose(cupy.asnumpy(out[head, q_len - 1]).astype(np.float64), expected, atol=2e-2)
        np.testing.assert_allclose(float(dense_trace.lse[head, q_len - 1]), logits.max() + np.log(weights.sum()), atol=2e-3)
