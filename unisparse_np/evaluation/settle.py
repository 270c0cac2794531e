"""The tuner's last word: on windows that the search has not seen, the value that keeps the bound there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..model.llama import Attention
from .candidates import RANGES, Fit
from .probe import Probe
from .search import Measure, pays

_ROUNDS = 4
_MOST_FITS = 3  # tried on held-out windows before giving up
_AIM, _CLOSE = 0.95, 0.9  # of the bound: what a further round aims at, and what is close enough


class Settled(NamedTuple):
    """An attention as it was measured on held-out windows."""

    fit: Fit
    attention: Attention
    probe: Probe


def settle(fits: Sequence[Fit], measure: Measure, max_kl: float) -> tuple[Settled | None, Settled]:
    """The cheapest of the fits that keeps the bound on held-out windows, and of all that was tried the one of least loss.

    fits: cheapest first. Costs of dense attention and above are not worth having and count as no result.
    """
    tried: list[Settled] = []
    for fit in worthwhile(fits):
        rounds = _settle_fit(fit, measure, max_kl)
        tried += rounds
        kept = [one for one in rounds if one.probe.kl <= max_kl and one.probe.cost < 1]
        if kept:
            return min(kept, key=lambda one: one.probe.cost), min(tried, key=lambda one: one.probe.kl)
    return None, min(tried, key=lambda one: one.probe.kl)


def worthwhile(fits: Sequence[Fit]) -> list[Fit]:
    """The fits worth trying: those that reach the bound, values per head only where they pay; where none does, the first."""
    common = [fit for fit in fits if fit.kind.heads is None]
    kept = [fit for fit in fits if fit.reaches and (fit.kind.heads is None or pays(fit, common[0]))]
    return kept[:_MOST_FITS] or list(fits[:1])


def _settle_fit(fit: Fit, measure: Measure, max_kl: float) -> list[Settled]:
    """Measure, tighten or loosen, and measure again, until the loss is just below the bound."""
    limits, looseness, rounds = RANGES[fit.kind.rule], fit.looseness, list[Settled]()
    for _ in range(_ROUNDS):
        attention = fit.kind.attention(looseness)
        if any(one.attention == attention for one in rounds):
            break
        probe = measure(attention)
        exceeded_before = any(one.probe.kl > max_kl for one in rounds)
        rounds.append(Settled(fit, attention, probe))
        if probe.kl <= max_kl and (probe.kl > _CLOSE * max_kl or exceeded_before):
            break
        step = (_AIM * max_kl / max(probe.kl, 1e-9)) ** (1 / fit.exponent)
        looseness = min(max(looseness * min(max(step, 0.25), 2.0), limits.lowest), limits.highest)
    return rounds
