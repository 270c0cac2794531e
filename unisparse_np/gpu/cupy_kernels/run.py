"""The whole call on the GPU: the four stages one after another on the current stream, without a look back at the host.

A call allocates a few times: the mask, room for composites and scores (given back before the attention), and what attend.py asks
for. Its launches are recorded at the first call of their kind (program.py). Nothing that is written is shared between calls, so any
number of them may be under way on any number of streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import cupy
import numpy as np

from ...errors import BackendUnavailable
from ...problem import KeySummary, Problem
from ...trace import Trace
from . import plain_stages
from .attend import attend
from .compress import composite_sizes, pooling, to_half
from .memory import attention_bytes, free_bytes, summary_bytes
from .plan import Plan, plan_of
from .program import Launch, base
from .room import INT32, Layout, Room, address_of, allocate, array_of, view
from .scores import adds_to_scores, as_shares, clear_scores, score_arrays, score_sizes, scoring, scoring_in_one_pass, selects_at_once
from .select import BlockMask, empty_mask, select_words, selecting, shares, to_bool
from .shapes import NO_ROWS, Rows, check_dtype, composite_rows, contiguous_rows, is_float16, positions, rows_of, uses_tensor_cores


class DeviceTrace(Trace):
    """A Trace whose mask and counts stay on the GPU until they are read: only reading them waits for the device.

    lse and anchors are given as arrays or as Rooms for them.
    """

    def __init__(self, kernel: str, lse: Any, block_mask: BlockMask, anchors: Any, plan: Plan) -> None:
        self.kernel, self._lse, self._anchors = kernel, lse, anchors
        self.visible_blocks = plan.visible_blocks
        self.qc = self.kc = self.mean = self.peak = None
        self.block_mask, self._problem = block_mask, plan.problem

    @property
    def lse(self) -> Any:
        """[Hq, Lq] float32."""
        return array_of(self._lse)

    @property
    def anchors(self) -> Any:
        """[Hkv, Nk, r] int32, or None."""
        return array_of(self._anchors)

    @property
    def mask(self) -> Any:
        """[Hq, Nq, Nk] bool."""
        return to_bool(self.block_mask, self._problem)

    @property
    def kept_blocks(self) -> float:  # type: ignore[override]
        """Selected blocks, plus r / S for each visible block that was not."""
        return self.kept_later()()

    def kept_later(self) -> Callable[[], float]:
        """A function that gives kept_blocks and waits for the device when it is called; it holds the counts [rows] alone."""
        counts, heads_per_row = self.block_mask.counts_room, self.block_mask.heads_per_row
        config, visible = self._problem.config, self.visible_blocks
        return lambda: config.kept_blocks(int(cupy.asnumpy(array_of(counts)).sum(dtype=np.int64)) * heads_per_row, visible)


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
    at 65504; float32 for the plain kernels), as step 1 gives them; None to pool q here.
    """
    check_dtype(q.dtype)
    plan = plan_of(problem)
    select = _select if uses_tensor_cores(problem, q.dtype) else _select_plain
    try:
        mask, anchors, scores = select(q, k, plan, key_summary, keep_scores, q_composites)
        result = attend(q, k, v, mask, anchors, plan)
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise no_room_for(problem, q.itemsize, error) from error
    trace = DeviceTrace(result.kernel, result.lse, mask, anchors, plan)
    trace.qc, trace.kc, trace.mean, trace.peak = scores
    return result.out, trace


def run_dense(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Trace]:
    """Dense attention: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] in their dtype, and its Trace."""
    check_dtype(q.dtype)
    plan = plan_of(problem)
    try:
        result = attend(q, k, v, None, None, plan)
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise no_room_for(problem, q.itemsize, error) from error
    visible = plan.visible_blocks
    return result.out, Trace(f"{result.kernel} dense", visible, visible, array_of(result.lse))


