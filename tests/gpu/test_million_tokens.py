"""A prompt of 1,048,576 tokens on a real device, in memory of more than 2^31 elements: every index has to be 64 bits wide."""

import numpy as np
import pytest

from tests.gpu.million_tokens import SHIFTS, TOKENS, arrays, expected_blocks
from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.gpu
# Nine heads of blocks of 64 have more than 2^31 block scores.
SMALL_BLOCKS = UniSparseConfig(64, 16, 16, top_p=0.5)
SHAPES = {"blocks of 64": (SMALL_BLOCKS, 9, 64, np.float16), "blocks of 128": (UniSparseConfig(top_p=0.5), 2, 128, np.float16)}


@pytest.fixture(params=["native", "portable"])
def kernels(request, monkeypatch, cupy):
    """The kernels of this device, and those that every device runs."""
    from unisparse_np.gpu.cupy_kernels import attend, plan, scores

    if request.param == "portable":
        monkeypatch.setattr(attend, "HOPPER_HEAD_DIMS", ())
        monkeypatch.setattr(scores, "HOPPER_HEAD_DIMS", ())
    plan.forget_plans()
    yield request.param
    plan.forget_plans()
    cupy.get_default_memory_pool().free_all_blocks()


def check_row(out, lse, q, k, v, head, row, position, config, cupy):
    """Query `row` of `head`, at this position, against the softmax in float64 over its blocks and the anchors of the others.

    All keys have the same norm, so that a block's anchor is its first key.
    """
    size, block = config.block_size, position // config.block_size
    selected = expected_blocks(block, SHIFTS[head])
    positions = np.concatenate([np.arange(n * size, (n + 1) * size) for n in selected] + [np.setdiff1d(np.arange(block), selected) * size])
    positions = positions[positions <= position]
    at = cupy.asarray(positions)
    logits = cupy.asnumpy(k[0, at]).astype(np.float64) @ cupy.asnumpy(q[head, row]).astype(np.float64) / np.sqrt(k.shape[2])
    weights = np.exp(logits - logits.max())
    expected = weights @ cupy.asnumpy(v[0, at]).astype(np.float64) / weights.sum()
    np.testing.assert_allclose(cupy.asnumpy(out[head, row]).astype(np.float64), expected, atol=2e-3)
    np.testing.assert_allclose(float(lse[head, row]), logits.max() + np.log(weights.sum()), atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_of_a_million_tokens(shape, kernels, cupy):
    """Every row's mask, and rows of the output from the first to the last."""
    from unisparse_np.gpu import cupy_kernels as engine

    config, heads, head_dim, dtype = SHAPES[shape]
    if engine.layers.memory.free_bytes() < 24 << 30:
        pytest.skip("needs 24 GB of free GPU memory")
    q, k, v = arrays(cupy, config, heads, head_dim, dtype, 1 << 31)
    out, trace = engine.run_sparse(q, k, v, Problem(heads, 1, TOKENS, TOKENS, head_dim, config))
    words, counts = trace.block_mask.words, trace.block_mask.counts
    blocks = TOKENS // config.block_size
    for head in range(heads):
        rows = np.arange(max(SHIFTS[head], 2), blocks)
        picked = np.stack([rows - SHIFTS[head], np.zeros_like(rows), rows - 1, rows])
        wanted = np.zeros((len(rows), blocks // 32), np.uint32)
        for column in picked:
            wanted[np.arange(len(rows)), column // 32] |= np.uint32(1) << (column % 32).astype(np.uint32)
        np.testing.assert_array_equal(cupy.asnumpy(words[head, rows[0] :]), wanted)
        assert (cupy.asnumpy(counts[head, rows[0] :]) == [len(set(column)) for column in picked.T]).all()
    np.testing.assert_array_equal(cupy.asnumpy(trace.anchors)[0, :, 0], np.arange(blocks) * config.block_size)
    for head in (0, heads - 1):
        for row in (TOKENS - 1, TOKENS - 345, SHIFTS[head] * config.block_size + 5):
            check_row(out, trace.lse, q, k, v, head, row, row, config, cupy)
