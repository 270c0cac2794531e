"""Step 6 of ALGORITHM.md on the GPU: attend_sm90.cu on Hopper, attend_sm80.cu elsewhere; dense attention is the same kernel."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ...problem import KeySummary, Problem, ceil_div
from . import plain_stages
from .compress import find_anchors
from .decode_attention import attend_few, splits_keys
from .device import capability, num_multiprocessors
from .plan import Plan, plan_of
from .program import Launch, TensorMap, base
from .room import FLOAT32, Layout, Room, address_of, allocate, array_of, new
from .select import BlockMask, from_bool
from .shapes import Rows, aligned, anchor_pitch, check_dtype, is_float16, positions, rows_of, uses_tensor_cores

L2_SECTION_BYTES = 32 << 20  # keys and values worked on at a time: they stay in the L2 of an A100, H100 or H200
HOPPER_HEAD_DIMS = (64, 96, 128, 256)
SMALLEST_TILE, LARGEST_TILE = 64, 128  # query rows of one item
REPAIR_BLOCKS, REPAIR_THREADS = 64, 128
PREPARE_THREADS, PREPARE_BYTES = 1024, 4096  # of prepare.cu


class Attended(NamedTuple):
    """out [Hq, Lq, d] in the dtype of q, lse [Hq, Lq] float32 (natural log; an array or a Room), and the name of the kernel that ran."""

    out: Any
    lse: Any
    kernel: str


def sparse_attention(q: Any, k: Any, v: Any, mask: Any, problem: Problem, key_summary: KeySummary | None = None) -> tuple[Any, Any]:
    """Step 6. q [Hq, Lq, d], k, v [Hkv, Lk, d], mask [Hq, Nq, Nk] bool -> out [Hq, Lq, d] in the dtype of q, lse [Hq, Lq] float32.

    A query with nothing to attend has out 0 and lse -inf. With key_summary its anchors are taken as they are.
    """
    check_dtype(q.dtype)
    anchors = None
    if problem.config.key_anchors:
        anchors = find_anchors(k, problem.config.block_size, problem.config.key_anchors) if key_summary is None else key_summary.anchors
    result = attend(q, k, v, from_bool(mask), anchors, plan_of(problem))
    return result.out, array_of(result.lse)


def dense_attention(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Any]:
    """The same attention with every visible key: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d], lse [Hq, Lq]."""
    check_dtype(q.dtype)
    result = attend(q, k, v, None, None, plan_of(problem))
    return result.out, array_of(result.lse)


def attend(q: Any, k: Any, v: Any, mask: BlockMask | None, anchors: Any, plan: Plan) -> Attended:
    """Step 6 with the mask as words (None: dense) and the anchors as positions [Hkv, Nk, r] (an array, a Room, or None: no anchors)."""
    if not uses_tensor_cores(plan.problem, q.dtype):
        words, heads_per_row = (None, 1) if mask is None else (mask.words, mask.heads_per_row)
        return Attended(*plain_stages.attend(q, k, v, words, heads_per_row, array_of(anchors), plan))
    if splits_keys(plan.problem, q.dtype):
        return Attended(*attend_few(aligned(q), aligned(k), aligned(v), mask, array_of(anchors), plan))
    return _attend_in_tiles(rows_of(q), rows_of(k), rows_of(v), mask, anchors, plan)


def _attend_in_tiles(q: Rows, k: Rows, v: Rows, mask: BlockMask | None, anchors: Any, plan: Plan) -> Attended:
    problem, of_float16 = plan.problem, is_float16(q.array.dtype)
    on_hopper = runs_on_hopper(problem)
    words = counts = anchors_at = 0
    heads_per_mask = 1
    if mask is not None:
        words, counts, heads_per_mask = mask.words_at, mask.counts_at, mask.heads_per_row
        if anchors is not None and not isinstance(anchors, Room):
            anchors = positions(anchors)
        anchors_at = address_of(anchors)
    out, lse = new(plan.out_shape, q.array.dtype), Room(plan.out_shape[:2], FLOAT32)
    memory = allocate(plan.once(work_layout).size)
    key = (attending, q[2:], k[2:], v[2:], heads_per_mask, words != 0, anchors_at != 0, of_float16, on_hopper)
    program = plan.programs.get(key)
    if program is None:
        some_q, some_k, some_v = (Rows(None, base(n), x.head_stride, x.row_stride) for n, x in enumerate((q, k, v)))
        launches = attending(
            some_q, some_k, some_v, base(3), base(4), base(5), base(6) if words else 0, base(7) if counts else 0,
            base(8) if anchors_at else 0, heads_per_mask, plan, of_float16, on_hopper,
        )  # fmt: skip
        program = plan.record(key, launches)
    program.run(q.address, k.address, v.address, out.data.ptr, lse.address, memory.ptr, words, counts, anchors_at)
    return Attended(out, lse, kernel_name(problem.head_dim, problem.config.block_size, on_hopper, of_float16))


def runs_on_hopper(problem: Problem) -> bool:
    """Whether attend_sm90.cu runs; it has no room for two lists of head_dim 256."""
    fits = problem.head_dim < 256 or problem.config.block_size > 64
    return fits and problem.head_dim in HOPPER_HEAD_DIMS and capability() == (9, 0)


@lru_cache(maxsize=256)
def kernel_name(head_dim: int, block_size: int, on_hopper: bool, of_float16: bool) -> str:
    """What Trace.kernel says."""
    return f"attend_{'sm90' if on_hopper else 'sm80'} d{head_dim} S{block_size} {'float16' if of_float16 else 'bfloat16'}"


class Keys(NamedTuple):
    """What the queries attend to: k, v [Hkv, Lk, d]; addresses of the mask's words and counts (0: dense) and of the anchors (or 0)."""

    k: Rows
    v: Rows
    words: int
    counts: int
    anchors: int


