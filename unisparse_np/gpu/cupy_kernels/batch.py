"""A batch as one problem: the items' heads one after the other, where the arrays allow that as a view.

Every head is computed alone, and a query head's KV head and composite head lie in its own item, so the results are those of
single items to the bit; only up to 16 queries, whose keys are shared out over the GPU by the number of heads, add up in another order.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import cupy

from ...problem import Problem
from ...trace import Trace
from .decode_attention import resident_thread_blocks, row_groups, splits_keys
from .plan import plan_of
from .run import DeviceTrace, run_dense, run_sparse
from .select import BlockMask

MOST_HEADS = 65535  # rows of a grid


def run_batch(q: Any, k: Any, v: Any, problem: Problem, *, dense: bool, keep_scores: bool) -> tuple[Any, Any, list[Trace]]:
    """All items of a batch, each computed alone: q [batch, Hq, Lq, d], k, v [batch, Hkv, Lk, d], problem that of one item.

    -> out [batch, Hq, Lq, d] in their dtype, lse [batch, Hq, Lq], and each item's Trace.
    """
    batch, together = q.shape[0], items_together(problem, q.dtype) if all(map(folds, (q, k, v))) else 1
    if batch > together:
        parts = (slice(n, n + together) for n in range(0, batch, together))
        results = [run_batch(q[part], k[part], v[part], problem, dense=dense, keep_scores=keep_scores) for part in parts]
        outs, lses, traces = zip(*results, strict=True)
        return cupy.concatenate(outs), cupy.concatenate(lses), [trace for part in traces for trace in part]
    whole = of_batch(problem, batch)
    q_heads, k_heads, v_heads = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
    out, trace = _run(q_heads, k_heads, v_heads, whole, dense, keep_scores)
    lse = trace.lse.reshape(batch, problem.num_q_heads, problem.q_len)
    return out.reshape(q.shape), lse, split(trace, lse, problem, batch)


def items_together(problem: Problem, dtype: Any) -> int:
    """Items that one call takes: no grid has more rows than it may, and of a few queries every group of rows has room on the device.

    Each thread block of decode_attention.cu keeps something of every group in its shared memory.
    """
    most = MOST_HEADS // (problem.num_q_heads + problem.num_kv_heads)
    if splits_keys(problem, dtype):
        most = min(most, resident_thread_blocks(problem) // row_groups(problem))
    return max(1, most)


def _run(q: Any, k: Any, v: Any, problem: Problem, dense: bool, keep_scores: bool) -> tuple[Any, Trace]:
    return run_dense(q, k, v, problem) if dense else run_sparse(q, k, v, problem, keep_scores=keep_scores)


def folds(x: Any) -> bool:
    """Whether x [batch, H, L, d] is [batch * H, L, d] as it lies in memory."""
    return x.shape[0] == 1 or x.shape[1] == 1 or x.strides[0] == x.shape[1] * x.strides[1]


@lru_cache(maxsize=256)
def of_batch(problem: Problem, batch: int) -> Problem:
    """The problem of `batch` items of this one, their heads one after the other."""
    config = problem.config
    shares: dict[str, Any] = {
        name: value * batch for name in ("top_p", "row_threshold") if isinstance(value := getattr(config, name), tuple)
    }
    q_heads, kv_heads = batch * problem.num_q_heads, batch * problem.num_kv_heads
    return replace(problem, num_q_heads=q_heads, num_kv_heads=kv_heads, config=replace(config, **shares) if shares else config)


def split(trace: Trace, lse: Any, problem: Problem, batch: int) -> list[Trace]:
    """Each item's Trace from that of the whole, its arrays as views."""

    def part(x: Any, n: int) -> Any:
        heads = 0 if x is None else len(x) // batch
        return None if x is None else x[n * heads : (n + 1) * heads]

    if not isinstance(trace, DeviceTrace):
        visible = plan_of(problem).visible_blocks
        return [Trace(trace.kernel, visible, visible, item) for item in lse]
    items: list[Trace] = []
    for n in range(batch):
        whole = trace.block_mask
        mask = BlockMask(part(whole.words, n), part(whole.counts, n), whole.heads_per_row)
        item = DeviceTrace(trace.kernel, lse[n], mask, part(trace.anchors, n), plan_of(problem))
        item.qc, item.kc, item.mean, item.peak = (part(x, n) for x in (trace.qc, trace.kc, trace.mean, trace.peak))
        items.append(item)
    return items
