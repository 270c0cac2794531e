"""The whole call on the reference: the four stages over independent parts of the problem, in a pool of threads.

NumPy lets go of the interpreter lock inside products and exponentials, so threads over heads and query blocks use every
core while each stage stays plain NumPy. A part is a smaller problem of the same kind: one composite group of KV heads and
a run of query blocks. Parts never change the result: a query block is computed the same way whatever it is cut with.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise

import numpy as np
from threadpoolctl import ThreadpoolController

from ..problem import KeySummary, Problem, ceil_div
from ..trace import Trace
from .attend import dense_attention, find_anchors, sparse_attention
from .compress import compress, compress_keys
from .precision import widen
from .scores import score_blocks
from .select import select_blocks

PARTS_PER_THREAD = 4  # enough that the last part to finish keeps the others waiting only briefly
WORTH_SPLITTING = 1 << 18  # scores; below it (a decode step) handing parts to threads costs more than it saves


def summarise_keys(k: np.ndarray, problem: Problem) -> KeySummary:
    """Composite keys and anchors of k [Hkv, Lk, d]."""
    return KeySummary(compress_keys(k, problem), find_anchors(k, problem.config.block_size, problem.config.key_anchors))


def run_sparse(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    problem: Problem,
    key_summary: KeySummary | None = None,
    keep_scores: bool = False,
    q_composites: None = None,
) -> tuple[np.ndarray, Trace]:
    """Steps 1-6. q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] and its Trace (with qc, kc, mean, peak if keep_scores).

    q_composites: None, as queries are pooled here; a backend that pools them in its `rotate_heads` takes them.
    """
    k, v = widen(k), widen(v)
    summary = summarise_keys(k, problem) if key_summary is None else key_summary
    parts = split(problem)
    results = in_threads(lambda part: _sparse_part(q, k, v, summary, part, keep_scores), parts)
    out, lse, mask = (_join(parts, [r[n] for r in results]) for n in range(3))
    visible = problem.total_visible_blocks
    trace = Trace(
        kernel=f"reference, {_describe_threads()}",
        kept_blocks=problem.config.kept_blocks(int(mask.sum()), visible),
        visible_blocks=visible,
        lse=lse,
        mask=mask,
        anchors=summary.anchors,
    )
    if keep_scores:
        trace.kc = summary.kc
        trace.qc, trace.mean = (_join(parts, [r[n] for r in results]) for n in (3, 4))
        trace.peak = None if problem.config.row_threshold is None else _join(parts, [r[5] for r in results])
    return out, trace


def run_dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, problem: Problem) -> tuple[np.ndarray, Trace]:
    """Dense attention: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] and its Trace."""
    k, v = widen(k), widen(v)
    parts = split(problem)
    results = in_threads(lambda part: dense_attention(part.queries(q), part.heads_of(k), part.heads_of(v), part.problem), parts)
    out, lse = (_join(parts, [r[n] for r in results]) for n in range(2))
    visible = problem.total_visible_blocks
    return out, Trace(kernel=f"reference dense, {_describe_threads()}", kept_blocks=visible, visible_blocks=visible, lse=lse)


class Part:
    """Some KV heads (with their query heads) and some query blocks of a problem, as a problem of its own."""

    def __init__(self, problem: Problem, kv_heads: tuple[int, int], q_blocks: tuple[int, int]) -> None:
        self.kv_heads, self.q_blocks = kv_heads, q_blocks
        self.rows = problem.query_range(q_blocks[0])[0], problem.query_range(q_blocks[1] - 1)[1]
        self.q_heads = kv_heads[0] * problem.group_size, kv_heads[1] * problem.group_size
        self.composite_heads = slice(kv_heads[0] // problem.kv_heads_per_composite, kv_heads[1] // problem.kv_heads_per_composite)
        whole = self.q_heads == (0, problem.num_q_heads) and self.rows == (0, problem.q_len)
        self.problem = problem if whole else problem.of_kv_heads(*kv_heads).of_query_blocks(*q_blocks)

    def queries(self, q: np.ndarray) -> np.ndarray:
        """q [Hq, Lq, d] -> this part's [Hq', Lq', d]."""
        return q[slice(*self.q_heads), slice(*self.rows)]

    def heads_of(self, x: np.ndarray) -> np.ndarray:
        """Anything per KV head [Hkv, ...] -> this part's."""
        return x[slice(*self.kv_heads)]


def split(problem: Problem) -> list[Part]:
    """Parts enough to keep the threads busy, those with the most keys first."""
    if problem.num_q_heads * problem.q_len * problem.k_len < WORTH_SPLITTING:
        return [Part(problem, (0, problem.num_kv_heads), (0, problem.num_q_blocks))]
    heads_each = problem.kv_heads_per_composite
    head_groups = [(h, h + heads_each) for h in range(0, problem.num_kv_heads, heads_each)]
    runs = min(problem.num_q_blocks, max(1, ceil_div(PARTS_PER_THREAD * num_threads(), len(head_groups))))
    edges = [problem.num_q_blocks * n // runs for n in range(runs + 1)]
    return [Part(problem, heads, (a, b)) for a, b in reversed(list(pairwise(edges))) for heads in head_groups]


def in_threads(work: Callable, parts: list) -> list:
    """[work(part) for part in parts], in as many threads as BLAS was given.

    BLAS itself runs on one thread meanwhile, even for a single part: with several it cuts products differently, which
    moves last bits.
    """
    with _blas().limit(limits=1, user_api="blas"):
        return [work(parts[0])] if len(parts) == 1 else list(_pool().map(work, parts))


@lru_cache(maxsize=1)
def num_threads() -> int:
    """Threads that BLAS was started with (OMP_NUM_THREADS and the like are honoured)."""
    return max([1, *(library["num_threads"] for library in _blas().info() if library["user_api"] == "blas")])


def _sparse_part(q: np.ndarray, k: np.ndarray, v: np.ndarray, summary: KeySummary, part: Part, keep_scores: bool) -> tuple:
    queries, problem = part.queries(q), part.problem
    kc = summary.kc[part.composite_heads]
    own = KeySummary(kc, part.heads_of(summary.anchors))
    qc, _ = compress(queries, k, problem, own)
    mean, peak = score_blocks(qc, kc, problem)
    mask = select_blocks(mean, peak, problem)
    out, lse = sparse_attention(queries, part.heads_of(k), part.heads_of(v), mask, problem, own)
    return (out, lse, mask, qc, mean, peak) if keep_scores else (out, lse, mask)


def _join(parts: list[Part], pieces: list[np.ndarray]) -> np.ndarray:
    """Put the parts' [heads, rows, ...] together again."""
    if len(parts) == 1:
        return pieces[0]
    by_run: dict[tuple[int, int], list[np.ndarray]] = {}
    for part, piece in sorted(zip(parts, pieces, strict=True), key=lambda pair: (pair[0].q_blocks, pair[0].kv_heads)):
        by_run.setdefault(part.q_blocks, []).append(piece)
    return np.concatenate([np.concatenate(heads, axis=0) for heads in by_run.values()], axis=1)


def _describe_threads() -> str:
    return f"{num_threads()} thread{'s' if num_threads() > 1 else ''}"


@lru_cache(maxsize=1)
def _blas() -> ThreadpoolController:
    return ThreadpoolController()


@lru_cache(maxsize=1)
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=num_threads(), thread_name_prefix="unisparse")
