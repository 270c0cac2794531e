"""The whole call on the device: the four stages one after the other, nothing between them visits the host."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from ...errors import InvalidInput
from ...problem import KeySummary, Problem
from ...trace import Trace
from .anchors import find_anchors
from .attend import attend_listed, dense_attention
from .compress import compress, compress_keys
from .device import computing, first_not_finite, hand_back, launch_over, to_device
from .scores import score_blocks
from .select import select_blocks
from .tile import IN_SIMULATOR


def run_sparse(
    q: Any, k: Any, v: Any, problem: Problem, key_summary: KeySummary | None = None, keep_scores: bool = False, q_composites: None = None
) -> tuple[Any, Trace]:
    """Steps 1-6. q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] and its Trace (with qc, kc, mean, peak if keep_scores).

    q_composites: None, as queries are pooled here.
    """
    queries, keys, values = computing(q), computing(k), computing(v)
    summary = summarise_keys(keys, problem) if key_summary is None else KeySummary(*(to_device(part) for part in key_summary))
    qc, kc = compress(queries, keys, problem, summary)
    mean, peak = score_blocks(qc, kc, problem)
    mask = select_blocks(mean, peak, problem)
    out, lse = attend_listed(queries, keys, values, mask, summary.anchors, problem)
    visible = problem.total_visible_blocks
    trace = Trace(
        kernel=device_name(),
        kept_blocks=problem.config.kept_blocks(int(np.asarray(mask).sum()), visible),
        visible_blocks=visible,
        lse=hand_back(lse, q),
        mask=hand_back(mask, q),
        anchors=hand_back(summary.anchors, q),
    )
    if keep_scores:
        trace.qc, trace.kc, trace.mean = (hand_back(x, q) for x in (qc, kc, mean))
        trace.peak = None if peak is None else hand_back(peak, q)
    return hand_back(out, q), trace


def run_dense(q: Any, k: Any, v: Any, problem: Problem) -> tuple[Any, Trace]:
    """Dense attention: q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] and its Trace."""
    out, lse = dense_attention(q, k, v, problem)
    visible = problem.total_visible_blocks
    return out, Trace(kernel=f"{device_name()}, dense", kept_blocks=visible, visible_blocks=visible, lse=lse)


def summarise_keys(k: Any, problem: Problem) -> KeySummary:
    """Composite keys and anchors of k [Hkv, Lk, d], on the device."""
    keys = computing(k)
    return KeySummary(compress_keys(keys, problem), find_anchors(keys, problem.config.block_size, problem.config.key_anchors))


def check_finite(q: Any, k: Any, v: Any, problem: Problem) -> None:
    """Raises InvalidInput when a number that would be read is NaN or infinite.

    Under causality selection reads keys up to the end of the composite key that holds the last query's position, and
    attention reads values up to that position; what lies behind may hold anything.
    """
    values_read = problem.visible_keys(problem.num_q_blocks - 1)
    for label, x, length in (("q", q, problem.q_len), ("k", k, problem.keys_read), ("v", v, values_read)):
        values = computing(x)
        nowhere = values.data.size
        first = cuda.to_device(np.array([nowhere], dtype=np.int64))
        launch_over(nowhere, first_not_finite, values.data, length, first)
        found = int(first.copy_to_host()[0])
        if found < nowhere:
            head, token, dim = (int(axis) for axis in np.unravel_index(found, values.shape))
            value = np.asarray(values[head])[token, dim]
            raise InvalidInput(f"{label} holds {value} at [{head}, {token}, {dim}]: attention needs finite numbers")


def device_name() -> str:
    """What runs the kernels, in words."""
    if IN_SIMULATOR:
        return "numba, in the simulator"
    name = cuda.get_current_device().name
    return f"numba on {name.decode() if isinstance(name, bytes) else name}"
