"""The whole call on the GPU: the four stages one after another on the current stream, without a look back at the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...errors import BackendUnavailable
from ...problem import KeySummary, Problem
from ...trace import Trace
from . import plain_stages
from .attend import attend
from .compress import pool, to_half
from .plan import plan_of
from .scores import UNITS, score_units
from .select import BlockMask, select_words, to_bool
from .shapes import check_dtype, uses_tensor_cores


class DeviceTrace(Trace):
    """A Trace whose mask and counts stay on the GPU until they are read: only reading them waits for the device."""

    def __init__(self, kernel: str, lse: Any, block_mask: BlockMask, anchors: Any, problem: Problem) -> None:
        self.kernel, self.lse, self.anchors = kernel, lse, anchors
        self.visible_blocks = total_visible_blocks(problem)
        self.qc = self.kc = self.mean = self.peak = None
        self._block_mask, self._problem = block_mask, problem

    @property
    def mask(self) -> Any:
        """[Hq, Nq, Nk] bool."""
        return to_bool(self._block_mask, self._problem)

    @property
    def kept_blocks(self) -> float:  # type: ignore[override]
        """Selected blocks, plus r / S for each visible block that was not."""
        return self.kept_later()()

    def kept_later(self) -> Callable[[], float]:
        """A function that gives kept_blocks and waits for the device when it is called; it holds the counts [rows] alone."""
        counts, heads_per_row = self._block_mask.counts, self._block_mask.heads_per_row
        config, visible = self._problem.config, self.visible_blocks
        return lambda: config.kept_blocks(int(counts.sum(dtype=np.int64)) * heads_per_row, visible)


def run_sparse(
    q: Any,
    k: Any,
    v: Any,
    problem: Problem,
    key_summary: KeySummary | None = None,
    keep_scores: bool = False,
    q_composites: Any = None,
) -> tuple[Any, Trace]:
    """Steps 1-6. q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] in their dtype, and its Trace (with scores if keep_scores).

    q_composites: the composites of q where another kernel has pooled them already, C-contiguous [Hc, Tq, d] float16 (saturating
    at 65504), as compress.cu gives them; None to pool q here.
    """
    check_dtype(q.dtype)
    if not uses_tensor_cores(problem, q.dtype):
        return _run_sparse_plain(q, k, v, problem, key_summary, keep_scores)
    plan = plan_of(problem)
    with naming_the_way_out(problem):
        own = key_summary is None
        pooled = pool(None if q_composites is not None else q, k, plan, np.float16, with_keys=own, with_anchors=own)
        kc, anchors = (pooled.kc, pooled.anchors) if key_summary is None else (to_half(key_summary.kc, plan), key_summary.anchors)
        if problem.config.key_anchors == 0:
            anchors = None
        qc = pooled.qc if q_composites is None else q_composites
        units, peak = score_units(qc, kc, plan, clear=keep_scores)
        mask = select_words(units, peak, plan)
        result = attend(q, k, v, mask, anchors, plan)
    trace = DeviceTrace(result.kernel, result.lse, mask, anchors, problem)
    if keep_scores:
        trace.qc, trace.kc = qc.astype(np.float32), kc.astype(np.float32)
        trace.mean, trace.peak = units.astype(np.float32) / np.float32(UNITS), peak
    return result.out, trace


def _run_sparse_plain(
    q: Any, k: Any, v: Any, problem: Problem, key_summary: KeySummary | None, keep_scores: bool
) -> tuple[Any, Trace]:
    """run_sparse with float32 composites and the plain kernels."""
    plan, own = plan_of(problem), key_summary is None
    with naming_the_way_out(problem):
        qc, kc, anchors = plain_stages.pool(q, k, problem, with_keys=own, with_anchors=own)
        if key_summary is not None:
            kc, anchors = key_summary.kc, key_summary.anchors if problem.config.key_anchors else None
        units, peak = plain_stages.score_units(qc, kc, plan)
        mask = select_words(units, peak, plan)
        result = attend(q, k, v, mask, anchors, plan)
    trace = DeviceTrace(result.kernel, result.lse, mask, anchors, problem)
    if keep_scores:
        trace.qc, trace.kc, trace.mean, trace.peak = qc, kc, units.astype(np.float32) / np.float32(UNITS), peak
    return result.out, trace


def run_dense(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Trace]:
    """Dense attention: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] in their dtype, and its Trace."""
    check_dtype(q.dtype)
    with naming_the_way_out(problem):
        result = attend(q, k, v, None, None, plan_of(problem))
    visible = total_visible_blocks(problem)
    return result.out, Trace(kernel=f"{result.kernel} dense", kept_blocks=visible, visible_blocks=visible, lse=result.lse)


@contextlib.contextmanager
def naming_the_way_out(problem: Problem) -> Iterator[None]:
    """Turns an allocation that does not fit into BackendUnavailable with the bytes asked for and a chunk of queries that fits."""
    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        config = problem.config
        free = cupy.cuda.runtime.memGetInfo()[0] + cupy.get_default_memory_pool().free_bytes()
        row = 2 * problem.head_dim
        per_query = problem.num_q_heads * (row + 4) + problem.num_composite_heads * row // config.q_compress
        per_query += problem.num_composite_heads * (problem.num_k_blocks + 31) * 5 // config.block_size
        fits = max(1, free // 2 // per_query // config.block_size) * config.block_size
        raise BackendUnavailable(
            f"the GPU has no room for {problem.q_len} queries at once ({error}): pass them in chunks of {min(fits, problem.q_len)} tokens "
            "(--chunk-size on the command line), or free memory that other programs hold"
        ) from error


@lru_cache(maxsize=1024)
def total_visible_blocks(problem: Problem) -> int:
    """problem.total_visible_blocks, counted once for equal problems: a call's time on the host matters here."""
    return problem.total_visible_blocks
