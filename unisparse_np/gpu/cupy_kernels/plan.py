"""What one problem's calls have in common, worked out once: the kernels' struct, compiled kernels, how memory is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import cupy
import numpy as np

from ...problem import Problem
from .device import kernel, source
from .launch import Launcher
from .program import Launch, Program
from .shapes import check_shape, shape_of, words_per_row

Result = TypeVar("Result")
MOST_RECENT = 256
_recent: dict[tuple[int, int], tuple[Problem, Plan]] = {}  # by the problem's identity, which is found faster than its hash


class Plan:
    """A problem with everything derived from it that a launch needs, so that a call costs little host time."""

    def __init__(self, problem: Problem) -> None:
        check_shape(problem)
        config = problem.config
        self.problem = problem
        self.queries_per_block = config.block_size // config.q_compress
        self.keys_per_block = config.block_size // config.k_compress
        self.qc_shape = (problem.num_composite_heads, problem.num_q_composites, problem.head_dim)
        self.kc_shape = (problem.num_composite_kv_heads, problem.num_k_composites, problem.head_dim)
        self.anchors_shape = (problem.num_kv_heads, problem.num_k_blocks, config.key_anchors)
        self.scores_shape = (problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks)
        self.words_shape = (problem.num_composite_heads, problem.num_q_blocks, words_per_row(problem))  # of the block mask
        self.out_shape = (problem.num_q_heads, problem.q_len, problem.head_dim)
        self.programs: dict[tuple[Any, ...], Program] = {}
        self._results: dict[Callable[[Plan], Any], Any] = {}
        self._shapes: dict[tuple[int, int], np.ndarray] = {}
        self._packed: dict[tuple[int, bool], bytes] = {}
        self._launchers: dict[tuple[str, bool, int], Launcher] = {}

    def once(self, function: Callable[[Plan], Result]) -> Result:
        """function(plan), worked out at the first call only."""
        if function not in self._results:
            self._results.setdefault(function, function(self))  # of two threads the first one's stays: programs hold its addresses
        return self._results[function]

    def record(self, key: tuple[Any, ...], launches: Iterable[Launch]) -> Program:
        """The launches as a Program, to be found again in `programs`. key says all that they depend on besides this plan."""
        self.programs[key] = Program(launches)
        return self.programs[key]

    def shape(self, heads_per_mask: int = 1, with_anchors: bool = True) -> np.ndarray:
        """The struct of cuda/shape.cuh."""
        key = (heads_per_mask, self.problem.config.key_anchors if with_anchors else 0)
        if key not in self._shapes:
            self._shapes[key] = shape_of(self.problem, *key)
        return self._shapes[key]

    def packed_shape(self, heads_per_mask: int = 1, with_anchors: bool = True) -> bytes:
        """The same as a Launcher takes it."""
        key = (heads_per_mask, with_anchors)
        if key not in self._packed:
            self._packed[key] = self.shape(*key).tobytes()
        return self._packed[key]

    def launcher(self, file: str, name: str, threads: int, shared_bytes: int = 0, is_float16: bool = True) -> Launcher:
        """A compiled kernel, to be launched with little host time; bfloat16 unless is_float16."""
        key = (name, is_float16, shared_bytes)
        if key not in self._launchers:
            compiled = self._compiled(file, name, shared_bytes, is_float16)
            self._launchers[key] = Launcher(compiled, source(file), name, threads, shared_bytes)
        return self._launchers[key]

    def _compiled(self, file: str, name: str, shared_bytes: int, is_float16: bool) -> Any:
        return kernel(
            file, name, shared_bytes, IS_FLOAT16=int(is_float16), HEAD_DIM=self.problem.head_dim, BLOCK_SIZE=self.problem.config.block_size,
            QUERIES_PER_BLOCK=self.queries_per_block, KEYS_PER_BLOCK=self.keys_per_block,
        )  # fmt: skip

    @cached_property
    def rules(self) -> tuple[Plan, ...]:
        """The plans of steps 2-3: this one, or those of Top-P and of the row threshold where each reads composites of its own."""
        if self.problem.config.top_p_compress is None:
            return (self,)
        return Plan(self.problem.of_top_p()), Plan(self.problem.of_row_threshold())

    @cached_property
    def visible_blocks(self) -> int:
        """Visible blocks, summed over query heads and query blocks."""
        return self.problem.total_visible_blocks


def plan_of(problem: Problem) -> Plan:
    """The plan of a problem on the current device, made once. Raises InvalidInput for shapes the kernels do not take."""
    key = (id(problem), cupy.cuda.runtime.getDevice())
    found = _recent.get(key)
    if found is not None and found[0] is problem:
        return found[1]
    if len(_recent) >= MOST_RECENT:
        _recent.clear()
    plan = _plan(problem, key[1])
    _recent[key] = problem, plan
    return plan


def forget_plans() -> None:
    """Make every plan anew: for those who change which kernels are there."""
    _recent.clear()
    _plan.cache_clear()


@lru_cache(maxsize=1024)
def _plan(problem: Problem, device: int) -> Plan:
    return Plan(problem)
