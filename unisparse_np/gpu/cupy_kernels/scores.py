"""Steps 2 and 3 of ALGORITHM.md on the GPU: compressed attention, summed per block as it is computed.

cuda/scores_sm90.cu on Hopper for blocks of 4 composites and more, cuda/scores.cu for everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from ...problem import Problem, ceil_div
from . import plain_stages
from .compress import coarse_sizes, coarsening
from .device import capability
from .plan import Plan, plan_of
from .program import Launch, TensorMap, launch_all
from .room import Layout, allocate, bytes_of, view
from .shapes import Rows, composite_rows, contiguous_rows, uses_tensor_cores

PORTABLE_THREADS, PORTABLE_ROWS, PORTABLE_COLUMNS, PORTABLE_WARP_ROWS = 256, 256, 64, 32  # of scores.cu
HOPPER_THREADS, HOPPER_ROWS, HOPPER_COLUMNS, HOPPER_STAGES = 640, 256, 128, 4  # of scores_sm90.cu
MERGE_THREADS = 128
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_KEYS_PER_BLOCK = (4, 8, 16, 32, 64)
HOPPER_LEAST_QUERIES_PER_BLOCK = 4
MOST_KEYS_PER_SUM = 32  # of scores_sm90.cu
FEW_BLOCKS = 128
MOST_SHARED_BYTES = 227 << 10  # of a Hopper thread block
WORKSPACE_BYTES = 1 << 30  # the most that the sums of a few keys may take; heads are done in slices that fit
UNITS = 2.0**30  # scores are whole numbers of 1 / UNITS of a query block's mass


def score_blocks(qc: Any, kc: Any, problem: Problem) -> tuple[Any, Any]:
    """Steps 2-3. qc [Hc, Tq, d], kc [Hkc, Tk, d] -> mean [Hc, Nq, Nk] float32 and peak, or None when the row threshold is off.

    With top_p_compress the mean comes from coarse composites, made here, and the peak from qc and kc.
    float16 composites go to the tensor cores where the shapes fit them; float32 ones are kept in full. Blocks that are not visible
    hold 0.
    """
    plan = plan_of(problem)
    if not uses_tensor_cores(problem, qc.dtype):
        units, peak = plain_stages.score_units(qc, kc, plan)
        return as_shares(units), peak
    units, peak = score_units(cupy.ascontiguousarray(qc), kc, plan, clear=True)
    return as_shares(units), peak


def score_units(qc: Any, kc: Any, plan: Plan, *, clear: bool = False) -> tuple[Any, Any]:
    """The same from float16 composites, with mean in units: [Hc, Nq, Nk] uint32. Without `clear`, invisible blocks hold anything."""
    layout = plan.once(scores_layout)
    memory = allocate(layout.size)
    units, peak = score_arrays(memory, layout, plan)
    if clear or plan.once(adds_to_scores):
        clear_scores(units, peak)
    launch_all(scoring(qc.data.ptr, composite_rows(kc), layout.addresses(memory.ptr), plan))
    return units, peak


def score_arrays(memory: Any, layout: Layout, plan: Plan) -> tuple[Any, Any]:
    """units [Hc, Nq, Nk] uint32 and peak float32, or None where the row threshold is off, as they lie in memory."""
    units = view(memory, layout.offsets["units"], plan.scores_shape, np.uint32)
    peak = None if plan.problem.config.row_threshold is None else view(memory, layout.offsets["peak"], plan.scores_shape, np.float32)
    return units, peak


def clear_scores(units: Any, peak: Any) -> None:
    """Zeroes: invisible blocks are never written."""
    units.fill(0)
    if peak is not None:
        peak.fill(0)


def as_shares(units: Any) -> Any:
    """Scores in units as shares of a query block's mass, float32."""
    return units.astype(np.float32) / np.float32(UNITS)


