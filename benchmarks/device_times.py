"""Time on the device, function by function, and what the card can do at best."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from unisparse_np.gpu.cupy_kernels.plan import plan_of
from unisparse_np.gpu.cupy_kernels.products import product
from unisparse_np.gpu.cupy_kernels.run import _select
from unisparse_np.problem import Problem

SCRATCH_BYTES = 1 << 29
WARM_UP_CALLS, TIMED_CALLS = 3, 23


class DeviceTimes:
    """Between two events on the device, every call of the given functions, while the `with` lasts: {kind: [(start, stop)]}."""

    def __init__(self, functions: dict[str, list[tuple[Any, str]]]) -> None:
        self.functions, self.events = functions, {kind: [] for kind in functions}
        self.real = {(owner, name): getattr(owner, name) for places in functions.values() for owner, name in places}

    def __enter__(self) -> DeviceTimes:
        for kind, places in self.functions.items():
            for owner, name in places:
                setattr(owner, name, self.watched(self.real[owner, name], self.events[kind]))
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), function in self.real.items():
            setattr(owner, name, function)

    def watched(self, function: Callable[..., Any], events: list) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            result = function(*arguments, **options)
            stop.record()
            events.append((start, stop))
            return result

        return call

    def seconds(self) -> dict[str, float]:
        cupy.cuda.Device().synchronize()
        return {kind: sum(cupy.cuda.get_elapsed_time(*pair) for pair in pairs) / 1e3 for kind, pairs in self.events.items()}


def selection_ms(q: Any, k: Any, problem: Problem) -> float:
    """Median milliseconds of steps 1-5 as a whole call runs them, the L2 cold. q [Hq, L, d], k [Hkv, L, d], 16 bits."""
    plan = plan_of(problem)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    scratch = cupy.empty(SCRATCH_BYTES, np.uint8)

    def once() -> float:
        scratch.fill(0)  # the host prepares the launches meanwhile
        start.record()
        _select(q, k, plan, None, False, None)
        stop.record()
        stop.synchronize()
        return cupy.cuda.get_elapsed_time(start, stop)

    return statistics.median([once() for _ in range(TIMED_CALLS)][WARM_UP_CALLS:])


def matrix_ceiling() -> float:
    """FLOP a second of a product of 8192 x 8192 matrices through cuBLAS in bfloat16."""
    size = 8192
    random = cupy.random.default_rng(0)
    a, b = ((random.standard_normal((size, size), dtype=np.float32).view(np.uint32) >> 16).astype(np.uint16) for _ in range(2))
    a, b = a.view(ml_dtypes.bfloat16), b.view(ml_dtypes.bfloat16)
    out = cupy.empty((size, size), a.dtype)
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    for event in (start, stop):
        event.record()
        for _ in range(10):
            product(a, b, out, add=False)
    stop.synchronize()
    return 10 * 2.0 * size**3 / (cupy.cuda.get_elapsed_time(start, stop) / 1e3)
