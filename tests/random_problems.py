"""Random problems for a GPU backend, and their judgement against the float64 reference by ALGORITHM.md's "Comparing backends".

Everything of a problem follows from its seed. tests/gpu runs some hundreds, benchmarks/random_problems_gpu.py thousands.
What kernels are compiled for (head_dim, block size, tokens of a composite) follows from seed % kernel_shapes alone, so that thousands of
problems do not compile thousands of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np

from unisparse_np import Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.comparison import (
    TOLERANCES,
    StageReport,
    compare_anchors,
    compare_masks,
    compare_outputs,
    compare_scores,
    compare_values,
    room_for_large_logits,
)
from unisparse_np.problem import KeySummary

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
LAYOUTS = ("[H, L, d]", "[L, H, d]", "amid NaN", "amid NaN, not aligned")
FEW_QUERIES = 16  # calls with so many split the keys
KERNEL_SHAPES = 47  # odd: even and odd seeds meet all of them
MOST_BLOCKS = {64: 10, 128: 8, 256: 4}  # keys of a problem, in blocks; of small ones 24
HEADS = [(1, 1), (2, 1), (1, 3), (2, 2), (4, 2), (3, 2), (7, 1), (12, 1), (1, 6)]  # query heads of a KV head, KV heads
SMALL = 8  # one kernel shape in so many has blocks that no tensor-core kernel takes


@dataclass(frozen=True)
class Case:
    """One problem, how its inputs lie in memory, and their values q [Hq, Lq, d], k, v [Hkv, Lk, d] in the dtype."""

    seed: int
    problem: Problem
    dtype: str
    layouts: tuple[str, ...]  # of q, k, v
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray

    def __str__(self) -> str:
        return f"seed {self.seed}: {self.problem}, {self.dtype}, {', '.join(self.layouts)}"


def random_case(seed: int, kernel_shapes: int = KERNEL_SHAPES) -> Case:
    """A problem that the tensor-core kernels take (not one in SMALL, nor one in sixteen in float32); one in eight with few queries."""
    rng, kernel_rng = np.random.default_rng(seed), np.random.default_rng(seed % kernel_shapes)
    small = seed % kernel_shapes % SMALL == SMALL - 1
    size = int(kernel_rng.choice([4, 12, 16, 32, 48] if small else [64, 128, 256]))
    head_dim = int(kernel_rng.choice([16, 32, 40, 64] if small else [64, 64, 128, 128, 128, 80, 96, 256]))
    k_len = int(rng.integers(1, MOST_BLOCKS.get(size, 24) * size))
    causal = bool(rng.integers(4))
    q_len = int(rng.integers(1, k_len + 1)) if causal else int(rng.integers(1, 4 * size))
    if rng.integers(8) == 0:
        q_len = min(q_len, int(rng.integers(1, FEW_QUERIES + 1)))
    q_offset = int(rng.integers(0, k_len - q_len + 1)) if causal and rng.integers(2) else None
    group, num_kv_heads = HEADS[rng.integers(len(HEADS))]
    config = _random_config(rng, kernel_rng, size, group, group * num_kv_heads)
    problem = Problem(group * num_kv_heads, num_kv_heads, q_len, k_len, head_dim, config, causal, q_offset)
    dtype = "float32" if rng.integers(16) == 0 else ["float16", "bfloat16"][rng.integers(2)]
    spread = float(rng.choice([0.3, 1.0, 4.0]))
    q, k, v = (
        (factor * rng.standard_normal((heads, length, head_dim), dtype=np.float32)).astype(DTYPES[dtype])
        for heads, length, factor in ((problem.num_q_heads, q_len, spread), (num_kv_heads, k_len, 1.0), (num_kv_heads, k_len, 1.0))
    )
    layouts = tuple(str(layout) for layout in rng.choice(LAYOUTS, 3))
    return Case(seed, problem, dtype, layouts, q, k, v)


def _random_config(rng: np.random.Generator, kernel_rng: np.random.Generator, size: int, group: int, heads: int) -> UniSparseConfig:
    legal = [c for c in range(1, heads + 1) if heads % c == 0 and (group % c == 0 or c % group == 0)]
    head_compress = int(rng.choice(legal))
    top_p: Any = float(rng.choice([0.1, 0.5, 0.9, 1.0]))
    row_threshold: Any = float(rng.choice([0.02, 0.1, 0.3]))
    if rng.integers(4) == 0:  # one value a composite head
        top_p = tuple(float(p) for p in rng.choice([0.2, 0.6, 0.95], heads // head_compress))
        row_threshold = tuple(float(p) for p in rng.choice([0.03, 0.2], heads // head_compress))
    rule = rng.integers(3)
    sizes = [c for c in (2, 4, 8, 16, 32) if size % c == 0]
    q_compress, k_compress = (int(kernel_rng.choice(sizes)) for _ in range(2))
    coarse = int(kernel_rng.choice([c for c in sizes if c % max(q_compress, k_compress) == 0]))
    return UniSparseConfig(
        block_size=size,
        q_compress=q_compress,
        k_compress=k_compress,
        head_compress=head_compress,
        top_p=top_p if rule != 1 else None,
        row_threshold=row_threshold if rule != 0 else None,
        key_anchors=int(rng.choice([0, 1, 1, 3, 8])),
        sink_blocks=int(rng.integers(3)),
        local_blocks=int(rng.integers(3)),
        top_p_compress=coarse if rule == 2 and rng.integers(2) else None,
    )


def on_device(x: np.ndarray, layout: str, cupy: Any) -> Any:
    """x [H, L, d] on the GPU, lying in memory as `layout` says; what surrounds it is NaN."""
    heads, length, dim = x.shape
    if layout == "[H, L, d]":
        return cupy.asarray(x)
    if layout == "[L, H, d]":
        return cupy.asarray(np.ascontiguousarray(x.transpose(1, 0, 2))).transpose(1, 0, 2)
    first = 3 if layout.endswith("not aligned") else 8
    room = np.full((heads + 1, length + 5, dim + 16), np.nan, x.dtype)
    room[:heads, 2 : 2 + length, first : first + dim] = x
    return cupy.asarray(room)[:heads, 2 : 2 + length, first : first + dim]


@dataclass
class Outcome:
    """What one problem showed.

    Attributes:
        kernel: the attention kernel that ran, as Trace.kernel says it.
        wrong: what is wrong, in words; nothing where all is well.
        reports: the stages against the reference, by name.
        differing: blocks of the mask that differ from the reference's, all of them inside rounding unless `wrong` says so.
        blocks: entries of the mask.
        repeats: what was run besides and found the same to the bit (or is in `wrong`).
    """

    kernel: str
    wrong: list[str]
    reports: dict[str, StageReport]
    differing: int
    blocks: int
    repeats: list[str]


def judge(case: Case, found: dict[str, np.ndarray | None]) -> tuple[list[StageReport], np.ndarray]:
    """The stages of one fused call against the reference: mean, peak, mask, anchors, out, lse as `found`; outputs on the found mask.

    Also returns the reference's own mask.
    """
    problem, tolerance = case.problem, TOLERANCES[case.dtype]
    q, k, v = (x.astype(np.float64) for x in (case.q, case.k, case.v))
    mean, peak = reference.score_blocks(*reference.compress(q, k, problem), problem)
    mask, given = reference.select_blocks(mean, peak, problem), found["mask"]
    assert given is not None and found["mean"] is not None
    anchors = reference.find_anchors(k, problem.config.block_size, problem.config.key_anchors)
    used = anchors if found["anchors"] is None else found["anchors"]
    out, lse = reference.sparse_attention(q, k, v, given, problem, KeySummary(None, used))
    largest = tolerance.scores if tolerance.output is None else tolerance.output * room_for_large_logits(q, k, problem)
    reports = [
        compare_scores(found["mean"], found["peak"], mean, peak, tolerance),
        compare_masks(given, mask, mean, peak, problem, tolerance.scores),
        compare_outputs(found["out"], (q, k, v), out, given, problem, case.dtype),
        compare_values("log-sum-exp", (found["lse"],), (lse,), largest, "lse"),
    ]
    if problem.config.key_anchors:
        reports.append(compare_anchors(used, anchors, k, tolerance.norms))
    return reports, mask


def run_on_device(case: Case, engine: Any, cupy: Any) -> Outcome:
    """Everything that is checked of one case, on the GPU and off it.

    The stages by `judge`; and to the bit: a second run, block-aligned chunks, a batch, and a running key summary.
    """
    problem = case.problem
    q, k, v = (on_device(x, layout, cupy) for x, layout in zip((case.q, case.k, case.v), case.layouts, strict=True))
    out, trace = engine.run_sparse(q, k, v, problem, keep_scores=True)
    names = ("mean", "peak", "mask", "anchors", "lse")
    found = {name: None if getattr(trace, name) is None else cupy.asnumpy(getattr(trace, name)) for name in names}
    found["out"] = cupy.asnumpy(out)
    reports, mask = judge(case, found)
    wrong = [f"{report.stage}: {report.error:.3g}, allowed {report.allowed:.3g}" for report in reports if not report.ok]
    by_stage = {report.stage: report for report in reports}
    outcome = Outcome(trace.kernel, wrong, by_stage, int((found["mask"] != mask).sum()), mask.size, [])

    def same(kind: str, other_out: Any, other_trace: Any, rows: slice = slice(None), outputs: bool = True) -> None:
        outcome.repeats.append(kind)
        size, name = problem.config.block_size, kind if rows.start is None else f"{kind}, rows {rows.start} to {rows.stop}"
        blocks = slice(None) if rows.start is None else slice(rows.start // size, -(-rows.stop // size))
        if not (cupy.asnumpy(other_trace.mask) == found["mask"][:, blocks]).all():
            wrong.append(f"{name}: another mask")
        elif outputs and cupy.asnumpy(other_out).tobytes() != np.ascontiguousarray(found["out"][:, rows]).tobytes():
            wrong.append(f"{name}: other outputs")

    same("a second run", *engine.run_sparse(q, k, v, problem))
    rng = np.random.default_rng(case.seed + 1)
    size = problem.config.block_size
    if problem.causal and problem.q_len > size:
        cut = size * int(rng.integers(1, -(-problem.q_len // size)))
        for start, stop in ((0, cut), (cut, problem.q_len)):
            part = replace(problem, q_len=stop - start, q_offset=problem.q_offset + start)
            few = stop - start <= FEW_QUERIES or problem.q_len <= FEW_QUERIES  # such calls share keys out by their heads and length
            same("a chunk", *engine.run_sparse(q[:, start:stop], k, v, part), slice(start, stop), not few)
    if rng.integers(3) == 0:
        summary = engine.RunningKeySummary(
            problem.config, problem.num_q_heads, problem.num_kv_heads, problem.head_dim, problem.k_len, case.q.dtype
        )
        cut = int(rng.integers(0, problem.k_len + 1))
        summary.extend(k[:, :cut])
        summary.extend(k[:, cut:])
        same("a key summary", *engine.run_sparse(q, k, v, problem, summary.summary()))
    if rng.integers(3) == 0:
        batch = [cupy.stack([x, x[:, ::-1]]) for x in (q, k, v)]
        outs, traces = unisparse_attention(
            *batch, problem.config, causal=problem.causal, q_offset=problem.q_offset, backend="cupy", return_trace=True
        )
        same("a batch", outs[0], traces[0], outputs=problem.q_len > FEW_QUERIES)
    return outcome
