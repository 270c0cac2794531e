"""Steps 4 and 5 of ALGORITHM.md on the GPU (cuda/select.cu): the blocks to keep, as a bit mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import cupy
import numpy as np

from ...config import PerHead
from ...problem import Problem, ceil_div
from .plan import Plan, plan_of
from .scores import UNITS
from .shapes import words_per_row

WARPS = 4


class BlockMask(NamedTuple):
    """Selected blocks: words [rows, Nq, ceil(Nk / 32)] uint32, bit b of word w for key block 32 w + b; counts [rows, Nq] int32.

    A row serves heads_per_row query heads.
    """

    words: Any
    counts: Any
    heads_per_row: int


def select_blocks(mean: Any, peak: Any, problem: Problem) -> Any:
    """Steps 4-5. mean, peak [Hc, Nq, Nk] -> mask [Hq, Nq, Nk] bool, composite heads repeated. peak is read under a row threshold only."""
    plan = plan_of(problem)
    units = cupy.rint(cupy.asarray(mean, dtype=np.float32) * np.float32(UNITS)).astype(np.uint32)
    return to_bool(select_words(cupy.ascontiguousarray(units), peak, plan), problem)


def select_words(units: Any, peak: Any, plan: Plan) -> BlockMask:
    """The same from scores in units, as words; what invisible blocks hold does not matter."""
    problem = plan.problem
    words = cupy.empty((problem.num_composite_heads, problem.num_q_blocks, words_per_row(problem)), np.uint32)
    counts = cupy.empty(words.shape[:2], np.int32)
    rules = (
        _per_head(problem.config.top_p, problem.num_composite_heads, "float64"),
        _per_head(problem.config.row_threshold, problem.num_composite_heads, "float32"),
    )
    shared = WARPS * 32 * words_per_row(problem) * 4
    function = plan.kernel("select.cu", "select_blocks", shared)
    arguments = (units, np.uint64(0) if peak is None else peak, *rules, plan.shape(), words, counts)
    function((ceil_div(counts.size, WARPS),), (32 * WARPS,), arguments, shared_mem=shared)
    return BlockMask(words, counts, problem.config.head_compress)


def from_bool(mask: Any) -> BlockMask:
    """mask [Hq, Nq, Nk] bool -> the same as words, one row a query head."""
    mask = cupy.asarray(mask, dtype=bool)
    heads, rows, blocks = mask.shape
    padded = cupy.zeros((heads, rows, ceil_div(blocks, 32) * 32), bool)
    padded[..., :blocks] = mask
    words = cupy.packbits(padded.ravel(), bitorder="little").view(np.uint32).reshape(heads, rows, -1)
    return BlockMask(words, mask.sum(axis=-1, dtype=np.int32), 1)


def to_bool(mask: BlockMask, problem: Problem) -> Any:
    """[Hq, Nq, Nk] bool from words, rows repeated for the heads they serve."""
    bits = cupy.unpackbits(mask.words.view(np.uint8).ravel(), bitorder="little")
    rows = bits.reshape(*mask.words.shape[:2], -1)[..., : problem.num_k_blocks].astype(bool)
    return cupy.repeat(rows, mask.heads_per_row, axis=0)


@lru_cache(maxsize=64)
def _per_head(value: PerHead, heads: int, dtype: str) -> Any:
    """One share a composite head on the device, or a null pointer where the rule is off."""
    if value is None:
        return np.uint64(0)
    return cupy.asarray(np.broadcast_to(np.asarray(value, dtype=dtype), (heads,)).copy())
