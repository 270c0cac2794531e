"""The stage audit as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from ..comparison import TOLERANCES, AuditReport


def stage_table(reports: Sequence[tuple[str, AuditReport]]) -> str:
    """One line an input, one column a stage; then every stage out of bounds in full, then the tolerances."""
    stages = [stage.stage for stage in reports[0][1].stages]
    head = f"{'inputs':<26}{'dtype':<10}" + "".join(f"{name:>18}" for name in stages)
    lines = [f"{reports[0][1].backend} against the float64 reference: the largest error of each stage (! out of bounds)", "", head]
    for label, report in reports:
        cells = (f"{stage.error:.1e}{' ' if stage.ok else '!'}" for stage in report.stages)
        lines.append(f"{label:<26}{report.dtype:<10}" + "".join(f"{cell:>18}" for cell in cells).rstrip())
    bad = [(label, report) for label, report in reports if not report.ok]
    lines += [f"\n{label}: {report}" for label, report in bad]
    lines += ["", tolerance_table(), "", f"{len(reports) - len(bad)} of {len(reports)} inputs agree"]
    return "\n".join(lines)


def tolerance_table() -> str:
    """What each column may err, by the dtype of q, k and v."""
    lines = ["allowed, by dtype of q, k, v"]
    lines.append(f"{'':<10}{'scores, absolute':>20}{'key norms, relative':>22}{'output, absolute':>26}")
    for dtype, allowed in TOLERANCES.items():
        output = "2x a plain 16-bit program" if allowed.output is None else f"{allowed.output:.0e}"
        lines.append(f"{dtype:<10}{allowed.scores:>20.0e}{allowed.norms:>22.0e}{output:>26}")
    lines.append("masks and anchors may differ only where a decision lies inside rounding of the scores or the norms")
    return "\n".join(lines)
