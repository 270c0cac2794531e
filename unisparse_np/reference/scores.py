"""Steps 2 and 3 of ALGORITHM.md: attend in the compressed space and sum the attention per block."""

from __future__ import annotations

import numpy as np

from ..problem import Problem
from .compress import coarse_composites


def score_blocks(qc: np.ndarray, kc: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray | None]:
    """Steps 2-3. Compressed attention, summed over the composite keys of each key block.

    qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean [Hc, Nq, Nk] (B: the mean over a query block's composite queries) and
    peak [Hc, Nq, Nk] (R: their maximum), or None in its place when the row threshold is off. Blocks that are not
    visible hold 0. Both have the dtype of qc. With top_p_compress the mean comes from coarse composites and the peak from qc, kc.

    Each query block is its own matrix product over just its visible keys, so that the result does not depend on how
    the prompt was cut into (block-aligned) chunks, to the last bit.
    """
    if problem.config.top_p_compress is not None:
        mean, _ = score_blocks(*coarse_composites(qc, kc, problem), problem.of_top_p())
        _, peak = score_blocks(qc, kc, problem.of_row_threshold())
        return mean, peak
    shape = (problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks)
    mean = np.zeros(shape, dtype=qc.dtype)
    peak = None if problem.config.row_threshold is None else np.zeros(shape, dtype=qc.dtype)
    for i in range(problem.num_q_blocks):
        attention = compressed_attention(qc, kc, i, problem)  # [Hc, rows, visible composites]
        mass = sum_per_block(attention, problem)  # [Hc, rows, visible blocks]
        visible = mass.shape[-1]
        mean[:, i, :visible] = mass.sum(axis=1) / mass.shape[1]  # step 3, B
        if peak is not None:
            peak[:, i, :visible] = mass.max(axis=1)  # step 3, R
    return mean, peak


def compressed_attention(qc: np.ndarray, kc: np.ndarray, i: int, problem: Problem) -> np.ndarray:
    """Step 2 for query block i: A = softmax(Q~ K~^T * scale) -> [Hc, rows, visible composites]."""
    first, last = problem.query_composite_range(i)
    limits = np.array([problem.visible_composites(t) for t in range(first, last)])  # [rows]
    rows, visible = last - first, int(limits[-1])
    shared = (problem.num_composite_kv_heads, problem.heads_per_composite_kv_head, rows, problem.head_dim)
    queries = qc[:, first:last].reshape(shared)  # [Hkc, Hc/Hkc, rows, d]
    keys = kc[:, None, :visible]  # [Hkc, 1, visible, d]
    logits = np.matmul(queries, keys.swapaxes(-1, -2))  # [Hkc, Hc/Hkc, rows, visible]
    logits = logits.reshape(problem.num_composite_heads, rows, visible)
    logits *= problem.scale
    ragged = int(limits[0])  # composites before this one are visible to every row
    hidden = np.arange(ragged, visible) >= limits[:, None]  # [rows, visible - ragged]
    logits[:, :, ragged:][:, hidden] = -np.inf
    return softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax along the last axis, in place."""
    logits -= logits.max(axis=-1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=-1, keepdims=True)
    return logits


def sum_per_block(attention: np.ndarray, problem: Problem) -> np.ndarray:
    """Step 3: [Hc, rows, composites] -> [Hc, rows, blocks], the last block possibly holding fewer composites."""
    per_block = problem.config.block_size // problem.config.k_compress
    return np.add.reduceat(attention, np.arange(0, attention.shape[-1], per_block), axis=-1)
