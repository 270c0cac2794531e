"""What the tuner chooses among: kinds of config, each with one value that makes it looser or stricter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config import PerHead, UniSparseConfig
from .head_curves import HeadBalance
from .probe import Probe

Rule = Literal["top_p", "row_threshold", "both"]


class Range(NamedTuple):
    """Where looseness may go, where a search starts, the exponent that is assumed before two probes tell (KL grows about as
    looseness to this power), and the composites (c_q, c_k) of the first kind."""

    lowest: float
    start: float
    highest: float
    exponent: float
    composites: tuple[int, int] = (8, 8)


RANGES: dict[Rule, Range] = {
    "top_p": Range(0.001, 0.05, 0.5, 1.0),
    "row_threshold": Range(0.0005, 0.02, 0.3, 1.4),
    "both": Range(0.001, 0.05, 0.5, 1.0, composites=(4, 2)),
}
THRESHOLD_OF_BOTH = 0.4  # tau over 1 - P, where both rules are on: P 0.95 goes with tau 0.02
COARSE = 8  # top_p_compress of both rules, or what finer composites fit into


@dataclass(frozen=True)
class Kind:
    """Everything of a config but the strictness of its rule. Looseness is 1 - P, or tau; more of it drops more blocks.

    With both rules looseness is 1 - P, and tau goes with it.
    heads: gives each head a looseness of its own, all together the loss of the common one; None: all alike.
    """

    block_size: int = 128
    q_compress: int = 8
    k_compress: int = 8
    key_anchors: int = 1
    rule: Rule = "top_p"
    heads: HeadBalance | None = None

    def attention(self, looseness: float) -> UniSparseConfig | list[UniSparseConfig]:
        """The config, or one a layer."""
        if self.heads is None:
            return self.config(looseness)
        return [self.config(self.heads.looseness, of_heads) for of_heads in self.heads.factors(looseness)]

    def value(self, looseness: float) -> float:
        """P or tau, to three digits of looseness, inside its range."""
        limits = RANGES[self.rule]
        rounded = float(f"{min(max(looseness, limits.lowest), limits.highest):.3g}")
        return rounded if self.rule == "row_threshold" else round(1 - rounded, 6)

    def head_values(self, looseness: float) -> list[tuple[float, ...]] | None:
        """P or tau of every head, [layers][Hq]; None where all have the kind's."""
        if self.heads is None:
            return None
        return [tuple(self.value(self.heads.looseness * factor) for factor in of_heads) for of_heads in self.heads.factors(looseness)]

    @property
    def top_p_compress(self) -> int | None:
        """Coarse composites for Top-P where both rules are on and those of the kind are finer."""
        coarse = math.lcm(COARSE, self.q_compress, self.k_compress)
        return None if self.rule != "both" or coarse == self.q_compress == self.k_compress else coarse

    def config(self, looseness: float, of_heads: Sequence[float] | None = None) -> UniSparseConfig:
        """The config of a layer; of_heads: a factor each on the looseness."""
        value: PerHead = self.value(looseness)
        threshold: PerHead = self._threshold(looseness)
        if of_heads is not None:
            value = tuple(self.value(looseness * factor) for factor in of_heads)
            threshold = tuple(self._threshold(looseness * factor) for factor in of_heads)
        return UniSparseConfig(
            block_size=self.block_size,
            q_compress=self.q_compress,
            k_compress=self.k_compress,
            key_anchors=self.key_anchors,
            top_p=None if self.rule == "row_threshold" else value,
            row_threshold=None if self.rule == "top_p" else threshold,
            top_p_compress=self.top_p_compress,
        )

    def _threshold(self, looseness: float) -> float:
        """tau: the kind's value, or what goes with its P."""
        value = self.value(looseness)
        return float(f"{THRESHOLD_OF_BOTH * (1 - value):.3g}") if self.rule == "both" else value


class Trial(NamedTuple):
    """A probe of a kind at one looseness."""

    looseness: float
    probe: Probe


@dataclass(frozen=True)
class Fit:
    """A kind at the bound: the looseness at which its KL is expected to reach the bound, and what it costs there.

    exponent: KL grows as looseness to this power. cost_slope: rise of the cost (so not above 0) when looseness grows e-fold.
    slopes: fall of each layer's density at the same.
    reaches: False where even the strictest value exceeds the bound.
    """

    kind: Kind
    looseness: float
    cost: float
    density: float
    exponent: float
    cost_slope: float
    slopes: tuple[float, ...]
    reaches: bool
    trials: tuple[Trial, ...]

    @property
    def nearest(self) -> Trial:
        """The trial closest to the expected looseness."""
        return min(self.trials, key=lambda trial: abs(trial.looseness - self.looseness))
