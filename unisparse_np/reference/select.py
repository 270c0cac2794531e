"""Steps 4 and 5 of ALGORITHM.md: keep the blocks that hold the mass, and those that are always kept."""

from __future__ import annotations

import numpy as np

from ..config import PerHead
from ..problem import Problem


def select_blocks(mean: np.ndarray, peak: np.ndarray | None, problem: Problem) -> np.ndarray:
    """Steps 4-5. mean, peak [Hc, Nq, Nk] -> mask [Hq, Nq, Nk] bool, composite heads repeated.

    peak is read only when the row threshold is on.
    """
    config = problem.config
    visible = visible_blocks(problem)  # [Nq, Nk]
    keep = np.zeros(mean.shape, dtype=bool)  # [Hc, Nq, Nk]
    if config.top_p is not None:
        keep |= top_p_prefix(mean, visible, config.top_p)
    if config.row_threshold is not None:
        assert peak is not None, "the row threshold needs the peak scores of step 3"
        keep |= (peak > per_head(config.row_threshold, peak.dtype)) & visible
    keep |= forced_blocks(problem)
    return np.repeat(keep, config.head_compress, axis=0)  # [Hq, Nq, Nk]


def top_p_prefix(mean: np.ndarray, visible: np.ndarray, top_p: PerHead) -> np.ndarray:
    """Step 4, Top-P: the shortest prefix of the visible blocks, highest score first, whose sum reaches top_p.

    mean [Hc, Nq, Nk], visible [Nq, Nk] -> [Hc, Nq, Nk] bool. Ties go to the lower index. The sum runs in float64.
    """
    share = per_head(top_p, np.dtype(np.float64))  # [Hc or 1, 1, 1]
    scores = np.where(visible, mean, -1.0)  # invisible blocks sort last
    order = np.argsort(-scores, axis=-1, kind="stable")  # [Hc, Nq, Nk]
    running = np.cumsum(np.take_along_axis(scores, order, axis=-1), axis=-1, dtype=np.float64)
    before = np.zeros_like(running)  # what the blocks ahead of this one hold
    before[..., 1:] = running[..., :-1]
    keep = np.empty(mean.shape, dtype=bool)
    np.put_along_axis(keep, order, before < share, axis=-1)
    return (keep | (share == 1.0)) & visible  # P = 1 keeps every visible block, whatever the sum rounds to


def visible_blocks(problem: Problem) -> np.ndarray:
    """[Nq, Nk] bool: key block j is visible to query block i."""
    counts = np.array([problem.visible_blocks(i) for i in range(problem.num_q_blocks)])
    return np.arange(problem.num_k_blocks) < counts[:, None]


def forced_blocks(problem: Problem) -> np.ndarray:
    """Step 5. [Nq, Nk] bool: the sink, local and diagonal blocks."""
    forced = np.zeros((problem.num_q_blocks, problem.num_k_blocks), dtype=bool)
    for i in range(problem.num_q_blocks):
        sink_stop, local_start, local_stop = problem.forced_blocks(i)
        forced[i, :sink_stop] = True
        forced[i, local_start:local_stop] = True
    return forced


def per_head(value: PerHead, dtype: np.dtype) -> np.ndarray:
    """One value, or one a composite head, shaped to meet [Hc, Nq, Nk]."""
    return np.asarray(value, dtype=dtype).reshape(-1, 1, 1)
