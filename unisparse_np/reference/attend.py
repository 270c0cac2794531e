"""Step 6 of ALGORITHM.md: exact attention over the selected blocks and the anchor keys of the others."""

from __future__ import annotations

import numpy as np

from ..problem import KeySummary, Problem, ceil_div
from .precision import widen


def sparse_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, problem: Problem, key_summary: KeySummary | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Step 6. Every query attends to the tokens of its selected blocks and to the anchor keys of the other visible blocks.

    q [Hq, Lq, d], k, v [Hkv, Lk, d], mask [Hq, Nq, Nk] bool -> out [Hq, Lq, d], lse [Hq, Lq] (natural log), in float32
    or wider. A query with nothing to attend has out 0 and lse -inf. With key_summary its anchors are taken as they are.
    """
    q, k, v = scaled(q, problem), widen(k), widen(v)
    anchors = find_anchors(k, problem.config.block_size, problem.config.key_anchors) if key_summary is None else key_summary.anchors
    out = np.empty(q.shape, dtype=q.dtype)
    lse = np.empty(q.shape[:2], dtype=q.dtype)
    for head in range(problem.num_q_heads):
        kv_head = head // problem.group_size
        for i in range(problem.num_q_blocks):
            one, rows = slice(head, head + 1), slice(*problem.query_range(i))
            positions = attended_positions(mask[head, i], anchors[kv_head], i, problem)  # [n], ascending
            out[one, rows], lse[one, rows] = attend_block(q[one, rows], k[kv_head], v[kv_head], positions, i, problem)
    return out, lse


def dense_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """The same attention with every visible key: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d], lse [Hq, Lq]."""
    q, k, v = scaled(q, problem), widen(k), widen(v)
    out = np.empty(q.shape, dtype=q.dtype)
    lse = np.empty(q.shape[:2], dtype=q.dtype)
    for kv_head in range(problem.num_kv_heads):
        group = slice(kv_head * problem.group_size, (kv_head + 1) * problem.group_size)  # its query heads see the same keys
        for i in range(problem.num_q_blocks):
            rows = slice(*problem.query_range(i))
            positions = np.arange(problem.visible_keys(i))
            out[group, rows], lse[group, rows] = attend_block(q[group, rows], k[kv_head], v[kv_head], positions, i, problem)
    return out, lse


def scaled(q: np.ndarray, problem: Problem) -> np.ndarray:
    """q * scale in float32 or wider: one pass over the queries instead of one over the scores."""
    q = widen(q)
    return q * q.dtype.type(problem.scale)


def attended_positions(selected: np.ndarray, anchors: np.ndarray, i: int, problem: Problem) -> np.ndarray:
    """Key positions that query block i may attend to, ascending, each once.

    selected [Nk] bool, anchors [Nk, r] -> [n].
    """
    visible = problem.visible_keys(i)
    kept = np.repeat(selected, problem.config.block_size)[:visible]  # [visible], a copy
    kept[anchors[(anchors >= 0) & (anchors < visible)]] = True
    return np.flatnonzero(kept)


def attend_block(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, positions: np.ndarray, i: int, problem: Problem
) -> tuple[np.ndarray, np.ndarray]:
    """Exact softmax attention of query block i over the given positions, for heads that share them.

    q [heads, rows, d] times scale, k, v [Lk, d], positions [n] ascending -> out [heads, rows, d], lse [heads, rows].
    """
    heads, rows, dim = q.shape
    if positions.size == 0:
        return np.zeros_like(q), np.full((heads, rows), -np.inf, dtype=q.dtype)
    scores = dot_products(q.reshape(heads * rows, dim), gather(k, positions))  # [heads * rows, n]
    if problem.causal:
        hide_future(scores.reshape(heads, rows, -1), positions, problem.query_positions(i)[0])
    highest = scores.max(axis=1, keepdims=True)  # [heads * rows, 1]
    highest[highest == -np.inf] = 0.0  # a row that sees nothing: exp(-inf - 0) = 0 for all of it
    scores -= highest
    weights = np.exp(scores, out=scores)  # [heads * rows, n]
    total = weights.sum(axis=1, keepdims=True)  # [heads * rows, 1]
    out = weighted_values(weights, gather(v, positions))  # [heads * rows, d]
    with np.errstate(divide="ignore"):
        lse = highest + np.log(total)  # -inf where the total is 0, and out is 0 there
    out /= np.where(total == 0, q.dtype.type(1), total)
    return out.reshape(q.shape), lse.reshape(heads, rows)


def dot_products(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """q [rows, d], k [n, d] -> q k^T [rows, n], summed 64 dimensions at a time: BLAS adds one after the other, and in float32
    a running sum of 128 products of large logits loses more than the 1e-5 that outputs may err.
    """
    scores = q[:, :64] @ k[:, :64].T
    for start in range(64, q.shape[1], 64):
        scores += q[:, start : start + 64] @ k[:, start : start + 64].T
    return scores


def hide_future(scores: np.ndarray, positions: np.ndarray, first_query: int) -> None:
    """The causal rule per token: scores [heads, rows, n] of keys after their query become -inf, in place."""
    tail = int(np.searchsorted(positions, first_query, side="right"))  # every row sees the positions before the tail
    query_positions = first_query + np.arange(scores.shape[1])  # [rows]
    future = positions[tail:] > query_positions[:, None]  # [rows, n - tail]
    np.copyto(scores[:, :, tail:], -np.inf, where=future)


def gather(x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """x[positions]; a view where the positions are an unbroken run, as in dense attention."""
    first, last = int(positions[0]), int(positions[-1])
    return x[first : last + 1] if last - first + 1 == positions.size else x.take(positions, axis=0)


def weighted_values(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """weights @ values, where a weight of 0 (the future) hides even a NaN or an infinity: weights [rows, n], values [n, d]."""
    out = weights @ values
    if np.isfinite(out.sum()):  # cheap, and right to doubt a sum that only overflowed
        return out
    finite = np.isfinite(values)
    out = weights @ np.where(finite, values, 0.0)
    for n in np.flatnonzero(~finite.all(axis=1)):
        seen = weights[:, n] != 0
        out[seen] += weights[seen, n, None] * np.where(finite[n], 0.0, values[n])
    return out


def find_anchors(k: np.ndarray, block_size: int, key_anchors: int) -> np.ndarray:
    """Positions of the keys of smallest Euclidean norm in each block: k [Hkv, Lk, d] -> [Hkv, Nk, r] int32.

    In ascending norm, the lower position first on ties; -1 where a ragged last block has fewer keys than r.
    """
    heads, length, _ = k.shape
    blocks = ceil_div(length, block_size)
    norms = np.full((heads, blocks * block_size), np.inf, dtype=np.promote_types(k.dtype, np.float32))
    norms[:, :length] = squared_norms(k)
    norms = norms.reshape(heads, blocks, block_size)
    width = min(key_anchors, block_size)
    order = np.argsort(norms, axis=-1, kind="stable")[..., :width]  # [Hkv, Nk, width]; the padding sorts last
    positions = order + np.arange(blocks)[:, None] * block_size
    anchors = np.full((heads, blocks, key_anchors), -1, dtype=np.int32)
    anchors[..., :width] = np.where(positions < length, positions, -1)
    return anchors


def squared_norms(k: np.ndarray) -> np.ndarray:
    """[Hkv, L, d] -> [Hkv, L] in float32 or wider; the order of the squares is the order of the norms."""
    k = widen(k)
    return np.square(k).sum(axis=-1)