def tile_rows(problem: Problem, on_hopper: bool) -> int:
    """Query rows of one item of the attention kernels: BM there."""
    return SMALLEST_TILE if problem.config.block_size == 64 or (on_hopper and problem.head_dim == 64) else LARGEST_TILE


def num_items(problem: Problem, rows: int) -> int:
    """Items of so many query rows, of all heads."""
    return problem.num_q_heads * ceil_div(problem.q_len, rows)


def work_layout(plan: Plan) -> Layout:
    """Memory of one call: work {head, tile} x items, the kernel's item counter, what repair.cu has to look at, the compact anchors."""
    anchors = plan.problem.num_kv_heads * anchor_rows(plan) * plan.problem.head_dim * 2
    work = 8 * num_items(plan.problem, SMALLEST_TILE)
    broken = 8 + 8 * (LARGEST_TILE // 16) * num_items(plan.problem, LARGEST_TILE)  # rows past the end count, too
    return Layout(work=work, counter=4, broken=broken, anchor_keys=anchors, anchor_values=anchors)


def attending(
    q: Rows, k: Rows, v: Rows, out: int, lse: int, room: int, words: int, counts: int, anchors: int, heads_per_mask: int, plan: Plan,
    of_float16: bool, on_hopper: bool,
) -> Iterator[Launch]:  # fmt: skip
    """Step 6: order the items, gather the anchors, attend, and look after rows that are not finite. room: an address for work_layout."""
    keys, work = Keys(k, v, words, counts, anchors), plan.once(work_layout).addresses(room)
    shape = plan.packed_shape(heads_per_mask, anchors != 0)
    yield _preparing(keys, shape, work, plan, tile_rows(plan.problem, on_hopper))
    yield (_attending_sm90 if on_hopper else _attending_sm80)(q, keys, out, lse, shape, work, plan, of_float16)
    yield _repairing(q, keys, out, shape, work, plan, of_float16)


def heads_per_section(plan: Plan) -> int:
    """Query heads whose keys and values fit the L2 together: items are ordered longest first within them."""
    problem = plan.problem
    bytes_per_head = 4 * problem.k_len * problem.head_dim
    kv_heads = 1 << max(0, (L2_SECTION_BYTES // bytes_per_head).bit_length() - 1)
    return min(kv_heads, problem.num_kv_heads) * problem.group_size


def anchor_rows(plan: Plan) -> int:
    """Rows of the compact anchors of one KV head: r * pitch."""
    return plan.problem.config.key_anchors * anchor_pitch(plan.problem)


def _preparing(keys: Keys, shape: bytes, room: dict[str, int], plan: Plan, rows: int) -> Launch:
    heads = plan.once(heads_per_section)
    launcher = plan.launcher("prepare.cu", "prepare", PREPARE_THREADS, PREPARE_BYTES)
    sections = ceil_div(plan.problem.num_q_heads, heads)
    pieces = plan.problem.num_kv_heads * anchor_rows(plan) * plan.problem.head_dim // 8 if keys.anchors else 0
    order = (shape, sections, keys.counts, room["work"], rows, heads, room["counter"], room["broken"])
    strides = (keys.k.head_stride, keys.k.row_stride, keys.v.head_stride, keys.v.row_stride)
    anchors = (keys.k.address, keys.v.address, *strides, keys.anchors, room["anchor_keys"], room["anchor_values"])
    return Launch(launcher, sections + ceil_div(pieces, PREPARE_THREADS), 1, (*order, *anchors))


def _attending_sm90(q: Rows, keys: Keys, out: int, lse: int, shape: bytes, room: dict[str, int], plan: Plan, of_float16: bool) -> Launch:
    problem, layout = plan.problem, plan.once(layout_sm90)
    dim, kv_heads = problem.head_dim, problem.num_kv_heads
    launcher = plan.launcher("attend_sm90.cu", "attend_sm90", layout.threads, layout.shared_bytes, of_float16)
    queries = TensorMap(q.address, problem.num_q_heads, problem.q_len, dim, q.head_stride, q.row_stride, of_float16, 64, 64)
    k, v = (TensorMap(x.address, kv_heads, problem.k_len, dim, x.head_stride, x.row_stride, of_float16, 64, 64) for x in (keys.k, keys.v))
    anchor_k, anchor_v = k, v
    if keys.anchors:
        length = plan.once(anchor_rows)
        anchor_k, anchor_v = (
            TensorMap(address, kv_heads, length, dim, length * dim, dim, of_float16, 64, 64)
            for address in (room["anchor_keys"], room["anchor_values"])
        )
    items = num_items(problem, tile_rows(problem, True))
    grid = min(ceil_div(items, layout.teams), num_multiprocessors())
    after = (shape, room["work"], items, keys.words, keys.anchors, lse, room["counter"], room["broken"])
    return Launch(launcher, grid, 1, (queries, k, v, anchor_k, anchor_v, out, *after))


def _attending_sm80(q: Rows, keys: Keys, out: int, lse: int, shape: bytes, room: dict[str, int], plan: Plan, of_float16: bool) -> Launch:
    launcher = plan.launcher("attend_sm80.cu", "attend_sm80", plan.once(threads_sm80), plan.once(shared_bytes_sm80), of_float16)
    inputs = (q.address, keys.k.address, keys.v.address, out, room["anchor_keys"], room["anchor_values"])
    arguments = (*inputs, *_strides(q, keys), shape, room["work"], keys.words, keys.anchors, lse, room["broken"])
    return Launch(launcher, num_items(plan.problem, tile_rows(plan.problem, False)), 1, arguments)


def _repairing(q: Rows, keys: Keys, out: int, shape: bytes, room: dict[str, int], plan: Plan, of_float16: bool) -> Launch:
    launcher = plan.launcher("repair.cu", "repair", REPAIR_THREADS, 0, of_float16)
    inputs = (q.address, keys.k.address, keys.v.address, out)
    arguments = (*inputs, *_strides(q, keys), shape, keys.words, keys.anchors, room["broken"])
    return Launch(launcher, REPAIR_BLOCKS, 1, arguments)


def _strides(q: Rows, keys: Keys) -> tuple[int, ...]:
    return (q.head_stride, q.row_stride, keys.k.head_stride, keys.k.row_stride, keys.v.head_stride, keys.v.row_stride)


class LayoutSm90(NamedTuple):
    """How attend_sm90.cu fills a multiprocessor: TEAMS, THREADS and SHARED_BYTES there."""

    teams: int
    threads: int
    shared_bytes: int


def layout_sm90(plan: Plan) -> LayoutSm90:
    """One team of two consumers; for tiles of 64 rows several teams of one, each with items of its own."""
    dim, small = plan.problem.head_dim, tile_rows(plan.problem, True) == SMALLEST_TILE
    consumers, teams = (1, 3 if dim == 64 else 2) if small else (2, 1)
    keys_per_tile = 64 if dim == 256 else 192 if not small else 128 if dim == 64 else 64
    rows, columns = consumers * 64 + 4 * keys_per_tile, 64 * ceil_div(dim, 64)  # of Q and of two stages of K and V
    records = 2 * 48 + 160
    return LayoutSm90(teams, 128 * (consumers * teams + 1), teams * (rows * columns * 2 + 128 + 16 * consumers + records) + 1024)


def shared_bytes_sm80(plan: Plan) -> int:
    """Shared memory of a thread block of attend_sm80.cu: tiles of Q, K and V, 64 bytes, and the list of what an item visits."""
    num_k_blocks, k_rows = plan.problem.num_k_blocks, 64
    entries = num_k_blocks + ceil_div(num_k_blocks, k_rows)
    return (tile_rows(plan.problem, False) + 2 * k_rows) * (plan.problem.head_dim + 8) * 2 + 64 + 16 * ceil_div(2 * entries, 16)


def threads_sm80(plan: Plan) -> int:
    """THREADS of attend_sm80.cu."""
    return 256 if plan.problem.head_dim > 128 and tile_rows(plan.problem, False) == LARGEST_TILE else 128
