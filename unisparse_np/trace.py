"""Trace: what one attention call looked at, for tests, pictures and audits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Trace:
    """The intermediate results of one call, named as in ALGORITHM.md. Arrays are of the backend that ran.

    Attributes:
        kernel: what ran, in words, such as "reference, 2 threads".
        kept_blocks: selected blocks plus r / S for each visible block that was not, summed over query heads and query blocks.
        visible_blocks: visible blocks, summed likewise.
        lse [Hq, Lq]: natural-log-sum-exp of each query.
        mask [Hq, Nq, Nk] bool: the selected blocks (step 5); None for dense attention.
        anchors [Hkv, Nk, r] int32: positions of the anchor keys (step 6); None for dense attention.
        qc [Hc, Tq, d], kc [Hkc, Tk, d], mean, peak [Hc, Nq, Nk]: steps 1 and 3, kept only when scores were asked for.
            With top_p_compress qc and kc are the fine composites; mean comes from the coarse ones, which are means of these.
    """

    kernel: str
    kept_blocks: float
    visible_blocks: int
    lse: Any
    mask: Any = None
    anchors: Any = None
    qc: Any = None
    kc: Any = None
    mean: Any = None
    peak: Any = None

    @property
    def density(self) -> float:
        """Share of the visible blocks that were attended to, anchors counted; sparsity is 1 - density."""
        return self.kept_blocks / self.visible_blocks

    def kept_later(self) -> Callable[[], float]:
        """A function that gives kept_blocks: a backend whose device may still be counting waits only when it is called.

        It holds no array that is larger than the counts.
        """
        kept = self.kept_blocks
        return lambda: kept
