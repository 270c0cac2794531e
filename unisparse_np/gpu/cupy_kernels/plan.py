"""What one problem's calls have in common, worked out once: the kernels' struct, the compiled kernels, sizes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from ...problem import Problem
from .device import kernel
from .shapes import check_shape, shape_of


class Plan:
    """A problem with everything derived from it that a launch needs, so that a call costs little host time."""

    def __init__(self, problem: Problem) -> None:
        check_shape(problem)
        config = problem.config
        self.problem = problem
        self.queries_per_block = config.block_size // config.q_compress
        self.keys_per_block = config.block_size // config.k_compress
        self._shapes: dict[tuple[int, int], np.ndarray] = {}
        self._kernels: dict[tuple[str, bool], Any] = {}

    def shape(self, heads_per_mask: int = 1, with_anchors: bool = True) -> np.ndarray:
        """The struct of cuda/shape.cuh."""
        key = (heads_per_mask, self.problem.config.key_anchors if with_anchors else 0)
        if key not in self._shapes:
            self._shapes[key] = shape_of(self.problem, *key)
        return self._shapes[key]

    def kernel(self, file: str, name: str, shared_bytes: int, dtype: Any = np.float16) -> Any:
        """A compiled kernel for inputs of this dtype."""
        key = (name, dtype == np.float16)
        if key not in self._kernels:
            self._kernels[key] = kernel(
                file, name, shared_bytes, IS_FLOAT16=int(key[1]), HEAD_DIM=self.problem.head_dim, BLOCK_SIZE=self.problem.config.block_size,
                QUERIES_PER_BLOCK=self.queries_per_block, KEYS_PER_BLOCK=self.keys_per_block,
            )  # fmt: skip
        return self._kernels[key]


@lru_cache(maxsize=1024)
def plan_of(problem: Problem) -> Plan:
    """The plan of a problem, made once. Raises InvalidInput for shapes the kernels do not take."""
    return Plan(problem)
