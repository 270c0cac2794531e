"""Matrix products of a single token (cuda/gemv.cu): bound by reading the weights once."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import cupy

from ...problem import ceil_div
from .device import kernel, num_multiprocessors
from .overlap import address, launcher_of

MOST_THREADS = 256
REGISTERS_FOR_ROWS = 112  # of a thread's 128, beyond which the compiler spills
THREADS_PER_MULTIPROCESSOR = 512  # what the kernel's launch bounds promise room for
MOST_SHARED_BYTES = 32 << 10


def gemv(weight: Any, x: Any, bias: Any, out: Any) -> None:
    """out = W x + b: weight [rows, width], x [width] and out [rows] (or with a leading 1) in one dtype, bias [rows] float32 or None."""
    _launch("gemv", weight, 1, (weight, x, bias, out))


def gemv_float32(weight: Any, x: Any, out: Any) -> None:
    """out = W x into float32: logits."""
    _launch("gemv_float32", weight, 1, (weight, x, out))


def gemv_add(weight: Any, x: Any, bias: Any, stream: Any, overlap: bool = False) -> None:
    """stream += W x + b, the stream [rows] in float32. overlap, here and below: see `overlap.py`; W, norm and b must be old."""
    _launch("gemv_add", weight, 1, (weight, x, bias, stream), overlap)


def norm_gemv(weight: Any, stream: Any, norm: Any, eps: float, bias: Any, out: Any, overlap: bool = False) -> None:
    """out = W rms_norm(stream) + b: stream [width] and norm [width] float32."""
    _launch("norm_gemv", weight, 1, (weight, stream, norm, eps, bias, out), overlap)


def norm_gemv_float32(weight: Any, stream: Any, norm: Any, eps: float, out: Any, overlap: bool = False) -> None:
    """out = W rms_norm(stream) into float32: logits."""
    _launch("norm_gemv_float32", weight, 1, (weight, stream, norm, eps, out), overlap)


def norm_gemv_swiglu(weight: Any, stream: Any, norm: Any, eps: float, bias: Any, out: Any, overlap: bool = False) -> None:
    """out = silu(gate) * up of (gate, up) = W rms_norm(stream) + b: weight [2 rows, width], gate first -> out [rows]."""
    _launch("norm_gemv_swiglu", weight, 2, (weight, stream, norm, eps, bias, out), overlap)


def threads_of(width: int, most: int = MOST_THREADS) -> int:
    """Threads that share a row: whole warps that the row's pieces of 8 fill as well as can be."""
    pieces = ceil_div(width, 8)
    each = ceil_div(pieces, most)
    return ceil_div(pieces, 32 * each) * 32


def threads_without_spills(name: str, width: int, group: int) -> int:
    """The same for a kernel of gemv.cu: twice as many where a thread could not hold its part of x and of two batches of rows."""
    threads = threads_of(width)
    pieces = ceil_div(width, 8 * threads)
    registers = 8 * pieces * (1 + outputs_at_once(width, threads, group) * group) + (8 if name.startswith("norm") else 0)
    return threads if registers <= REGISTERS_FOR_ROWS else threads_of(width, 2 * MOST_THREADS)


def _launch(name: str, weight: Any, group: int, arguments: tuple[Any, ...], overlap: bool = False) -> None:
    """group: rows of the weight that make one output."""
    outputs = len(weight) // group
    plan = _plan(name, weight.dtype.name, outputs, weight.shape[1], group, cupy.cuda.runtime.getDevice())
    launcher = launcher_of(plan.kernel, "gemv.cu", name, plan.threads, plan.shared_bytes, overlap)
    launcher(plan.grid, 1, *map(address, arguments), outputs)


class Plan(NamedTuple):
    """The compiled kernel, its thread blocks, their threads and bytes of shared memory."""

    kernel: Any
    grid: int
    threads: int
    shared_bytes: int


@lru_cache(maxsize=1024)
def _plan(name: str, dtype: str, outputs: int, width: int, group: int, device: int) -> Plan:
    """For the current device, which `device` names."""
    threads = threads_without_spills(name, width, group)
    at_once = outputs_at_once(width, threads, group)
    grid = min(ceil_div(outputs, at_once), num_multiprocessors() * max(1, THREADS_PER_MULTIPROCESSOR // threads))
    grid = max(grid, ceil_div(outputs * group * threads // 8, MOST_SHARED_BYTES))
    shared = shared_bytes(ceil_div(outputs, grid), at_once, threads, group)
    defines = {"IS_FLOAT16": int(dtype == "float16"), "IS_FLOAT32": int(dtype == "float32")}
    return Plan(kernel("gemv.cu", name, shared, **defines, WIDTH=width, THREADS=threads), grid, threads, shared)


def outputs_at_once(width: int, threads: int, group: int) -> int:
    """AT_ONCE of gemv.cu."""
    pieces = ceil_div(width, 8 * threads)
    rows = 8 if pieces <= 1 else 4 if pieces <= 2 else 2 if pieces <= 4 else 1
    return max(1, rows // group)


def shared_bytes(outputs: int, at_once: int, threads: int, group: int) -> int:
    """Shared memory of a thread block with so many outputs at most: each warp's part of every sum, and sums of squares."""
    return 4 * (threads // 32) * (ceil_div(outputs, at_once) * at_once * group + 1)
