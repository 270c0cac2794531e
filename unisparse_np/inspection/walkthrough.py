"""One query block of one head through every step of ALGORITHM.md, with the numbers kept for showing.

The stages are the reference's own functions, on the q, k and v that the model computed for a real prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .. import reference
from ..config import UniSparseConfig
from ..model.llama import Attention, Llama, Progress
from ..problem import Problem, ceil_div
from ..reference.scores import compressed_attention
from ..trace import Trace
from .costs import StepCost, at_length, step_costs
from .prompt import one_of, per_layer, sparse_configs, sparse_layer
from .reasons import Reason, reason_text, reasons_of
from .true_attention import attention_weights, mass_per_block

LONG_PROMPT = 128 * 1024


@dataclass(frozen=True)
class Walkthrough:
    """Everything explain prints. N is the number of visible key blocks, c the composite keys visible to the block.

    Attributes:
        layer, head, kv_head, block: what was picked; block counts query blocks from the start of the prompt.
        problem: the query block against the keys up to its end, all heads.
        layer_problem: the whole prompt at this layer, all heads, for costs.
        density: of the whole layer.
        value_bytes: size of one number of q, k and v where the model runs.
        first, last: positions of the block's queries.
        q [rows, d], k [keys, d], qc [composites, d], kc [c, d]: tokens and composite tokens (step 1).
        attention [composites, c]: compressed attention (step 2); hidden composites hold 0.
        coarse_attention [coarse composites, coarse c]: the same over the coarse composite tokens that Top-P reads; None where it
            reads those above.
        scores [N]: B of the block (step 3); peaks [N]: R, or None when the row rule is off.
        order [N]: key blocks by score, the highest first; running [N]: the sum of scores along it.
        reasons [N]: why each block is kept, Reason.NONE where it is dropped (steps 4 and 5).
        true_mass [N]: what dense attention gives each block, mean over the queries.
        positions [n]: the keys that the block may attend to: those of kept blocks, and the anchors of the others.
        mass_kept [rows]: share of each query's true attention that is kept.
        sparse, dense [rows, d]: outputs.
    """

    layer: int
    head: int
    kv_head: int
    block: int
    problem: Problem
    layer_problem: Problem
    density: float
    value_bytes: int
    first: int
    last: int
    q: np.ndarray
    k: np.ndarray
    qc: np.ndarray
    kc: np.ndarray
    attention: np.ndarray
    coarse_attention: np.ndarray | None
    scores: np.ndarray
    peaks: np.ndarray | None
    order: np.ndarray
    running: np.ndarray
    reasons: np.ndarray
    true_mass: np.ndarray
    positions: np.ndarray
    mass_kept: np.ndarray
    sparse: np.ndarray
    dense: np.ndarray

    @property
    def config(self) -> UniSparseConfig:
        """The layer's config."""
        return self.problem.config

    @property
    def kept(self) -> np.ndarray:
        """[N] bool: the selected blocks."""
        return self.reasons != Reason.NONE

    @property
    def top_p_blocks(self) -> int:
        """How many blocks of `order` Top-P keeps; 0 when the rule is off."""
        return int((self.reasons & Reason.TOP_P != 0).sum())

    @property
    def output_error(self) -> float:
        """|sparse - dense| / |dense| over the block."""
        return float(np.linalg.norm(self.sparse - self.dense) / np.linalg.norm(self.dense))

    def costs(self) -> dict[int, list[StepCost]]:
        """Tokens -> the cost of each step of the layer, for this prompt and for a long one."""
        problems = (self.layer_problem, at_length(self.layer_problem, LONG_PROMPT))
        return {problem.q_len: step_costs(problem, self.density, self.value_bytes) for problem in problems}

    def as_dict(self) -> dict[str, Any]:
        """The numbers as plain values for JSON, key blocks in their own order."""
        rank = np.argsort(self.order, kind="stable") + 1  # [N]
        blocks = [
            {
                "block": j,
                "score": float(self.scores[j]),
                "peak": None if self.peaks is None else float(self.peaks[j]),
                "rank": int(rank[j]),
                "running_sum": float(self.running[rank[j] - 1]),
                "true_mass": float(self.true_mass[j]),
                "kept_by": reason_text(int(self.reasons[j])),
            }
            for j in range(len(self.scores))
        ]
        return {
            "layer": self.layer,
            "head": self.head,
            "kv_head": self.kv_head,
            "block": self.block,
            "first": self.first,
            "last": self.last,
            "config": asdict(self.config),
            "key_blocks": blocks,
            "keys_attended": len(self.positions),
            "mass_kept": float(self.mass_kept.mean()),
            "mass_kept_lowest": float(self.mass_kept.min()),
            "output_error": self.output_error,
            "layer_density": self.density,
            "costs": {str(tokens): [asdict(cost) for cost in costs] for tokens, costs in self.costs().items()},
        }


