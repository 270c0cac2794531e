"""What the tuner chooses among: kinds of config, each with one value that makes it looser or stricter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from ..config import UniSparseConfig
from .probe import Probe

Rule = Literal["top_p", "row_threshold"]


class Range(NamedTuple):
    """Where looseness may go, where a search starts, and the exponent that is assumed before two probes tell:
    KL grows about as looseness to this power."""

    lowest: float
    start: float
    highest: float
    exponent: float


RANGES: dict[Rule, Range] = {"top_p": Range(0.001, 0.05, 0.5, 1.0), "row_threshold": Range(0.0005, 0.02, 0.3, 1.4)}


@dataclass(frozen=True)
class Kind:
    """Everything of a config but the strictness of its rule. Looseness is 1 - P, or tau; more of it drops more blocks.

    factors: one a layer, by which its looseness differs from the common one; None: all layers alike.
    """

    block_size: int = 128
    q_compress: int = 8
    k_compress: int = 8
    key_anchors: int = 1
    rule: Rule = "top_p"
    factors: tuple[float, ...] | None = None

    def attention(self, looseness: float) -> UniSparseConfig | list[UniSparseConfig]:
        """The config, or one a layer."""
        if self.factors is None:
            return self._config(looseness)
        return [self._config(looseness * factor) for factor in self.factors]

    def value(self, looseness: float) -> float:
        """P or tau, to three digits of looseness, inside its range."""
        limits = RANGES[self.rule]
        rounded = float(f"{min(max(looseness, limits.lowest), limits.highest):.3g}")
        return round(1 - rounded, 6) if self.rule == "top_p" else rounded

    def with_factors(self, factors: Sequence[float]) -> Kind:
        return replace(self, factors=tuple(factors))

    def _config(self, looseness: float) -> UniSparseConfig:
        value = self.value(looseness)
        return UniSparseConfig(
            block_size=self.block_size,
            q_compress=self.q_compress,
            k_compress=self.k_compress,
            key_anchors=self.key_anchors,
            top_p=value if self.rule == "top_p" else None,
            row_threshold=value if self.rule == "row_threshold" else None,
        )


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
