"""A problem of 1,048,576 tokens whose answer is known, in memory where rows lie more than 2^31 elements apart.

Composite keys are random signs, and the queries of head h are the keys of the block that lies SHIFTS[h] blocks before, times 4. One key
block then holds all of a row's mass.
"""

import numpy as np

TOKENS = 1 << 20
SHIFTS = (1, 2, 3, 40, 500, 7, 90, 1000, 1900)  # in blocks, one a query head


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
