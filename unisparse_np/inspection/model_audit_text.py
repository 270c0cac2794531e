"""The audit of a model as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .layer_statistics import HeadStatistics
from .model_audit import DOUBTFUL_AGREEMENT, DOUBTFUL_KL, SAFE_AGREEMENT, SAFE_KL, ModelAudit, Trial

VERDICTS = {
    "safe": f"SAFE on this text: KL at most {SAFE_KL} nats and top-1 agreement at least {SAFE_AGREEMENT:.0%}",
    "doubtful": f"DOUBTFUL on this text: beyond KL {SAFE_KL} nats or below {SAFE_AGREEMENT:.0%} agreement",
    "unsafe": f"UNSAFE on this text: beyond KL {DOUBTFUL_KL} nats or below {DOUBTFUL_AGREEMENT:.0%} agreement",
}
COLUMNS = (("density", 9), ("mass kept", 11), ("1% row", 8), ("rank corr", 11), ("out error", 11), ("on block 0", 12), ("of it kept", 12))


def audit_text(audit: ModelAudit, all_heads: bool = False) -> str:
    """Verdict, predictions, a line a layer (or a head), the worst, and what was tried."""
    parts = [_predictions(audit), _layers(audit), _worst_heads(audit), _trials(audit), verdict_line(audit), help_line(audit)]
    if all_heads:
        parts.insert(2, _all_heads(audit))
    return "\n\n".join(parts)


def verdict_line(audit: ModelAudit) -> str:
    """Is sparse safe here, and by which rule of thumb."""
    return "verdict: " + VERDICTS[audit.verdict]


def help_line(audit: ModelAudit) -> str:
    """What would help, as measured on the whole model."""
    best = audit.best_trial
    if best is None or best.predictions is None:
        return "what would help: none of the changes tried lowers KL on the whole model"
    before, after = audit.predictions, best.predictions
    return (
        f"what would help: {best.flags} ({best.why}): KL {before.kl_mean:.4f} -> {after.kl_mean:.4f}, "
        f"top-1 agreement {before.top1_agreement:.1%} -> {after.top1_agreement:.1%}, density {before.density:.3f} -> {after.density:.3f}"
    )


def _predictions(audit: ModelAudit) -> str:
    p = audit.predictions
    change = p.perplexity_sparse / p.perplexity_dense - 1
    return "\n".join(
        (
            f"{audit.tokens:,} tokens, sparse against dense attention",
            f"  KL per token       mean {p.kl_mean:.3g} nats, worst token in a hundred {p.kl_p99:.3g}, last token {p.kl_last:.3g}",
            f"  top-1 agreement    {p.top1_agreement:.1%}; the first token of the answer {'stays' if p.same_first_token else 'CHANGES'}",
            f"  perplexity         {p.perplexity_dense:.3f} dense, {p.perplexity_sparse:.3f} sparse ({change:+.1%})",
            f"  density            {p.density:.3f} (dense is 1)",
        )
    )


def _layers(audit: ModelAudit) -> str:
    lines = [
        "each layer by itself, on dense attention's q, k, v: means over heads",
        f"{'layer':>5}" + "".join(f"{heading:>{width}}" for heading, width in COLUMNS) + "   worst head",
    ]
    for layer in sorted({head.layer for head in audit.heads}):
        heads = audit.of_layer(layer)
        worst = max(heads, key=lambda head: head.output_error)
        mark = " <- worst" if layer == audit.worst_layers[0] else ""
        lines.append(f"{layer:>5}" + _cells(heads) + f"   {worst.head} ({worst.output_error:.1%}){mark}")
    lines += [
        "mass kept: share of dense attention's weight on kept blocks and anchors; 1% row: one query in a hundred keeps less",
        "rank corr: Spearman's, compressed block scores with true block masses; out error: |sparse - dense| / |dense|",
        "on block 0: true weight on the first block (attention sinks), and the share of it that sparse attention keeps",
    ]
    return "\n".join(lines)


def _all_heads(audit: ModelAudit) -> str:
    lines = ["every head", f"{'layer':>5}{'head':>6}" + "".join(f"{heading:>{width}}" for heading, width in COLUMNS)]
    return "\n".join(lines + [f"{head.layer:>5}{head.head:>6}" + _cells([head]) for head in audit.heads])


def _worst_heads(audit: ModelAudit) -> str:
    heads = "; ".join(f"layer {h.layer} head {h.head} (error {h.output_error:.1%}, mass kept {h.mass_kept:.1%})" for h in audit.worst_heads)
    return f"worst layers: {', '.join(map(str, audit.worst_layers))}\nworst heads:  {heads}"


def _trials(audit: ModelAudit) -> str:
    lines = [
        f"tried on layers {', '.join(map(str, audit.worst_layers))}, the most promising also on the whole model",
        f"  {'change':<34}{'density':>9}{'mass kept':>11}{'out error':>11}{'KL, whole model':>18}{'agreement':>11}",
        f"  {'(none)':<34}{audit.worst_density:>9.1%}{audit.worst_mass_kept:>11.1%}{audit.worst_output_error:>11.1%}"
        f"{audit.predictions.kl_mean:>18.4f}{audit.predictions.top1_agreement:>11.1%}",
    ]
    return "\n".join(lines + [_trial_line(trial) for trial in audit.trials])


def _trial_line(trial: Trial) -> str:
    line = f"  {trial.flags:<34}{trial.density:>9.1%}{trial.mass_kept:>11.1%}{trial.output_error:>11.1%}"
    if trial.predictions is None:
        return line
    return line + f"{trial.predictions.kl_mean:>18.4f}{trial.predictions.top1_agreement:>11.1%}"


def _cells(heads: Sequence[HeadStatistics]) -> str:
    """Means over heads under COLUMNS; a dash where there is no number."""
    sink, sink_kept = _mean("sink_mass", heads), _mean("sink_mass_kept", heads)
    texts = (
        f"{_mean('density', heads):.1%}",
        f"{_mean('mass_kept', heads):.1%}",
        f"{_mean('mass_kept_p1', heads):.1%}",
        f"{_mean('rank_correlation', heads):.2f}",
        f"{_mean('output_error', heads):.1%}",
        f"{sink:.1%}",
        f"{sink_kept / sink:.1%}" if sink > 0 else "-",
    )
    return "".join(f"{'-' if 'nan' in text else text:>{width}}" for text, (_, width) in zip(texts, COLUMNS, strict=True))


def _mean(name: str, heads: Sequence[HeadStatistics]) -> float:
    """Over the heads that have the number."""
    values = np.array([getattr(head, name) for head in heads])
    return float(values[np.isfinite(values)].mean()) if np.isfinite(values).any() else float("nan")
