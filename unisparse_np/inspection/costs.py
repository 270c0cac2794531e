"""What each step of one layer costs, in operations and in bytes moved, for any prompt length (ALGORITHM.md, "Cost")."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ..problem import Problem

SCORE_BYTES = 4  # block scores are float32 on every backend


@dataclass(frozen=True)
class StepCost:
    """One step of one layer, all heads.

    Attributes:
        step: its name.
        shape: of what it makes, in words.
        flop: additions and multiplications; for select, comparisons of a sort.
        bytes: read and written once, each query block reading the keys it attends to.
    """

    step: str
    shape: str
    flop: float
    bytes: float


def at_length(problem: Problem, tokens: int) -> Problem:
    """The same layer reading a whole prompt of this many tokens."""
    return replace(problem, q_len=tokens, k_len=tokens, q_offset=None if not problem.causal else 0)


def step_costs(problem: Problem, density: float, value_bytes: int) -> list[StepCost]:
    """The steps of sparse attention, then dense attention for comparison.

    density: share of the visible blocks that is attended to; value_bytes: size of one number of q, k, v and out.
    """
    p, d = problem, problem.head_dim
    tokens = (p.num_q_heads * p.q_len + p.num_kv_heads * p.k_len) * d  # numbers of q and k
    scored = [p] if p.config.top_p_compress is None else [p.of_row_threshold(), p.of_top_p()]  # the compressed attentions
    made = [(s.num_composite_heads * s.num_q_composites + s.num_composite_kv_heads * s.num_k_composites) * d for s in scored]
    composites = sum(made)
    pairs = p.num_composite_heads * sum(s.visible_composites(t) for s in scored for t in range(s.num_q_composites))
    blocks = p.num_composite_heads * sum(p.visible_blocks(i) for i in range(p.num_q_blocks))
    seen = p.num_q_heads * sum(p.visible_keys(i) for i in range(p.num_q_blocks))  # keys read, once a query block
    products = p.num_q_heads * (p.q_len * p.k_len - p.q_len * (p.q_len - 1) / 2 if p.causal else p.q_len * p.k_len)
    in_and_out = 2 * p.num_q_heads * p.q_len * d * value_bytes
    row = p.visible_blocks(p.num_q_blocks - 1)
    return [
        StepCost(
            "1 compress",
            f"q~ [{p.num_composite_heads}, {_and(s.num_q_composites for s in scored)}, {d}], "
            f"k~ [{p.num_composite_kv_heads}, {_and(s.num_k_composites for s in scored)}, {d}]",
            tokens + sum(made[:-1]),  # coarse composites are means of the others
            tokens * value_bytes + composites * SCORE_BYTES,
        ),
        StepCost(
            "2-3 score",
            f"A {_and(f'{s.num_q_composites} x {s.num_k_composites}' for s in scored)} a head -> "
            f"B [{p.num_composite_heads}, {p.num_q_blocks}, {p.num_k_blocks}]",
            pairs * 2 * d,
            (composites + len(scored) * blocks) * SCORE_BYTES,
        ),
        StepCost(
            "4-5 select",
            f"mask [{p.num_q_heads}, {p.num_q_blocks}, {p.num_k_blocks}]",
            blocks * max(1.0, math.log2(row)),
            blocks * (SCORE_BYTES + 1),
        ),
        StepCost(
            "6 attend",
            f"out [{p.num_q_heads}, {p.q_len}, {d}] at density {density:.3f}",
            density * products * 4 * d,
            in_and_out + density * seen * 2 * d * value_bytes,
        ),
        StepCost("dense", f"out [{p.num_q_heads}, {p.q_len}, {d}]", products * 4 * d, in_and_out + seen * 2 * d * value_bytes),
    ]


def _and(values: Iterable[object]) -> str:
    """1024 and 256"""
    return " and ".join(map(str, values))
