"""When does a figure count as reproduced? The interval of a difference of two means, and the words that the page makes of it."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from unisparse_np.evaluation.intervals import mean_estimate

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def prototype(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(DOCS))
    yield importlib.import_module("result_tables.prototype")
    for name in [name for name in sys.modules if name.partition(".")[0] == "result_tables"]:
        del sys.modules[name]


@pytest.mark.parametrize(("ours", "theirs"), [(12, 12), (16, 12), (12, 2)])
def test_two_samples_of_one_distribution_agree_19_times_in_20(prototype: ModuleType, ours: int, theirs: int) -> None:
    rng, agree, inside = np.random.default_rng(0), 0, 0
    for _ in range(2000):
        found = mean_estimate(rng.normal(0.3, 0.1, ours))
        row = {"nll_over_dense": found.value, "nll_interval": found[1:], "items": ours}
        agreement = prototype.agreement_of(
            row, {"nll_over_dense": rng.normal(0.3, 0.1, theirs).mean(), "items": theirs}, prototype.MEASURES["copy"]
        )
        agree, inside = agree + agreement.agrees, inside + agreement.inside_ours
    assert 0.93 < agree / 2000 < 0.97
    assert inside / 2000 < 0.87  # the stricter count asks of the other sample what no sample keeps


def test_an_interval_that_ends_at_0_counts_by_its_upper_half(prototype: ModuleType) -> None:
    row = {"kl": 0.01, "kl_interval": [0.0, 0.03], "items": 12}
    found = prototype.agreement_of(row, {"kl": 0.038, "items": 12}, prototype.MEASURES["text"])
    assert found.allowed == pytest.approx(0.02 * 2**0.5) and found.agrees and not found.inside_ours
    assert not prototype.agreement_of(row, {"kl": 0.039, "items": 12}, prototype.MEASURES["text"]).agrees
    assert prototype.agreement_of(row, None, prototype.MEASURES["text"]) is None


def test_rows_that_disagree_are_named_with_their_direction(prototype: ModuleType) -> None:
    rows = {"a": (0.90, [0.88, 0.92]), "b": (0.90, [0.89, 0.91]), "c": (0.90, [0.80, 1.0])}
    found = {
        rule: prototype.agreement_of(
            {"share_of_dense": value, "share_interval": ends, "items": 100},
            {"share_of_dense": 0.925, "items": 100, "note": "other questions"},
            prototype.MEASURES["needles"],
        )
        for rule, (value, ends) in rows.items()
    }
    assert prototype.in_words(found) == (
        "The prototype's figure agrees in 2 of 3 rows, and lies inside our own interval in 1. "
        "Chance alone would leave out one in twenty, 0.1 here. "
        "Left out: b is lower here by 0.025, where chance explains 0.014 (other questions).\n"
    )
    assert prototype.in_words({}) == ""