def walk(
    model: Llama,
    token_ids: Sequence[int],
    attention: Attention,
    *,
    layer: int | None = None,
    head: int = 0,
    block: int = -1,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Walkthrough:
    """Read the prompt with this attention and walk through one query block.

    Args:
        layer: None for the middle one of the sparse layers; negative numbers count from the last, as for head and block.

    Raises:
        InvalidInput: no sparse layer, a layer that is dense, or a layer, head or block out of range.
    """
    layer, head, block = pick(model, token_ids, attention, layer, head, block)
    config = per_layer(attention, model.config.num_hidden_layers)[layer]
    assert isinstance(config, UniSparseConfig)
    recorder = _BlockRecorder(model.backend, layer, block * config.block_size, config.block_size)
    cache = model.new_cache(len(token_ids), attention)
    model.prefill(token_ids, cache, attention, chunk_size=chunk_size, progress=progress, observer=recorder)
    q, k, v = recorder.qkv
    heads, kv_heads, head_dim = q.shape[0], k.shape[0], q.shape[2]
    layer_problem = Problem(heads, kv_heads, len(token_ids), len(token_ids), head_dim, config)
    return _walk(q, k, v, layer_problem, layer, head, block, model.layer_densities(cache)[layer], recorder.value_bytes)


def pick(model: Llama, token_ids: Sequence[int], attention: Attention, layer: int | None, head: int, block: int) -> tuple[int, int, int]:
    """(layer, head, block), checked and counted from the front. Raises as `walk`."""
    shape = model.config
    configs = sparse_configs(attention, shape.num_hidden_layers)
    layer = list(configs)[len(configs) // 2] if layer is None else sparse_layer(layer, configs, shape.num_hidden_layers)
    blocks = ceil_div(len(token_ids), configs[layer].block_size)
    return layer, one_of("--head", head, shape.num_attention_heads), one_of("--block", block, blocks)


def _walk(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, layer_problem: Problem, layer: int, head: int, block: int, density: float, value_bytes: int
) -> Walkthrough:
    """q [Hq, rows, d] of the block; k, v [Hkv, keys, d] up to the block's end."""
    config = layer_problem.config
    problem = layer_problem.of_query_blocks(block, block + 1)
    problem = replace(problem, k_len=k.shape[1])
    first, last = problem.query_positions(0)
    kv_head, composite_head = head // problem.group_size, head // config.head_compress

    qc, kc = reference.compress(q, k, problem)  # [Hc, composites, d], [Hkc, c, d]
    attention = compressed_attention(qc, kc, 0, problem)[composite_head]  # [composites, c]
    coarse_attention = None
    if config.top_p_compress is not None:
        coarse = reference.coarse_composites(qc, kc, problem)
        coarse_attention = compressed_attention(*coarse, 0, problem.of_top_p())[composite_head]  # [coarse composites, coarse c]
    mean, peak = reference.score_blocks(qc, kc, problem)  # [Hc, 1, N]
    mask = reference.select_blocks(mean, peak, problem)  # [Hq, 1, N]
    scores = mean[composite_head, 0]  # [N]
    order = np.argsort(-scores, kind="stable")  # [N]

    anchors = reference.find_anchors(k, config.block_size, config.key_anchors)[kv_head]  # [N, r]
    positions = reference.attend.attended_positions(mask[head, 0], anchors, 0, problem)  # [n]
    one = slice(head, head + 1)
    scaled = reference.attend.scaled(q[one], problem)  # [1, rows, d]
    sparse, _ = reference.attend.attend_block(scaled, k[kv_head], v[kv_head], positions, 0, problem)  # [1, rows, d]
    dense, _ = reference.attend.attend_block(scaled, k[kv_head], v[kv_head], np.arange(k.shape[1]), 0, problem)
    weights = attention_weights(q[head], k[kv_head], 0, problem, np)  # [rows, keys]
    return Walkthrough(
        layer=layer,
        head=head,
        kv_head=kv_head,
        block=block,
        problem=problem,
        layer_problem=layer_problem,
        density=density,
        value_bytes=value_bytes,
        first=first,
        last=last,
        q=q[head],
        k=k[kv_head],
        qc=qc[composite_head],
        kc=kc[composite_head // problem.heads_per_composite_kv_head],
        attention=attention,
        coarse_attention=coarse_attention,
        scores=scores,
        peaks=None if peak is None else peak[composite_head, 0],
        order=order,
        running=np.cumsum(scores[order], dtype=np.float64),
        reasons=reasons_of(mask, mean, peak, problem)[head, 0],
        true_mass=mass_per_block(weights, config.block_size, np).mean(axis=0),
        positions=positions,
        mass_kept=weights[:, positions].sum(axis=1),
        sparse=sparse[0],
        dense=dense[0],
    )


class _BlockRecorder:
    """An observer that keeps one query block's q, and k, v up to its end, at one layer, on the host."""

    def __init__(self, backend: Any, layer: int, first: int, block_size: int) -> None:
        self._backend, self._layer, self._first, self._block_size = backend, layer, first, block_size
        self.qkv: tuple[np.ndarray, ...] = ()
        self.value_bytes = 0

    def __call__(self, layer: int, q: Any, k: Any, v: Any, out: Any, trace: Trace) -> None:
        chunk_start = k.shape[1] - q.shape[1]
        row = self._first - chunk_start
        if layer == self._layer and 0 <= row < q.shape[1]:
            rows, stop = slice(row, row + self._block_size), self._first + self._block_size
            self.value_bytes = int(q.dtype.itemsize)
            self.qkv = tuple(wide(self._backend.as_numpy(x)) for x in (q[:, rows], k[:, :stop], v[:, :stop]))


def wide(x: np.ndarray) -> np.ndarray:
    """A copy in float32, or float64 where it was."""
    return np.array(x, dtype=np.promote_types(x.dtype, np.float32) if x.dtype.kind == "f" else np.float32)
