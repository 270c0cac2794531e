"""The GPU's memory and the host's lead over it: what is free, what attention takes, when to wait."""

from __future__ import annotations

import gc
from collections.abc import Callable

import cupy
import numpy as np

from ...config import UniSparseConfig
from ...problem import Problem, ceil_div
from .device import kernel, num_multiprocessors
from .scores import MOST_KEYS_PER_SUM, WORKSPACE_BYTES
from .shapes import composite_dtype

FINITE_THREADS = 512  # of finite.cu
LAYERS_AHEAD = 2  # that the host may have launched beyond the one being computed: the GPU never idles, and Ctrl-C is heard


def free_bytes() -> int:
    """What can still be allocated: the device's free memory and what CuPy's pool holds unused, within the pool's limit."""
    pool = cupy.get_default_memory_pool()
    free = cupy.cuda.runtime.memGetInfo()[0] + pool.free_bytes()
    limit = pool.get_limit()
    return min(free, max(0, limit - pool.used_bytes())) if limit else free


def peak_bytes() -> int:
    """The most that this process has held in CuPy's pool since it last gave memory back."""
    return cupy.get_default_memory_pool().total_bytes()


def release() -> None:
    """Give everything unused back to the device."""
    gc.collect()  # cycles hold arrays too
    cupy.get_default_memory_pool().free_all_blocks()


def from_host(target: cupy.ndarray, values: np.ndarray) -> None:
    """Copy values [n, ...] into a contiguous array or run of rows of the same shape and dtype, without another array on the device."""
    target.set(np.ascontiguousarray(values))


def holds_not_finite(x: cupy.ndarray) -> cupy.ndarray:
    """Whether NaN or infinity is in contiguous x, float16, bfloat16 or float32 -> [1] int32, not 0 if so. Waits for nothing."""
    found = cupy.zeros(1, np.int32)
    find = kernel("finite.cu", "find_not_finite", 0, IS_FLOAT16=int(x.dtype == np.float16), IS_FLOAT32=int(x.dtype == np.float32))
    find((min(ceil_div(x.size, FINITE_THREADS), 4 * num_multiprocessors()),), (FINITE_THREADS,), (x, np.int64(x.size), found))
    return found


def attention_bytes(problem: Problem, itemsize: int, sparse: bool) -> int:
    """At most what one attention call allocates: output, items, anchors side by side; where it is sparse composites, scores, masks.

    Composites of the keys are those of a key summary (`summary_bytes`). itemsize: bytes of a number of q, k, v.
    """
    per_query = problem.num_q_heads * (problem.head_dim * itemsize + 4)  # output, log-sum-exp
    work_items = problem.num_q_heads * (8 * ceil_div(problem.q_len, 64) + 64 * ceil_div(problem.q_len, 128))  # of attend.work_layout
    config: UniSparseConfig = problem.config
    anchors = 2 * problem.num_kv_heads * (problem.num_k_blocks + 128) * config.key_anchors * problem.head_dim * itemsize
    bytes_needed = per_query * problem.q_len + work_items + anchors
    if not sparse:
        return bytes_needed
    composites = _composite_bytes(problem, queries_alone=True)
    rules = [problem]
    if config.top_p_compress is not None:
        rules = [problem.of_top_p(), problem.of_row_threshold()]
        composites += _composite_bytes(rules[0], queries_alone=False)
    blocks = problem.num_composite_heads * problem.num_q_blocks * (problem.num_k_blocks + 32)
    scores = blocks * (5 if config.row_threshold is None else 9)  # mean, mask bits, peak
    sums = max(map(_sum_bytes, rules))
    return bytes_needed + composites + scores + sums


def _composite_bytes(problem: Problem, queries_alone: bool) -> int:
    """Composites as float32 at most."""
    keys = 0 if queries_alone else problem.num_composite_kv_heads * problem.num_k_composites
    return 4 * problem.head_dim * (problem.num_composite_heads * problem.num_q_composites + keys)


def _sum_bytes(problem: Problem) -> int:
    """What scores_sm90.cu keeps of the scores until they are merged: sums of a few keys and maxima, of a slice of heads."""
    config = problem.config
    per_tile = 4 + 2 * 128 // min(
        MOST_KEYS_PER_SUM, max(4, config.block_size // config.k_compress)
    )  # a composite query and 128 composite keys
    per_head = (problem.num_q_composites + 16) * ceil_div(problem.num_k_composites, 128) * per_tile
    return per_head * min(problem.num_composite_heads, max(1, WORKSPACE_BYTES // per_head))


def summary_bytes(problem: Problem, itemsize: int) -> int:
    """What a RunningKeySummary of k_len keys holds: composites and anchors."""
    held = np.dtype(composite_dtype(problem, np.dtype(np.float16 if itemsize == 2 else np.float32)))
    composites = problem.num_composite_kv_heads * problem.num_k_composites * problem.head_dim * held.itemsize
    return composites + problem.num_kv_heads * problem.num_k_blocks * problem.config.key_anchors * 4


def new_pacer() -> Callable[[], None]:
    """A function to call after each layer. It waits until all but the last LAYERS_AHEAD layers are computed.

    Launches return at once, so a host would otherwise be minutes ahead of a long prompt, and deaf to Ctrl-C until the
    device has caught up.
    """
    events = [cupy.cuda.Event(disable_timing=True) for _ in range(LAYERS_AHEAD + 1)]
    turn = 0

    def keep_pace() -> None:
        nonlocal turn
        events[turn].record()
        turn = (turn + 1) % len(events)
        events[turn].synchronize()  # the oldest; at once if it was never recorded

    return keep_pace
