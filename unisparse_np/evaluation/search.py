"""The tuner's search: the cheapest kind of config at a bound on the loss, by few probes.

A kind of config has one value that makes it looser, and over it the loss rises about as a power, the cost falls about with
the logarithm. Two or three probes fix both lines, and a kind with the same rule as an earlier one borrows its slopes, so that one
probe near the bound is enough. Kinds are compared *at the bound*, where none of them need have been probed exactly.

One property is walked at a time: block size and rule, then composites, anchors, the rule once more, and at last the heads,
which get more or less looseness by what each adds to the loss and saves in cost (head_curves.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..model.llama import Attention
from .candidates import RANGES, Fit, Kind, Trial
from .head_curves import FACTORS, HeadBalance, HeadCurves
from .probe import Probe

Measure = Callable[[Attention], Probe]
COMPOSITES = ((8, 8), (16, 16), (4, 4), (4, 8), (8, 4), (2, 8), (2, 4))  # (c_q, c_k)
ANCHORS = (0, 2)
LAYER_GROUPS = 10
MOST_TRIALS = 4  # of one kind
_SMALLEST_KL = 1e-9  # below it a KL is rounding
_NEAR = math.log(1.5)  # a trial this close to the bound, in log KL, is near enough to read the cost at the bound from
_PAYS = 0.99  # a config with values per head must cost less than this share of the common one


@dataclass
class Search:
    """Fits kinds one after another; `fits` holds all of them, also when it is interrupted."""

    measure: Measure
    curves: Callable[[Callable[[float], UniSparseConfig]], HeadCurves]  # of the heads, around a looseness
    max_kl: float
    num_layers: int
    fits: list[Fit] = field(default_factory=list)

    def run(self) -> list[Fit]:
        """Every fit, the cheapest first; those that cannot keep the bound come last."""
        for rule, limits in RANGES.items():
            for block_size in (128, 64):
                self.fit(Kind(block_size, *limits.composites, rule=rule))
        for q_compress, k_compress in COMPOSITES:
            self.fit(replace(self.best.kind, q_compress=q_compress, k_compress=k_compress))
        for anchors in ANCHORS:
            self.fit(replace(self.best.kind, key_anchors=anchors))
        for rule in RANGES:
            self.fit(replace(self.best.kind, rule=rule))
        self.fit_heads()
        return self.ranked()

    @staticmethod
    def planned_probes(num_layers: int) -> int:
        """About how many probes `run` takes."""
        kinds = 2 * len(RANGES) + len(COMPOSITES) - 1 + len(ANCHORS) + 1
        return round(1.7 * kinds) + min(LAYER_GROUPS, num_layers) + 2

    @property
    def best(self) -> Fit:
        """The cheapest fit so far that keeps the bound; where none does, the one with the least loss."""
        return self.ranked()[0]

    def ranked(self) -> list[Fit]:
        return sorted(self.fits, key=lambda fit: (not fit.reaches, fit.cost if fit.reaches else fit.nearest.probe.kl))

    def fit(self, kind: Kind) -> Fit:
        """Probe a kind near the bound, unless it is known."""
        if (known := next((fit for fit in self.fits if fit.kind == kind), None)) is not None:
            return known
        earlier = next((fit for fit in reversed(self.fits) if fit.kind.rule == kind.rule), None)
        looseness = RANGES[kind.rule].start if earlier is None else earlier.looseness
        trials: list[Trial] = []
        while len(trials) < MOST_TRIALS:
            trials.append(Trial(looseness, self.measure(kind.attention(looseness))))
            fit = fit_of(kind, trials, self.max_kl, earlier)
            if (len(trials) > 1 or earlier is not None) and abs(_log_kl(fit.nearest) - math.log(self.max_kl)) < _NEAR:
                break
            looseness = next_looseness(fit, self.max_kl)
            if any(math.isclose(looseness, trial.looseness, rel_tol=0.01) for trial in trials):
                break
        self.fits.append(fit)
        return fit

    def fit_heads(self) -> Fit | None:
        """The best kind with a looseness of its own for each head; None where there is nothing to gain.

        A group of layers that is sparse alone shows its own loss; its heads share it as their errors stand to each other.
        """
        best = self.best
        if not best.reaches or best.kind.heads is not None:
            return None
        curves = self.curves(lambda factor: best.kind.config(best.looseness * factor))
        errors = curves.errors[..., FACTORS.index(1.0)].sum(axis=1)  # [layers]
        config, weights = best.kind.config(best.looseness), [0.0] * self.num_layers
        for group in layer_groups(self.num_layers):
            loss = max(_SMALLEST_KL, self.measure(self._only(config, group)).kl)
            for layer in group:
                weights[layer] = loss / max(1e-30, float(errors[list(group)].sum()))
        return self.fit(replace(best.kind, heads=HeadBalance(curves, weights, best.looseness)))

    def _only(self, config: UniSparseConfig, group: Sequence[int]) -> list[AttentionConfig]:
        """Sparse in one group of layers, dense in all others: its own part of the loss."""
        return [config if layer in group else "dense" for layer in range(self.num_layers)]


def fit_of(kind: Kind, trials: Sequence[Trial], max_kl: float, earlier: Fit | None = None) -> Fit:
    """Lines through the two trials closest to the bound: log KL and cost over log looseness. One trial takes its slopes from `earlier`."""
    limits = RANGES[kind.rule]
    by_distance = sorted(trials, key=lambda trial: abs(_log_kl(trial) - math.log(max_kl)))
    near = by_distance[0]
    other = next((trial for trial in by_distance[1:] if trial.looseness != near.looseness), None)
    exponent, cost_slope, slopes = limits.exponent, 0.0, (0.0,) * len(near.probe.densities)
    if earlier is not None:
        exponent, cost_slope, slopes = earlier.exponent, earlier.cost_slope, earlier.slopes
    if other is not None:
        step = math.log(other.looseness / near.looseness)
        if (measured := (_log_kl(other) - _log_kl(near)) / step) > 0:
            exponent = min(max(measured, limits.exponent / 3), 3 * limits.exponent)
        cost_slope = min(0.0, (other.probe.cost - near.probe.cost) / step)
        slopes = tuple((b - a) / -step for a, b in zip(near.probe.densities, other.probe.densities, strict=True))
    wanted = near.looseness * math.exp((math.log(max_kl) - _log_kl(near)) / exponent)
    looseness = min(max(wanted, limits.lowest), limits.highest)
    step = math.log(looseness / near.looseness)
    return Fit(
        kind, looseness,
        cost=max(0.0, near.probe.cost + cost_slope * step),
        density=sum(max(0.0, d - s * step) for d, s in zip(near.probe.densities, slopes, strict=True)) / len(slopes),
        exponent=exponent,
        cost_slope=cost_slope,
        slopes=slopes,
        reaches=wanted >= limits.lowest or near.probe.kl <= max_kl,
        trials=tuple(trials),
    )  # fmt: skip


def next_looseness(fit: Fit, max_kl: float) -> float:
    """Where to probe next: at the bound as far as known, but at most a factor 8 away from what was probed."""
    reach = max(trial.looseness for trial in fit.trials), min(trial.looseness for trial in fit.trials)
    looseness = min(max(fit.looseness, reach[1] / 8), reach[0] * 8)
    if (
        len(fit.trials) == 1 and abs(math.log(looseness / fit.trials[0].looseness)) < 0.3
    ):  # at the bound at once: still two points for a line
        looseness *= 0.7 if fit.trials[0].probe.kl > max_kl else 1.4
    limits = RANGES[fit.kind.rule]
    return min(max(looseness, limits.lowest), limits.highest)


def layer_groups(num_layers: int) -> list[list[int]]:
    """Neighbouring layers, in at most LAYER_GROUPS groups."""
    count = min(LAYER_GROUPS, num_layers)
    edges = [round(n * num_layers / count) for n in range(count + 1)]
    return [list(range(start, stop)) for start, stop in pairwise(edges)]


def pays(per_head: Fit, common: Fit) -> bool:
    """Whether values per head are worth their length."""
    return per_head.reaches and per_head.cost < _PAYS * common.cost


def _log_kl(trial: Trial) -> float:
    return math.log(max(trial.probe.kl, _SMALLEST_KL))