def _select(
    q: Any, k: Any, plan: Plan, key_summary: KeySummary | None, keep_scores: bool, q_composites: Any
) -> tuple[BlockMask, Any, tuple[Any, Any, Any, Any]]:
    """Steps 1-5 -> the mask, the anchors' positions (an array, a Room or None), and (qc, kc, mean, peak), None unless keep_scores."""
    of_float16, layout = is_float16(q.dtype), plan.once(selection_layout)
    queries = NO_ROWS if q_composites is not None else rows_of(q)
    anchors: Any = None
    if key_summary is None:
        keys, kc = rows_of(k), NO_ROWS
        if plan.problem.config.key_anchors:
            anchors = Room(plan.anchors_shape, INT32)
    else:
        keys, kc = NO_ROWS, composite_rows(to_half(key_summary.kc, plan))
        if plan.problem.config.key_anchors:
            anchors = positions(key_summary.anchors)
    mask = empty_mask(plan)
    memory = allocate(layout.size if key_summary is None else layout.offsets["kc"])
    if keep_scores or plan.once(adds_to_scores):
        clear_scores(*score_arrays(memory, layout, plan))
    key = (selection, queries[2:], keys[2:], kc[2:], anchors is None, of_float16, keep_scores)
    program = plan.programs.get(key)
    if program is None:
        some_q, some_k, some_kc = (
            Rows(None, base(n), x.head_stride, x.row_stride) if x.address else NO_ROWS for n, x in enumerate((queries, keys, kc))
        )
        anchors_at = 0 if anchors is None else base(7)
        launches = selection(some_q, some_k, some_kc, base(3), base(4), base(5), base(6), anchors_at, plan, of_float16, keep_scores)
        program = plan.record(key, launches)
    program.run(
        queries.address, keys.address, kc.address, address_of(q_composites), memory.ptr, mask.words_at, mask.counts_at, address_of(anchors),
    )  # fmt: skip
    if not keep_scores:
        return mask, anchors, (None, None, None, None)
    units, peak = score_arrays(memory, layout, plan)
    found_qc = view(memory, layout.offsets["qc"], plan.qc_shape, np.float16) if q_composites is None else q_composites
    found_kc = view(memory, layout.offsets["kc"], plan.kc_shape, np.float16) if key_summary is None else kc.array
    return mask, anchors, (found_qc.astype(np.float32), found_kc.astype(np.float32), as_shares(units), peak)


def selection(
    q: Rows, k: Rows, kc: Rows, qc: int, room: int, words: int, counts: int, anchors: int, plan: Plan, of_float16: bool, keep_scores: bool
) -> Iterator[Launch]:
    """Steps 1-5. q, or NO_ROWS with its composites at qc; k, or NO_ROWS with its composites kc. room: an address for selection_layout."""
    pieces = plan.once(selection_layout).addresses(room)
    if q.address:
        qc = pieces["qc"]
    if k.address:
        kc = contiguous_rows(pieces["kc"], plan.kc_shape)
    yield from pooling(q, k, qc, kc.address, anchors, plan, of_float16)
    with_mean = keep_scores or plan.problem.config.top_p is not None
    if plan.once(selects_at_once):
        yield from scoring_in_one_pass(qc, kc, pieces, plan, (*shares(plan), words, counts), keep_scores, with_mean)
    else:
        yield from scoring(qc, kc, pieces, plan, with_mean)
        yield selecting(pieces["units"], pieces["peak"], words, counts, plan)


def _select_plain(
    q: Any, k: Any, plan: Plan, key_summary: KeySummary | None, keep_scores: bool, q_composites: Any
) -> tuple[BlockMask, Any, tuple[Any, Any, Any, Any]]:
    """The same with float32 composites and the plain kernels."""
    own = key_summary is None
    qc, kc, anchors = plain_stages.pool(None if q_composites is not None else q, k, plan.problem, with_keys=own, with_anchors=own)
    if q_composites is not None:
        qc = q_composites
    if key_summary is not None:
        kc, anchors = key_summary.kc, key_summary.anchors if plan.problem.config.key_anchors else None
    units, peak = plain_stages.score_units(qc, kc, plan)
    mask = select_words(units, peak, plan)
    return mask, anchors, (qc, kc, as_shares(units), peak) if keep_scores else (None, None, None, None)


def selection_layout(plan: Plan) -> Layout:
    """Memory of steps 1-4: composites in float16, and scores. Composite keys come last: a key summary brings its own."""
    sizes = composite_sizes(plan)
    return Layout(qc=sizes["qc"], **score_sizes(plan), kc=sizes["kc"])


def no_room_for(problem: Problem, itemsize: int, error: Exception) -> BackendUnavailable:
    """What to say to an allocation that does not fit: the bytes asked for, and a chunk of queries that fits. itemsize: of q, k, v."""
    free, size, chunk = free_bytes() - summary_bytes(problem, itemsize), problem.config.block_size, problem.q_len
    while chunk > size and (chunk == problem.q_len or attention_bytes(replace(problem, q_len=chunk), itemsize, sparse=True) > free):
        chunk = max(size, chunk // 2 // size * size)
    return BackendUnavailable(
        f"the GPU has no room for {problem.q_len} queries at once ({error}): pass them in chunks of {chunk} tokens "
        "(--chunk-size on the command line), or free memory that other programs hold"
    )
