"""Dense attention weights, one head and one query block at a time: what a selection should have kept."""

from __future__ import annotations

from typing import Any

from ..problem import Problem


def attention_weights(q: Any, k: Any, i: int, problem: Problem, xp: Any) -> Any:
    """Softmax weights of query block i over its visible keys -> [rows, visible keys] float32 or wider.

    q [rows, d] of one head and this block, k [Lk, d]; xp: their array library.
    """
    wide = xp.promote_types(q.dtype, xp.float32)
    visible = problem.visible_keys(i)
    scores = (q.astype(wide) * problem.scale) @ k[:visible].astype(wide).T  # [rows, visible]
    if problem.causal:
        rows = problem.query_positions(i)[0] + xp.arange(len(q))
        scores = xp.where(xp.arange(visible) > rows[:, None], -xp.inf, scores)
    weights = xp.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def mass_per_block(weights: Any, block_size: int, xp: Any) -> Any:
    """[rows, keys] -> [rows, blocks]: the weight that each row gives to each key block; the last may hold fewer keys."""
    rows, keys = weights.shape
    blocks = -(-keys // block_size)
    padded = xp.zeros((rows, blocks * block_size), dtype=weights.dtype)
    padded[:, :keys] = weights
    return padded.reshape(rows, blocks, block_size).sum(axis=-1)
