"""The numbers of a Problem that kernels read, as arrays on the device: one entry a query block or composite query.

All index arithmetic stays in Problem; the kernels only look things up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from ...config import PerHead
from ...problem import Problem


class Shapes(NamedTuple):
    """visible_blocks, sink_stop, local_start, local_stop [Nq]; visible_composites [Tq]: Problem's methods of these names."""

    visible_blocks: Any
    sink_stop: Any
    local_start: Any
    local_stop: Any
    visible_composites: Any


@lru_cache(maxsize=16)
def shapes_of(problem: Problem) -> Shapes:
    """Made once a problem; a model asks for the same one in every layer."""
    blocks = range(problem.num_q_blocks)
    columns = [[problem.visible_blocks(i) for i in blocks], *zip(*(problem.forced_blocks(i) for i in blocks), strict=True)]
    columns.append([problem.visible_composites(t) for t in range(problem.num_q_composites)])
    return Shapes(*(cuda.to_device(np.array(column, dtype=np.int32)) for column in columns))


def first_query_position(problem: Problem) -> int:
    """Position of query 0. Without causality every query sits behind the last key, so that the causal rule hides nothing."""
    return problem.k_len if problem.q_offset is None else problem.q_offset


def per_head(value: PerHead, problem: Problem, off: float, dtype: Any) -> Any:
    """One threshold a composite head, [Hc] on the device; `off` where the rule is off."""
    values = off if value is None else value
    return cuda.to_device(np.broadcast_to(np.asarray(values, dtype=dtype), problem.num_composite_heads).copy())
