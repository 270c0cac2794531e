"""What sparse attention would keep of a layer's true attention, measured on the q, k, v that dense attention computed.

Every layer is judged by itself: its input carries no error of the layers before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import unisparse_attention
from ..config import UniSparseConfig
from ..problem import Problem
from ..trace import Trace
from .rank_correlation import spearman
from .true_attention import attention_weights, mass_per_block

BLOCKS_TO_RANK = 3  # fewer visible blocks rank alike by chance


@dataclass(frozen=True)
class HeadStatistics:
    """One query head of one layer over a whole prompt. Masses are shares of dense attention's weight, 0 to 1.

    Attributes:
        mass_kept: mean over rows (query tokens) of the weight on what sparse attention keeps.
        mass_kept_p1: the first percentile over rows: one row in a hundred keeps less.
        rank_correlation: Spearman's, of compressed scores with true block masses, mean over query blocks; NaN without any.
        density: selected and anchor share of the visible blocks.
        output_error: |sparse - dense| / |dense|, Euclidean norms over all rows.
        sink_mass: mean weight on the first block, over rows outside it; NaN without any.
        sink_mass_kept: how much of that is kept.
    """

    layer: int
    head: int
    mass_kept: float
    mass_kept_p1: float
    rank_correlation: float
    density: float
    output_error: float
    sink_mass: float
    sink_mass_kept: float


class SparseAttentionMeter:
    """An observer of a dense prefill (`Llama.prefill(observer=)`): runs sparse attention on the same q, k, v and compares.

    Holds one float32 a layer, head and token, and one query block's weights [block_size, tokens] at a time.

    Args:
        backend: the loaded backend of the model that is observed.
        configs: for each layer to watch, the configs to measure there.
    """

    def __init__(self, backend: Any, configs: Mapping[int, Sequence[UniSparseConfig]]) -> None:
        self._backend, self._configs = backend, configs
        self._totals: dict[tuple[int, int], list[_HeadTotals]] = {}

    def __call__(self, layer: int, q: Any, k: Any, v: Any, out: Any, trace: Trace) -> None:
        for number, config in enumerate(self._configs.get(layer, ())):
            totals = self._totals.setdefault((layer, number), [_HeadTotals() for _ in range(q.shape[0])])
            _measure(q, k, v, out, config, self._backend, totals)

    def statistics(self, layer: int, number: int = 0) -> list[HeadStatistics]:
        """One entry a head, for the layer's config of that number."""
        return [totals.statistics(layer, head) for head, totals in enumerate(self._totals[layer, number])]


class _HeadTotals:
    """Sums over query blocks, from which HeadStatistics follow."""

    def __init__(self) -> None:
        self.rows_kept: list[np.ndarray] = []  # [rows] each
        self.correlations: list[float] = []
        self.kept_blocks, self.visible_blocks = 0.0, 0
        self.squared_error, self.squared_output = 0.0, 0.0
        self.sink_rows, self.sink_mass, self.sink_mass_kept = 0, 0.0, 0.0

    def statistics(self, layer: int, head: int) -> HeadStatistics:
        rows_kept = np.concatenate(self.rows_kept)  # [tokens]
        return HeadStatistics(
            layer=layer,
            head=head,
            mass_kept=float(rows_kept.mean(dtype=np.float64)),
            mass_kept_p1=float(np.percentile(rows_kept, 1)),
            rank_correlation=float(np.mean(self.correlations)) if self.correlations else float("nan"),
            density=self.kept_blocks / self.visible_blocks,
            output_error=float(np.sqrt(self.squared_error / self.squared_output)) if self.squared_output else 0.0,
            sink_mass=self.sink_mass / self.sink_rows if self.sink_rows else float("nan"),
            sink_mass_kept=self.sink_mass_kept / self.sink_rows if self.sink_rows else float("nan"),
        )


def _measure(q: Any, k: Any, v: Any, out: Any, config: UniSparseConfig, backend: Any, totals: list[_HeadTotals]) -> None:
    """Add one chunk: q, out [Hq, T, d], k, v [Hkv, Lk, d], of dense attention; totals: one a head."""
    sparse_out, trace = unisparse_attention(q, k, v, config, backend=backend.name, return_trace=True)
    problem = Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], config)
    mask, mean, anchors = (backend.as_numpy(x) for x in (trace.mask, trace.mean, trace.anchors))
    exact, approximate = (backend.as_numpy(x).astype(np.float64) for x in (out, sparse_out))
    for head, total in enumerate(totals):
        total.squared_error += float(np.square(approximate[head] - exact[head]).sum())
        total.squared_output += float(np.square(exact[head]).sum())
        kv_head = head // problem.group_size
        for i in range(problem.num_q_blocks):
            rows = slice(*problem.query_range(i))
            weights = attention_weights(q[head, rows], k[kv_head], i, problem, backend.xp)  # [rows, keys]
            _add_query_block(total, weights, mask[head, i], anchors[kv_head], mean[head // config.head_compress, i], i, problem, backend)


def _add_query_block(
    total: _HeadTotals, weights: Any, selected: np.ndarray, anchors: np.ndarray, scores: np.ndarray, i: int, problem: Problem, backend: Any
) -> None:
    """weights [rows, keys], selected [Nk] bool, anchors [Nk, r], scores [Nk] (B of step 3)."""
    config = problem.config
    visible = problem.visible_blocks(i)
    mass = backend.as_numpy(mass_per_block(weights, config.block_size, backend.xp))  # [rows, visible]
    selected = selected[:visible]
    lone_anchors = anchors[:visible][~selected]  # [dropped, r]
    lone_anchors = lone_anchors[(lone_anchors >= 0) & (lone_anchors < problem.visible_keys(i))]
    anchor_weights = backend.as_numpy(weights[:, backend.xp.asarray(lone_anchors)])  # [rows, anchors]
    total.rows_kept.append((mass[:, selected].sum(axis=1) + anchor_weights.sum(axis=1)).astype(np.float32))
    kept = int(selected.sum())
    total.kept_blocks += config.kept_blocks(kept, visible)
    total.visible_blocks += visible
    if visible >= BLOCKS_TO_RANK:
        correlation = spearman(scores[:visible], mass.mean(axis=0))
        if np.isfinite(correlation):
            total.correlations.append(correlation)
    if problem.query_positions(i)[0] >= config.block_size:
        in_first = lone_anchors < config.block_size
        total.sink_rows += len(mass)
        total.sink_mass += float(mass[:, 0].sum())
        total.sink_mass_kept += float(mass[:, 0].sum() if selected[0] else anchor_weights[:, in_first].sum())
