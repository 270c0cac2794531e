"""Figures of what sparse attention loses beside what was asked of them: SmolLM2-135M-Instruct and needle-llama."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from result_tables.figures import Figure, Values, ratio, value
from unisparse_np import UniSparseConfig

TEXT, COPY = ("selection_rules_text_8192",), ("selection_rules_copy_8192",)
NEEDLES = tuple(f"selection_rules_needles_{length}" for length in (4096, 8192, 16384))


def best(result: dict[str, Any], key: str, densest: float, choose: Callable[[Iterable[float]], float]) -> float | None:
    """The best of a figure among all measured rules that keep at most this density."""
    values = [row[key] for row in result["rows"] if row["density"] <= densest]
    return choose(values) if values else None


def least_kl(densest: float) -> Callable[[dict[str, Any]], Values]:
    """The least KL on text of all rules that keep at most this density."""
    return lambda text: (best(text, "kl", densest, min),)


def most_needles(*results: dict[str, Any]) -> Values:
    """On the tasks that dense attention solves to 80%, 12 of 14 at 4K and 13 at 8K and 16K: on the others chance decides, as it does
    on fewer than 100 questions."""
    asked = [{"rows": [row for row in result["rows"] if row["items"] >= 100]} for result in results]
    return tuple(best(result, "share_on_solved_tasks", most, max) for result, most in zip(asked, (0.36, 0.21, 0.15), strict=True))


def of_balanced(key: str) -> Callable[..., Values]:
    """A figure of the balanced preset, from each result."""
    config = asdict(UniSparseConfig.balanced())
    return lambda *results: tuple(value(result, key, config=config) for result in results)


def cost_of_balanced(text: dict[str, Any]) -> Values:
    """Density and selection, a share of dense attention's products."""
    density, selection = of_balanced("density")(text)[0], of_balanced("selection")(text)[0]
    return (None if density is None or selection is None else density + selection,)


def saved_by_tune(result: dict[str, Any]) -> Values:
    """By how much of the default preset's density the tuned config's is lower."""
    share = ratio(result["tuned"]["density"], result["presets"]["default preset"]["density"])
    return (None if share is None else 1 - share,)


LOSS_FIGURES = [
    Figure(
        "SmolLM2, text: least KL of any rule at a density of at most .25",
        TEXT,
        least_kl(0.25),
        asked=(0.009,),
        goal=(0.006,),
        form="{:.4f}",
        less_is_better=True,
    ),
    Figure("the same at most .18", TEXT, least_kl(0.18), asked=(0.015,), goal=(0.010,), form="{:.4f}", less_is_better=True),
    Figure(
        "SmolLM2, quoting: least NLL over dense of any rule at most .25",
        COPY,
        lambda copy: (best(copy, "nll_over_dense", 0.25, min),),
        asked=(0.05,),
        goal=(0.02,),
        form="{:+.3f}",
        less_is_better=True,
    ),
    Figure(
        "needle-llama, 4K / 8K / 16K: share of dense kept on tasks that it solves, best rule at a density of at most .36 / .21 / .15",
        NEEDLES,
        most_needles,
        asked=(0.99,) * 3,
        goal=(0.995,) * 3,
        form="{:.3f}",
    ),
    Figure("one rule for both, `balanced`: KL on text", TEXT, of_balanced("kl"), (0.010,), (0.010,), form="{:.4f}", less_is_better=True),
    Figure(
        "`balanced`: needles kept at 4K / 8K",
        NEEDLES[:2],
        of_balanced("share_on_solved_tasks"),
        asked=(0.99,) * 2,
        goal=(0.99,) * 2,
        form="{:.3f}",
    ),
    Figure(
        "`balanced`: choosing and attention, share of dense attention's products",
        TEXT,
        cost_of_balanced,
        asked=(0.30,),
        goal=(0.30,),
        form="{:.3f}",
        less_is_better=True,
    ),
    Figure(
        "what `tune` cuts off the default preset's density at a KL of at most .02",
        ("tune_smollm2_8192",),
        saved_by_tune,
        asked=(0.15,),
        goal=(0.30,),
        form="{:.0%}",
    ),
]
