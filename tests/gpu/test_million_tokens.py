"""1,048,576 tokens on a real device, in memory where rows lie more than 2^31 elements apart: every index has to be 64 bits wide.

Keys are made so that the answer is known: composite keys are random signs, and the queries of head h are those of the block that lies
SHIFTS[h] blocks before, times 4. One key block then holds all of a row's mass.
"""

import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig

pytestmark = pytest.mark.gpu
TOKENS = 1 << 20
SHIFTS = (1, 2, 3, 40, 500, 7, 90, 1000, 1900)  # in blocks, one a query head
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


def arrays(cupy, config, heads, head_dim, dtype, most_elements):
    """q [heads, L, d], k, v [1, L, d]: views of one array [L, .., d] of more than most_elements, of which the rest is NaN."""
    between = max(heads + 2, most_elements // (TOKENS * head_dim) + 1)
    room = cupy.full((TOKENS, between, head_dim), np.nan, dtype)
    signs = np.random.default_rng(0).integers(0, 2, (TOKENS // config.k_compress, head_dim), dtype=np.int8) * 2 - 1
    k = cupy.repeat(cupy.asarray(signs).astype(dtype), config.k_compress, axis=0)
    room[:, -2] = k
    room[:, -1] = cupy.roll(k, 5, axis=1) * cupy.linspace(0.5, 1, TOKENS, dtype=np.float32).astype(dtype)[:, None]
    for head in range(heads):
        room[:, head] = cupy.roll(k, SHIFTS[head] * config.block_size, axis=0) * dtype(4)
    return room[:, :heads].transpose(1, 0, 2), room[:, -2:-1].transpose(1, 0, 2), room[:, -1:].transpose(1, 0, 2)


def expected_blocks(block, shift):
    """The block that holds the mass, the first one, the one before and the diagonal."""
    return sorted({block - shift, 0, max(0, block - 1), block})


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
        positions = np.arange(end + q_len)
        logits = cupy.asnumpy(k[0, : end + q_len]).astype(np.float32) @ cupy.asnumpy(part[head, q_len - 1]).astype(np.float32) / 8
        weights = np.exp(logits.astype(np.float64) - logits.max())
        expected = weights @ cupy.asnumpy(v[0, : end + q_len]).astype(np.float64) / weights.sum()
        assert len(positions) == len(weights)
        np.testing.assert_allclose(cupy.asnumpy(dense[head, q_len - 1]).astype(np.float64), expected, atol=2e-3)
        np.testing.assert_allclose(cupy.asnumpy(out[head, q_len - 1]).astype(np.float64), expected, atol=2e-2)
        np.testing.assert_allclose(float(dense_trace.lse[head, q_len - 1]), logits.max() + np.log(weights.sum()), atol=2e-3)
