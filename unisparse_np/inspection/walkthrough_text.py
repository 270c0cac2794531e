"""The walk through one query block as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..model.tokenizer import Tokenizer
from .costs import StepCost
from .reasons import Reason, reason_text
from .snippets import one_line
from .walkthrough import Walkthrough

MOST_BLOCKS_SHOWN = 12  # of the dropped ones
WIDTH = 110


def walkthrough_text(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    """Six steps, then what they cost."""
    steps = (_where, _compress, _score, _aggregate, _select, _force, _attend)
    parts = [step(walk, token_ids, tokenizer) for step in steps]
    return "\n\n".join([*parts, _costs(walk)])


def _where(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    n = len(walk.scores)
    return "\n".join(
        (
            f"Layer {walk.layer}, head {walk.head} (reads KV head {walk.kv_head}), query block {walk.block}: "
            f"tokens {walk.first} to {walk.last} of {len(token_ids):,}",
            f"  {one_line(tokenizer, token_ids[walk.first : walk.last + 1], WIDTH - 2)}",
            f"These {len(walk.q)} queries may look at {n} key blocks of {walk.config.block_size} tokens. Dense attention reads them all; "
            "UniSparse first finds out which are worth it.",
        )
    )


def _compress(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    c_q, c_k = walk.config.q_compress, walk.config.k_compress
    width = min(c_q, len(walk.q))
    norms = np.linalg.norm(walk.q[:width], axis=1)
    members = token_ids[walk.first : walk.first + width]
    lines = [
        "Step 1, compress: neighbouring tokens are averaged into composite tokens",
        f"  queries  {_shape(walk.q)} -> {_shape(walk.qc)}   {c_q} tokens each",
        f"  keys     {_shape(walk.k)} -> {_shape(walk.kc)}   {c_k} tokens each",
        f"  for example tokens {walk.first} to {walk.first + width - 1}, {one_line(tokenizer, members, 60)}:",
        f"    dimension 0  {' '.join(f'{x:.2f}' for x in walk.q[:width, 0])}  -> mean {walk.q[:width, 0].mean():.2f}",
        f"    length       {' '.join(f'{x:.1f}' for x in norms)}  -> composite {np.linalg.norm(walk.q[:width].mean(axis=0)):.1f} "
        "(shorter where the tokens disagree)",
    ]
    if walk.coarse_attention is not None:
        rows, columns = walk.coarse_attention.shape
        lines.append(
            f"  for Top-P, composite tokens are averaged once more, into {rows} queries and {columns} keys of {walk.config.top_p_compress} "
            "tokens: it asks where the block looks as a whole"
        )
    if walk.config.head_compress > 1:
        lines.append(f"  then {walk.config.head_compress} neighbouring heads are averaged too, and share one selection")
    return "\n".join(lines)


def _score(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    last = walk.attention[-1]
    c_k = walk.config.k_compress
    lines = [
        "Step 2, compressed attention: A = softmax(q~ k~^T * scale)",
        f"  A {_shape(walk.attention)}: every composite query over the composite keys it may see; each row sums to 1",
        "  the last composite query looks most at",
    ]
    for u in np.argsort(-last, kind="stable")[:4]:
        stop = min((u + 1) * c_k, walk.last + 1)
        lines.append(f"    {last[u]:6.1%}  tokens {u * c_k} to {stop - 1}  {one_line(tokenizer, token_ids[u * c_k : stop], 70)}")
    if walk.coarse_attention is not None:
        lines.append(f"  A' {_shape(walk.coarse_attention)}: the same over the composite tokens of Top-P")
    return "\n".join(lines)


def _aggregate(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    name, attention, config = "A", walk.attention, walk.config
    if walk.coarse_attention is not None:
        name, attention, config = "A'", walk.coarse_attention, walk.problem.of_top_p().config
    lines = [
        "Step 3, aggregate: B[j] = what key block j gets, summed over its composite keys, mean over the composite queries",
        f"  B {_shape(walk.scores)}, sum {walk.scores.sum():.4f}, from {name} {_shape(attention)}: {len(attention)} rows, "
        f"{config.block_size // config.k_compress} columns a block",
    ]
    if walk.peaks is not None:
        source = "the same" if walk.coarse_attention is None else f"the same from A {_shape(walk.attention)}"
        lines.append(f"  R {_shape(walk.peaks)}: {source}, but the greatest of the composite queries instead of their mean")
    return "\n".join(lines)


def _select(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    config = walk.config
    rules = []
    if config.top_p is not None:
        rules.append(f"keep the best blocks until their sum reaches P = {_value(config.top_p, walk)}")
    if config.row_threshold is not None:
        rules.append(f"keep every block with R above {_value(config.row_threshold, walk)}")
    peak_heading = "" if walk.peaks is None else f"{'R':>9}"
    lines = [
        f"Step 4, select: {'; and '.join(rules)}",
        f"  {'rank':>4} {'block':>6}{'B':>9}{'sum':>9}{peak_heading}{'truth':>9}  {'':<40} text of the key block",
    ]
    chosen = [j for j in walk.order if walk.reasons[j] & (Reason.TOP_P | Reason.ROW_THRESHOLD)]
    others = [j for j in walk.order if j not in set(chosen)]
    shown = {*chosen, *others[:MOST_BLOCKS_SHOWN]}
    for rank, j in enumerate(walk.order, start=1):
        if j in shown:
            lines.append(_block_line(walk, rank, int(j), token_ids, tokenizer))
        if rank == walk.top_p_blocks and rank < len(walk.order):
            lines.append(f"  ---- the sum has reached {_value(config.top_p, walk)}: Top-P stops ----")
    rest = [j for j in walk.order if j not in shown]
    if rest:
        lines.append(f"  and {len(rest)} more blocks that together hold {walk.scores[rest].sum():.4f} of B")
    lines.append("  truth: what dense attention gives the block, mean over the queries; UniSparse never computes it")
    return "\n".join(lines)


def _block_line(walk: Walkthrough, rank: int, j: int, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    size = walk.config.block_size
    peak = "" if walk.peaks is None else f"{walk.peaks[j]:9.4f}"
    text = one_line(tokenizer, token_ids[j * size : (j + 1) * size], 44)
    return (
        f"  {rank:>4} {j:>6}{walk.scores[j]:9.4f}{walk.running[rank - 1]:9.4f}{peak}{walk.true_mass[j]:9.4f}  "
        f"{reason_text(int(walk.reasons[j])):<40} {text}"
    )


def _force(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    config = walk.config
    by_rule = {
        f"the first {config.sink_blocks}, because models park attention on the first tokens": Reason.SINK,
        f"the {config.local_blocks} before the diagonal": Reason.LOCAL,
        "the diagonal, where the queries themselves are": Reason.DIAGONAL,
    }
    lines = ["Step 5, force: some blocks are kept whatever their score"]
    for words, flag in by_rule.items():
        blocks = np.flatnonzero(walk.reasons & flag)
        added = [int(j) for j in blocks if not walk.reasons[j] & (Reason.TOP_P | Reason.ROW_THRESHOLD)]
        news = f"new here: {', '.join(map(str, added))}" if added else "chosen already" if blocks.size else "none"
        lines.append(f"  {words}: {news}")
    lines.append(f"  kept in all: {int(walk.kept.sum())} of {len(walk.scores)} blocks, {_ranges(np.flatnonzero(walk.kept))}")
    return "\n".join(lines)


def _attend(walk: Walkthrough, token_ids: Sequence[int], tokenizer: Tokenizer) -> str:
    config = walk.config
    in_blocks = int(np.isin(walk.positions // config.block_size, np.flatnonzero(walk.kept)).sum())
    anchors = len(walk.positions) - in_blocks
    row = int(walk.mass_kept.argmin())
    return "\n".join(
        (
            "Step 6, attend: exact softmax attention over what was kept",
            f"  {in_blocks:,} keys of kept blocks and {anchors} anchor keys ({config.key_anchors} in each dropped block): "
            f"{len(walk.positions):,} of {walk.last + 1:,}",
            f"  true attention kept: {walk.mass_kept.mean():.2%} on average, {walk.mass_kept[row]:.2%} for the worst query "
            f"(token {walk.first + row}, {one_line(tokenizer, token_ids[walk.first + row : walk.first + row + 1], 20)})",
            f"  output {_shape(walk.sparse)}, last query, first dimensions:",
            f"    sparse  {_numbers(walk.sparse[-1])}",
            f"    dense   {_numbers(walk.dense[-1])}",
            f"  |sparse - dense| / |dense| over the block: {walk.output_error:.2%}",
        )
    )


def _costs(walk: Walkthrough) -> str:
    here = walk.layer_problem
    lines = [
        f"Cost of this layer, all {here.num_q_heads} heads, the whole prompt ({walk.value_bytes}-byte numbers; density as measured here)"
    ]
    for tokens, costs in walk.costs().items():
        sparse, dense = sum(cost.flop for cost in costs[:-1]), costs[-1].flop
        lines += [f"  at {tokens:,} tokens"] + [_cost_line(cost) for cost in costs]
        lines.append(f"    {'UniSparse / dense':<18}{sparse / dense:>14.1%}")
    return "\n".join(lines)


def _cost_line(cost: StepCost) -> str:
    return f"    {cost.step:<12}{_unit(cost.flop, 'FLOP'):>15}{_unit(cost.bytes, 'B'):>12}   {cost.shape}"


def _unit(value: float, unit: str) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _value(values: object, walk: Walkthrough) -> str:
    """One number, or this head's of a sequence."""
    return f"{values[walk.head // walk.config.head_compress] if isinstance(values, tuple) else values}"


def _shape(x: np.ndarray) -> str:
    return "[" + ", ".join(map(str, x.shape)) + "]"


def _numbers(x: np.ndarray) -> str:
    return "  ".join(f"{value:8.4f}" for value in x[:6])


def _ranges(blocks: np.ndarray) -> str:
    """0, 5-7, 9"""
    runs = np.split(blocks, np.flatnonzero(np.diff(blocks) > 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
