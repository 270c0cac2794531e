"""95% intervals of means, shares and ratios over examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Two-sided 95% quantiles of Student's t for 1 to 30 degrees of freedom; above, the normal quantile is within 4%.
_STUDENT_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NORMAL_QUANTILE = 1.960
_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A value and its 95% interval; low and high are NaN where one example cannot tell."""

    value: float
    low: float
    high: float


def mean_estimate(values: Sequence[float], lowest: float = -math.inf, highest: float = math.inf) -> Estimate:
    """The mean with Student's t interval, cut where the quantity cannot go (a KL is not below 0)."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, math.nan, math.nan)
    quantile = _STUDENT_T[n - 2] if n - 1 <= len(_STUDENT_T) else NORMAL_QUANTILE
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Estimate(mean, max(lowest, mean - half), min(highest, mean + half))


def share_estimate(scores: Sequence[float]) -> Estimate:
    """The mean of scores in [0, 1] with Wilson's interval: stays inside [0, 1] and has a width even where all are right.

    For partial scores it is on the safe side: no variable in [0, 1] varies more than hit-or-miss with the same mean.
    """
    mean, n = float(np.mean(scores)), len(scores)
    z2 = NORMAL_QUANTILE**2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_QUANTILE / (1 + z2 / n) * math.sqrt(mean * (1 - mean) / n + z2 / (4 * n * n))
    return Estimate(mean, max(0.0, centre - half), min(1.0, centre + half))


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """Ratio of two sums over the same examples, with the interval of a paired bootstrap (2,000 resamples, fixed seed)."""
    above, below = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)  # [n]
    if below.sum() == 0:
        return Estimate(math.nan, math.nan, math.nan)
    chosen = np.random.default_rng(0).integers(len(above), size=(_RESAMPLES, len(above)))  # [resamples, n]
    sums = below[chosen].sum(axis=1)
    ratios = above[chosen].sum(axis=1)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, (0.025, 0.975)) if len(above) > 1 else (math.nan, math.nan)
    return Estimate(float(above.sum() / below.sum()), float(low), float(high))
