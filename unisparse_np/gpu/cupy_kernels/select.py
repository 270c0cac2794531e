"""Steps 4 and 5 of ALGORITHM.md on the GPU (cuda/select.cu): the blocks to keep, as a bit mask."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...config import PerHead
from ...errors import InvalidInput
from ...problem import Problem, ceil_div
from .plan import Plan, plan_of
from .program import Launch
from .room import INT32, UINT32, Room, address_of, array_of
from .scores import UNITS
from .shapes import words_per_row

MAX_WARPS = 4  # of select.cu
SHARED_BYTES = 96 << 10  # that every device has to give: room for shapes.MAX_BLOCKS scores


class BlockMask:
    """Selected blocks: words [rows, Nq, ceil(Nk / 32)] uint32, bit b of word w for key block 32 w + b; counts [rows, Nq] int32.

    A row serves heads_per_row query heads. words and counts are given as arrays or as Rooms for them; counts_room is what was given.
    """

    def __init__(self, words: Any, counts: Any, heads_per_row: int) -> None:
        self._words, self.counts_room, self.heads_per_row = words, counts, heads_per_row
        self.words_at, self.counts_at = address_of(words), address_of(counts)

    @property
    def words(self) -> Any:
        """The words as an array."""
        return array_of(self._words)

    @property
    def counts(self) -> Any:
        """The counts as an array."""
        return array_of(self.counts_room)


def select_blocks(mean: Any, peak: Any, problem: Problem) -> Any:
    """Steps 4-5. mean, peak [Hc, Nq, Nk] -> mask [Hq, Nq, Nk] bool, composite heads repeated. peak is read under a row threshold only."""
    if peak is None and problem.config.row_threshold is not None:
        raise InvalidInput("peak is None, but row_threshold is set: give the peaks that score_blocks returns")
    plan = plan_of(problem)
    units = cupy.ascontiguousarray(cupy.rint(cupy.asarray(mean, dtype=np.float32) * np.float32(UNITS)).astype(np.uint32))
    return to_bool(select_words(units, None if peak is None else cupy.ascontiguousarray(peak, dtype=np.float32), plan), problem)


def select_words(units: Any, peak: Any, plan: Plan) -> BlockMask:
    """The same from contiguous scores in units, as words; what invisible blocks hold does not matter."""
    mask = empty_mask(plan)
    selecting(units.data.ptr, address_of(peak), mask.words_at, mask.counts_at, plan).now()
    return mask


def empty_mask(plan: Plan) -> BlockMask:
    """Room for a selection, one row a composite head."""
    return BlockMask(Room(plan.words_shape, UINT32), Room(plan.words_shape[:2], INT32), plan.problem.config.head_compress)


def selecting(units: int, peak: int, words: int, counts: int, plan: Plan) -> Launch:
    """Steps 4-5 from scores in units into the words and counts of a BlockMask; what invisible blocks hold does not matter."""
    row_bytes = 32 * words_per_row(plan.problem) * 4
    warps = max(1, min(MAX_WARPS, SHARED_BYTES // row_bytes))
    launcher = plan.launcher("select.cu", "select_blocks", 32 * warps, warps * row_bytes)
    rows = plan.scores_shape[0] * plan.scores_shape[1]
    return Launch(launcher, ceil_div(rows, warps), 1, (units, peak, *shares(plan), plan.packed_shape(), words, counts))


def shares(plan: Plan) -> tuple[int, int]:
    """Addresses of top_p [Hc] and row_threshold [Hc] on the device, 0 where a rule is off."""
    top_p, row_threshold = (0 if rule is None else rule.data.ptr for rule in plan.once(rules))
    return top_p, row_threshold


def rules(plan: Plan) -> tuple[Any, Any]:
    """top_p [Hc] float64 and row_threshold [Hc] float32 on the device, None where a rule is off."""
    config, heads = plan.problem.config, plan.problem.num_composite_heads
    return (
        None if config.top_p is None else per_head(config.top_p, heads, "float64"),
        None if config.row_threshold is None else per_head(config.row_threshold, heads, "float32"),
    )


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


def per_head(value: PerHead, heads: int, dtype: str) -> Any:
    """One share a composite head on the device, ready for any stream, or a null pointer where the rule is off."""
    return np.uint64(0) if value is None else _shares(value, heads, dtype, cupy.cuda.runtime.getDevice())


@lru_cache(maxsize=64)
def _shares(value: PerHead, heads: int, dtype: str, device: int) -> Any:
    shares = cupy.asarray(np.broadcast_to(np.asarray(value, dtype=dtype), (heads,)).copy())
    cupy.cuda.get_current_stream().synchronize()  # once for a config: later calls may run on other streams
    return shares
