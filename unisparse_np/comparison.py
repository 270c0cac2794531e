"""Compare a backend with the reference, stage by stage, by ALGORITHM.md's "Comparing backends".

`TOLERANCES` is the project's only table of tolerances. Each stage is fed the reference's output of the stage before, so
errors never compound and a fault has an address.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from . import reference
from .arrays import check_array, dtype_name
from .attention import load_backend, problem_of
from .config import UniSparseConfig
from .errors import InvalidInput
from .problem import KeySummary, Problem


@dataclass(frozen=True)
class Tolerance:
    """How far a result in one dtype may lie from the float64 reference.

    Attributes:
        scores: absolute, for composite tokens and block scores, and the half-width of the band in which a mask may differ.
        norms: relative, between two key norms that may swap places as anchors.
        output: absolute, for attention outputs on the same mask and their log-sum-exp; None for 16-bit input, where the
            rule for outputs is twice the error of a plain 16-bit computation of the same thing, and lse follows scores.
        logits: relative to the largest logit, after a whole model.
    """

    scores: float
    norms: float
    output: float | None
    logits: float


# float64: sums of up to 1e5 terms of size 1 at eps 2.2e-16. float32: the same sums at eps 6e-8, pairwise or blocked.
# 16 bits: eps 2^-8 (bfloat16) on logits of size 1, averaged over the composites of a block.
TOLERANCES = {
    "float64": Tolerance(scores=1e-12, norms=1e-12, output=1e-10, logits=1e-10),
    "float32": Tolerance(scores=1e-5, norms=1e-5, output=1e-5, logits=1e-4),
    "float16": Tolerance(scores=1e-3, norms=1e-3, output=None, logits=2e-2),
    "bfloat16": Tolerance(scores=1e-3, norms=1e-3, output=None, logits=5e-2),
}
LOGIT_SIZE, VALUE_SIZE = 32.0, 8.0  # what the absolute bounds on outputs are for: beyond normal random q, k and v
PLAIN_ERROR_FACTOR = 2.0  # a fast 16-bit path may err this many times as much as a plain one


@dataclass(frozen=True)
class StageReport:
    """One stage of one backend against the reference.

    Attributes:
        stage: its name in the four-stage contract.
        error: the largest deviation found (for masks and anchors: entries that no rounding explains).
        allowed: the bound on it.
        detail: what was compared, in words.
    """

    stage: str
    error: float
    allowed: float
    detail: str

    @property
    def ok(self) -> bool:
        """Whether the stage is inside its bound (NaN is not)."""
        return self.error <= self.allowed


@dataclass(frozen=True)
class AuditReport:
    """All stages of one backend on one problem."""

    backend: str
    problem: Problem
    dtype: str
    stages: tuple[StageReport, ...]

    @property
    def ok(self) -> bool:
        """Whether every stage agrees."""
        return all(stage.ok for stage in self.stages)

    def __str__(self) -> str:
        lines = [f"{self.backend}, {self.dtype}, against the float64 reference"]
        for s in self.stages:
            lines.append(f"  {'ok ' if s.ok else 'BAD'} {s.stage:<18} {s.error:9.2e} (allowed {s.allowed:.2e})  {s.detail}")
        return "\n".join(lines)


def audit(
    q: Any,
    k: Any,
    v: Any,
    config: UniSparseConfig | None = None,
    *,
    backend: str = "reference",
    causal: bool = True,
    q_offset: int | None = None,
    scale: float | None = None,
) -> AuditReport:
    """Run every stage of a backend on the reference's input to it, and compare with the reference in float64.

    q [Hq, Lq, d], k, v [Hkv, Lk, d] (no batch); see unisparse_attention for the arguments.

    Raises:
        InvalidInput, BackendUnavailable: as unisparse_attention does.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(name, x)
        if len(x.shape) != 3:
            raise InvalidInput(f"{name} {tuple(x.shape)} is not [heads, tokens, head_dim]: audit one item of a batch at a time")
    config = UniSparseConfig() if config is None else config
    problem = problem_of(q, k, v, config, causal, q_offset, scale)
    engine = load_backend(backend)
    dtype = dtype_name(q)
    engine_q, engine_k, engine_v = (engine.from_any(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    engine.check_finite(engine_q, engine_k, engine_v, problem)
    q64, k64, v64 = (np.asarray(engine.as_numpy(x)).astype(np.float64) for x in (engine_q, engine_k, engine_v))
    qc, kc = reference.compress(q64, k64, problem)
    mean, peak = reference.score_blocks(qc, kc, problem)
    mask = reference.select_blocks(mean, peak, problem)
    out, lse = reference.sparse_attention(q64, k64, v64, mask, problem)
    anchors = reference.find_anchors(k64, config.block_size, config.key_anchors)
    tolerance = TOLERANCES[dtype]
    allowed_lse = (tolerance.scores if tolerance.output is None else tolerance.output) * room_for_large_logits(q64, k64, problem)

    def given(x: np.ndarray) -> Any:
        return engine.from_any("stage input", x if dtype == "float64" else x.astype(np.float32))

    engine_qc, engine_kc = engine.compress(engine_q, engine_k, problem)
    composites = (engine.as_composites(given(x), problem, engine_q.dtype) for x in (qc, kc))
    engine_mean, engine_peak = engine.score_blocks(*composites, problem)
    engine_mask = engine.select_blocks(given(mean), None if peak is None else given(peak), problem)
    summary = KeySummary(given(kc), engine.xp.asarray(anchors))
    engine_out, engine_lse = engine.sparse_attention(engine_q, engine_k, engine_v, engine.xp.asarray(mask), problem, summary)
    engine_anchors = engine.find_anchors(engine_k, config.block_size, config.key_anchors)
    as_numpy = engine.as_numpy
    stages = [
        compare_values("compress", (as_numpy(engine_qc), as_numpy(engine_kc)), (qc, kc), tolerance.scores, "composite tokens"),
        compare_scores(as_numpy(engine_mean), None if peak is None else as_numpy(engine_peak), mean, peak, tolerance),
        compare_masks(as_numpy(engine_mask), mask, mean, peak, problem, tolerance.scores),
        compare_anchors(as_numpy(engine_anchors), anchors, k64, tolerance.norms),
        compare_outputs(as_numpy(engine_out), (q64, k64, v64), out, mask, problem, dtype),
        compare_values("log-sum-exp", (as_numpy(engine_lse),), (lse,), allowed_lse, "lse"),
    ]
    return AuditReport(backend, problem, dtype, tuple(stages))


def compare_values(stage: str, found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...], allowed: float, detail: str) -> StageReport:
    """Largest absolute difference over pairs of arrays."""
    return StageReport(stage, max(largest_difference(a, b) for a, b in zip(found, expected, strict=True)), allowed, detail)


def compare_scores(
    mean: np.ndarray, peak: np.ndarray | None, expected_mean: np.ndarray, expected_peak: np.ndarray | None, tolerance: Tolerance
) -> StageReport:
    """Block scores mean and (where the row rule is on) peak, [Hc, Nq, Nk]."""
    found, expected = [mean], [expected_mean]
    if expected_peak is not None:
        assert peak is not None, "the row rule is on, but the backend gave no peak"
        found, expected = [mean, peak], [expected_mean, expected_peak]
    return compare_values("score_blocks", tuple(found), tuple(expected), tolerance.scores, "mean" if peak is None else "mean and peak")


def compare_masks(
    mask: np.ndarray, expected: np.ndarray, mean: np.ndarray, peak: np.ndarray | None, problem: Problem, eps: float
) -> StageReport:
    """Masks [Hq, Nq, Nk] may differ only where the decision lies inside rounding; mean, peak [Hc, Nq, Nk] are the reference's.

    Under Top-P a block may differ if its score is within eps of the last kept block's, or if the running sum at which it
    enters, or the one before, is within n * eps of P (n blocks summed so far); under the row rule if its peak is within eps
    of tau.
    """
    undecided = np.zeros(mean.shape, dtype=bool)  # [Hc, Nq, Nk]
    if problem.config.top_p is not None:
        undecided |= _undecided_by_top_p(mean, problem, eps)
    if problem.config.row_threshold is not None:
        assert peak is not None
        tau = np.asarray(problem.config.row_threshold, dtype=float).reshape(-1, 1, 1)
        undecided |= np.abs(peak - tau) <= eps
    undecided &= ~reference.select.forced_blocks(problem) & reference.select.visible_blocks(problem)
    differs = mask != expected
    unexplained = differs & ~np.repeat(undecided, problem.config.head_compress, axis=0)
    return StageReport("select_blocks", float(unexplained.sum()), 0.0, f"{int(differs.sum())} of {mask.size} blocks differ inside rounding")


def compare_anchors(anchors: np.ndarray, expected: np.ndarray, k: np.ndarray, eps: float) -> StageReport:
    """Anchors [Hkv, Nk, r] may differ only where the norms of the two keys agree to eps, relative; k [Hkv, Lk, d] in float64."""
    norms = np.linalg.norm(k, axis=-1)  # [Hkv, Lk]
    heads = np.arange(k.shape[0])[:, None, None]
    found_norms, expected_norms = norms[heads, anchors], norms[heads, expected]
    close = np.abs(found_norms - expected_norms) <= eps * expected_norms
    wrong = ((anchors < 0) != (expected < 0)) | ((anchors != expected) & ~close)
    return StageReport(
        "find_anchors", float(wrong.sum()), 0.0, f"{int((anchors != expected).sum())} of {anchors.size} anchors differ inside rounding"
    )


def compare_outputs(
    out: np.ndarray, qkv: tuple[np.ndarray, np.ndarray, np.ndarray], expected: np.ndarray, mask: np.ndarray, problem: Problem, dtype: str
) -> StageReport:
    """out [Hq, Lq, d] of step 6 against float64 on the same mask; qkv in float64.

    16-bit input: the error may be twice that of a plain 16-bit computation (`plain_attention`). Otherwise the absolute bound
    is for values of size 1 and logits of size LOGIT_SIZE, and grows with both.
    """
    allowed = TOLERANCES[dtype].output
    if allowed is not None:
        q, k, v = qkv
        allowed *= room_for_large_logits(q, k, problem) * max(1.0, float(np.abs(v).max()) / VALUE_SIZE)
        return compare_values("sparse_attention", (out,), (expected,), allowed, "out on the same mask")
    plain = plain_attention(*qkv, mask, problem, dtype)
    allowed = PLAIN_ERROR_FACTOR * largest_difference(plain, expected)
    return compare_values("sparse_attention", (out,), (expected,), allowed, "out on the same mask, against 2x plain 16-bit")


def room_for_large_logits(q: np.ndarray, k: np.ndarray, problem: Problem) -> float:
    """How many times larger than LOGIT_SIZE the logits can be, at least 1: q [Hq, Lq, d], k [Hkv, Lk, d].

    A float keeps so many digits of a logit, and what it loses moves the softmax in proportion. Real models reach logits
    of several hundred where random inputs stay near 10.
    """
    largest = float(np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()) * abs(float(problem.scale or 0.0))
    return max(1.0, largest / LOGIT_SIZE)


def plain_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, mask: np.ndarray, problem: Problem, dtype: str) -> np.ndarray:
    """Step 6 as a plain 16-bit program computes it: products of 16-bit numbers summed in float32, weights rounded to 16 bits.

    q [Hq, Lq, d], k, v [Hkv, Lk, d], mask [Hq, Nq, Nk] -> out [Hq, Lq, d], rounded to 16 bits and widened again.
    """
    half = np.dtype(ml_dtypes.bfloat16) if dtype == "bfloat16" else np.dtype(np.float16)
    anchors = reference.find_anchors(k, problem.config.block_size, problem.config.key_anchors)
    out = np.empty(q.shape, np.float32)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    for head in range(problem.num_q_heads):
        kv_head = head // problem.group_size
        for i in range(problem.num_q_blocks):
            rows = slice(*problem.query_range(i))
            positions = reference.attend.attended_positions(mask[head, i], anchors[kv_head], i, problem)
            scores = (q[head, rows] @ k[kv_head, positions].T) * np.float32(problem.scale)
            if problem.causal and positions.size:
                reference.attend.hide_future(scores[None], positions, problem.query_positions(i)[0])
            highest = scores.max(axis=1, keepdims=True, initial=np.float32(-1e30))
            weights = np.exp(scores - highest)
            total = weights.sum(axis=1, keepdims=True)
            rounded = weights.astype(half).astype(np.float32)
            values = rounded @ v[kv_head, positions] / np.where(total == 0, np.float32(1), total)
            out[head, rows] = values.astype(half).astype(np.float32)
    return out


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest absolute difference in float64; equal infinities differ by 0, a NaN on one side by infinity."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        difference = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))


def _undecided_by_top_p(mean: np.ndarray, problem: Problem, eps: float) -> np.ndarray:
    """[Hc, Nq, Nk]: blocks whose place in or out of the Top-P prefix lies inside rounding."""
    share = np.asarray(problem.config.top_p, dtype=float).reshape(-1, 1, 1)
    visible = reference.select.visible_blocks(problem)
    kept = reference.select.top_p_prefix(mean, visible, problem.config.top_p)
    last_kept = np.where(kept, mean, np.inf).min(axis=-1, keepdims=True)  # [Hc, Nq, 1]
    order = np.argsort(-np.where(visible, mean, -1.0), axis=-1, kind="stable")
    running = np.cumsum(np.take_along_axis(np.where(visible, mean, 0.0), order, axis=-1), axis=-1)
    before = running - np.take_along_axis(np.where(visible, mean, 0.0), order, axis=-1)
    band = np.arange(1, mean.shape[-1] + 1) * eps
    near_sorted = (np.abs(running - share) <= band) | (np.abs(before - share) <= band)
    near = np.empty_like(near_sorted)
    np.put_along_axis(near, order, near_sorted, axis=-1)
    return (near | (np.abs(mean - last_kept) <= eps)) & (share < 1.0)
