"""Does a figure of this project agree with the prototype's, where both are means over samples of their own?"""

from __future__ import annotations

import math
from typing import NamedTuple

from .tables import Row


class Measure(NamedTuple):
    """What a table compares: the keys of its figure and of the figure's 95% interval, and the numbers' form in words."""

    figure: str
    interval: str
    form: str
    below_is_cut: bool = False  # the interval ends at 0 where the quantity does, so that its upper half tells its width


MEASURES = {
    "text": Measure("kl", "kl_interval", ".4f", below_is_cut=True),
    "copy": Measure("nll_over_dense", "nll_interval", ".3f"),
    "needles": Measure("share_of_dense", "share_interval", ".3f"),
}


class Agreement(NamedTuple):
    """A figure beside the prototype's. allowed: 95% of differences by chance are at most this; note: what is known of this one."""

    ours: float
    prototype: float
    allowed: float
    inside_ours: bool
    form: str
    note: str

    @property
    def agrees(self) -> bool:
        return abs(self.ours - self.prototype) <= self.allowed


def agreement_of(row: Row, prototype: Row | None, measure: Measure) -> Agreement | None:
    """None where the prototype has no such row.

    The variance of a difference of two independent means is the sum of theirs. With items that spread alike it is ours times
    1 + n / m, for n items here and m there.
    """
    if prototype is None:
        return None
    ours, (low, high) = row[measure.figure], row[measure.interval]
    half = high - ours if measure.below_is_cut else (high - low) / 2
    allowed = half * math.sqrt(1 + row["items"] / prototype["items"])
    theirs = prototype[measure.figure]
    return Agreement(ours, theirs, allowed, low <= theirs <= high, measure.form, prototype.get("note", "why is not known"))


def in_words(agreements: dict[str, Agreement]) -> str:
    """How many rows agree, by both counts, and by how much the others do not; nothing without a prototype."""
    if not agreements:
        return ""
    count, agree = len(agreements), sum(found.agrees for found in agreements.values())
    strict = sum(found.inside_ours for found in agreements.values())
    text = f"The prototype's figure agrees in {agree} of {count} rows, and lies inside our own interval in {strict}."
    others = [
        f"{rule} is {'lower' if found.ours < found.prototype else 'higher'} here by {abs(found.ours - found.prototype):{found.form}}, "
        f"where chance explains {found.allowed:{found.form}} ({found.note})"
        for rule, found in agreements.items()
        if not found.agrees
    ]
    expected = f"Chance alone would leave out one in twenty, {count / 20:.1f} here. Left out: "
    return text + (f" {expected}{'; '.join(others)}." if others else "") + "\n"