def scores_layout(plan: Plan) -> Layout:
    """Room for scores in `units` [Hc, Nq, Nk] uint32 and `peak` float32, and for what their computation needs besides."""
    return Layout(**score_sizes(plan))


def score_sizes(plan: Plan) -> dict[str, int]:
    """Bytes of units, peak, Top-P's own composites, and on Hopper of the sums of groups of keys and of the tiles' maxima."""
    scores = bytes_of(plan.scores_shape, np.uint32)
    sums, maxima = zip(*map(_tile_sizes, plan.rules), strict=True)
    return {
        "units": scores,
        "peak": 0 if plan.problem.config.row_threshold is None else scores,
        **coarse_sizes(plan),
        "sums": max(sums),
        "maxima": max(maxima),
    }


def _tile_sizes(plan: Plan) -> tuple[int, int]:
    """Bytes of what score_tiles leaves for merge_scores: sums and maxima; 0 where they do not run."""
    tiles = heads_at_once(plan) * padded_queries(plan) * tiles_of_keys(plan) if _on_hopper(plan) else 0
    return 2 * tiles * groups(plan), 4 * tiles


def scoring(qc: int, kc: Rows, room: dict[str, int], plan: Plan, with_mean: bool = True) -> Iterator[Launch]:
    """Steps 2-3 from float16 composites (qc contiguous) to the addresses in room. Invisible blocks are left as they are.

    with_mean: whether the mean is wanted too where the row threshold selects alone.
    """
    if plan.problem.config.top_p_compress is not None:
        of_top_p, of_row_threshold = plan.rules
        coarse_kc = contiguous_rows(room["coarse_kc"], of_top_p.kc_shape)
        yield coarsening(qc, kc, room["coarse_qc"], coarse_kc.address, plan)
        yield from scoring(room["coarse_qc"], coarse_kc, room, of_top_p)
        yield from scoring(qc, kc, room, of_row_threshold, with_mean=False)
    elif _on_hopper(plan):
        yield from scoring_in_one_pass(qc, kc, room, plan, with_mean=with_mean)
    else:
        yield _scoring_in_two_passes(qc, kc, room, plan, with_mean)


def selects_at_once(plan: Plan) -> bool:
    """Whether the merger of scores goes on to steps 4-5. One warp of it selects for a query block: that pays for few or small blocks."""
    small = plan.problem.num_k_blocks <= FEW_BLOCKS or plan.queries_per_block <= HOPPER_LEAST_QUERIES_PER_BLOCK
    return small and plan.problem.config.top_p_compress is None and _on_hopper(plan)


def adds_to_scores(plan: Plan) -> bool:
    """Whether the kernels add to the scores, which must hold 0 before."""
    return any(rule.queries_per_block > PORTABLE_WARP_ROWS and not _on_hopper(rule) for rule in plan.rules)


def _on_hopper(plan: Plan) -> bool:
    fits = plan.queries_per_block >= HOPPER_LEAST_QUERIES_PER_BLOCK and plan.keys_per_block in HOPPER_KEYS_PER_BLOCK
    fits = fits and merge_shared_bytes(plan) <= MOST_SHARED_BYTES
    return fits and plan.problem.head_dim in HOPPER_HEAD_DIMS and capability() == (9, 0)


def _scoring_in_two_passes(qc: int, kc: Rows, room: dict[str, int], plan: Plan, with_mean: bool) -> Launch:
    problem = plan.problem
    units, peak = room["units"] if with_mean else 0, 0 if problem.config.row_threshold is None else room["peak"]
    launcher = plan.launcher("scores.cu", "score_blocks", PORTABLE_THREADS, shared_bytes(problem.head_dim))
    columns = ceil_div(problem.num_q_composites, PORTABLE_ROWS)
    arguments = (qc, kc.address, kc.head_stride, plan.packed_shape(), units, peak)
    return Launch(launcher, columns, problem.num_composite_heads, arguments)


