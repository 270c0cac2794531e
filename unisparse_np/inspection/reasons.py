"""Why a block is kept: which rule of step 4, or what step 5 forces."""

from __future__ import annotations

import enum

import numpy as np

from .. import reference
from ..problem import Problem


class Reason(enum.IntFlag):
    """Reasons add up: a block can be chosen by its score and forced as well."""

    NONE = 0  # dropped, or not visible
    TOP_P = 1
    ROW_THRESHOLD = 2
    SINK = 4
    LOCAL = 8
    DIAGONAL = 16


NAMES = {
    Reason.TOP_P: "Top-P",
    Reason.ROW_THRESHOLD: "row threshold",
    Reason.SINK: "forced: sink",
    Reason.LOCAL: "forced: local",
    Reason.DIAGONAL: "forced: diagonal",
}


def reasons_of(mask: np.ndarray, mean: np.ndarray, peak: np.ndarray | None, problem: Problem) -> np.ndarray:
    """mask [Hq, Nq, Nk] bool as a backend selected it, mean, peak [Hc, Nq, Nk] -> [Hq, Nq, Nk] uint8 of Reason.

    The rules are applied to the scores again; a block that only the backend's rounding lets in counts as chosen by Top-P,
    or by the row threshold where Top-P is off.
    """
    config = problem.config
    visible = reference.select.visible_blocks(problem)  # [Nq, Nk]
    reasons = np.zeros(mean.shape, dtype=np.uint8)  # [Hc, Nq, Nk]
    if config.top_p is not None:
        reasons[reference.select.top_p_prefix(mean, visible, config.top_p)] |= np.uint8(Reason.TOP_P)
    if config.row_threshold is not None:
        assert peak is not None, "the row threshold needs the peak scores of step 3"
        reasons[(peak > reference.select.per_head(config.row_threshold, peak.dtype)) & visible] |= np.uint8(Reason.ROW_THRESHOLD)
    for i in range(problem.num_q_blocks):
        sink_stop, local_start, local_stop = problem.forced_blocks(i)
        reasons[:, i, :sink_stop] |= np.uint8(Reason.SINK)
        if problem.causal:
            diagonal = problem.query_positions(i)[0] // config.block_size
            reasons[:, i, local_start:diagonal] |= np.uint8(Reason.LOCAL)
            reasons[:, i, diagonal:local_stop] |= np.uint8(Reason.DIAGONAL)
    reasons = np.repeat(reasons, config.head_compress, axis=0)  # [Hq, Nq, Nk]
    by_rounding = Reason.TOP_P if config.top_p is not None else Reason.ROW_THRESHOLD
    return np.where(mask, np.where(reasons == 0, by_rounding, reasons), 0).astype(np.uint8)


def reason_text(reason: int) -> str:
    """Such as "Top-P, forced: sink"; "dropped" for none."""
    return ", ".join(name for flag, name in NAMES.items() if reason & flag) or "dropped"
