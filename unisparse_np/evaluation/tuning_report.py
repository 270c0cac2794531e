"""What the tuner found, as plain values and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..model.llama import Attention
from .candidates import Fit
from .cost import selection_share
from .intervals import mean_estimate
from .probe import Probe
from .report import table
from .suite import plain_attention


def plain_fit(fit: Fit) -> dict[str, Any]:
    """A fit as plain JSON values."""
    return {
        "block_size": fit.kind.block_size, "q_compress": fit.kind.q_compress, "k_compress": fit.kind.k_compress,
        "top_p_compress": fit.kind.top_p_compress,
        "key_anchors": fit.kind.key_anchors, "rule": fit.kind.rule, "value": fit.kind.value(fit.looseness),
        "head_values": fit.kind.head_values(fit.looseness),
        "keeps_the_bound": fit.reaches, "density": fit.density, "cost": fit.cost,
        "probes": [{"value": fit.kind.value(trial.looseness), "kl": trial.probe.kl, "cost": trial.probe.cost} for trial in fit.trials],
    }  # fmt: skip


def plain_probe(attention: Attention, probe: Probe) -> dict[str, Any]:
    """A measured attention as plain JSON values."""
    return {
        "attention": plain_attention(attention), "kl": probe.kl, "kl_of_windows": probe.kl_of_windows, "cost": probe.cost,
        "density": sum(probe.densities) / len(probe.densities), "densities": probe.densities,
    }  # fmt: skip


def fits_table(fits: Sequence[Fit], max_kl: float) -> str:
    """All kinds at the bound, the cheapest first."""
    heads = ["rule", "at the bound", "block", "c_q", "c_k", "anchors", "heads", "selection", "density", "cost"]
    rows = []
    for fit in fits:
        kind = fit.kind
        selection = selection_share(kind.config(fit.looseness))
        figures = (f"{kind.value(fit.looseness):.4g}", f"{fit.density:.3f}", f"{fit.cost:.3f}")
        value, density, cost = figures if fit.reaches else ("-", "-", f"KL {min(t.probe.kl for t in fit.trials):.4f}")
        rows.append(
            [kind.rule, value, str(kind.block_size), str(kind.q_compress), str(kind.k_compress), str(kind.key_anchors),
             "alike" if kind.heads is None else "each", f"{selection:.3f}", density, cost]
        )  # fmt: skip
    return f"Search windows, read off where KL reaches {max_kl:g}\n" + table(heads, rows)


def held_out_table(measured: Mapping[str, Probe]) -> str:
    """Attentions by label, as measured on held-out windows."""
    rows = []
    for label, probe in measured.items():
        estimate = mean_estimate(probe.kl_of_windows, lowest=0.0)
        interval = "" if estimate.high != estimate.high else f" [{estimate.low:.4f}, {estimate.high:.4f}]"
        density = sum(probe.densities) / len(probe.densities)
        rows.append(
            [
                label,
                f"{probe.kl:.4f}{interval}",
                f"{density:.3f}",
                f"{min(probe.densities):.3f}",
                f"{max(probe.densities):.3f}",
                f"{probe.cost:.3f}",
            ]
        )
    return "Held-out windows\n" + table(["config", "KL [95%]", "density", "lowest layer", "highest", "cost"], rows)


def composites_answer(fits: Sequence[Fit]) -> str:
    """Which composite sizes are best for this model, in one line: of the kinds that differ in nothing else, the largest group."""
    groups: dict[tuple, list[Fit]] = {}
    for fit in fits:
        if fit.kind.heads is None and fit.reaches:
            groups.setdefault((fit.kind.block_size, fit.kind.rule, fit.kind.key_anchors), []).append(fit)
    if not groups:
        return "No composite size keeps the bound."
    (block_size, rule, anchors), alike = max(groups.items(), key=lambda item: len(item[1]))
    costs = [f"{fit.kind.q_compress} x {fit.kind.k_compress}: {fit.cost:.3f}" for fit in alike]
    return f"Cost by composites (c_q x c_k; block {block_size}, {rule}, {anchors} anchors), the best first: {', '.join(costs)}"