def scoring_in_one_pass(
    qc: int, kc: Rows, room: dict[str, int], plan: Plan, select: tuple[int, int, int, int] = (0, 0, 0, 0), keep_scores: bool = True,
    with_mean: bool = True,
) -> Iterator[Launch]:  # fmt: skip
    """Tiles first, then their merger, a slice of heads at a time.

    select: addresses of the shares top_p and row_threshold and of the mask's words and counts, to go on to steps 4-5.
    """
    with_peak = plan.problem.config.row_threshold is not None
    units, peak = room["units"] if keep_scores and with_mean else 0, room["peak"] if keep_scores and with_peak else 0
    score = plan.launcher("scores_sm90.cu", "score_tiles", HOPPER_THREADS, shared_bytes_sm90(plan.problem.head_dim))
    merge = plan.launcher("scores_sm90.cu", "merge_scores", MERGE_THREADS, merge_shared_bytes(plan, with_mean))
    (heads, q_length, dim), (k_heads, k_length, _), shape = plan.qc_shape, plan.kc_shape, plan.packed_shape()
    queries = TensorMap(qc, heads, q_length, dim, q_length * dim, dim, True, HOPPER_ROWS, dim)
    keys = TensorMap(kc.address, k_heads, k_length, dim, kc.head_stride, kc.row_stride, True, HOPPER_COLUMNS, dim)
    slice_heads = plan.once(heads_at_once)
    wanted = int(with_mean), int(with_peak)
    for first in range(0, heads, slice_heads):
        count = min(slice_heads, heads - first)
        yield Launch(score, count, ceil_div(q_length, HOPPER_ROWS), (queries, keys, shape, first, room["sums"], room["maxima"]))
        merged = ceil_div(q_length, max(16, plan.queries_per_block))
        yield Launch(merge, merged, count, (room["sums"], room["maxima"], shape, first, *wanted, units, peak, *select))


def padded_queries(plan: Plan) -> int:
    """Composite queries in whole sixteens, as score_tiles writes their sums."""
    return ceil_div(plan.problem.num_q_composites, 16) * 16


def tiles_of_keys(plan: Plan) -> int:
    """Tiles of composite keys that score_tiles takes."""
    return ceil_div(plan.problem.num_k_composites, HOPPER_COLUMNS)


def groups(plan: Plan) -> int:
    """GROUPS of scores_sm90.cu: sums that a composite query and tile store."""
    return HOPPER_COLUMNS // min(MOST_KEYS_PER_SUM, plan.keys_per_block)


def heads_at_once(plan: Plan) -> int:
    """Composite heads whose sums fit WORKSPACE_BYTES."""
    bytes_per_head = padded_queries(plan) * tiles_of_keys(plan) * (2 * groups(plan) + 4)
    return min(plan.problem.num_composite_heads, max(1, WORKSPACE_BYTES // bytes_per_head))


def shared_bytes(head_dim: int) -> int:
    """Shared memory of a thread block: SHARED_BYTES of scores.cu."""
    return max(PORTABLE_ROWS, 2 * PORTABLE_COLUMNS) * 2 * (head_dim + 8)


def shared_bytes_sm90(head_dim: int) -> int:
    """Shared memory of a thread block of score_tiles: SHARED_BYTES of scores_sm90.cu."""
    return (HOPPER_ROWS + HOPPER_STAGES * HOPPER_COLUMNS) * head_dim * 2 + 128 + 1024


def merge_shared_bytes(plan: Plan, with_mean: bool = True) -> int:
    """Shared memory of a thread block of merge_scores: its map."""
    q_blocks = max(1, 16 // plan.queries_per_block)
    blocks = ceil_div(tiles_of_keys(plan) * (HOPPER_COLUMNS // plan.keys_per_block), 4) * 4
    arrays = int(with_mean) + int(plan.problem.config.row_threshold is not None)
    return 4 * (16 + 2 * 4 * 16 + arrays * q_blocks * blocks)
