"""How far two models' next-token distributions are apart, from logits, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_ELEMENTS_AT_ONCE = 1 << 24  # of a block of logits: bounds the temporaries at a few hundred MB whatever the vocabulary


class Divergence(NamedTuple):
    """Per position, [T] float64 each: KL(dense || sparse) in nats, whether the likeliest token agrees, and both
    negative log-likelihoods of the token that follows."""

    kl: np.ndarray
    top1: np.ndarray
    nll: np.ndarray
    dense_nll: np.ndarray


def divergence(dense: Any, sparse: Any, targets: np.ndarray, layers: Any = None) -> Divergence:
    """dense, sparse [T, vocab] logits (any floating dtype), targets [T] ids of the following tokens.

    Exponentials in float32, sums in float64: the KL is good to about 1e-6.

    Args:
        layers: of the backend whose arrays the logits are; it computes, and only the four columns come to the host. None: NumPy.
    """
    parts = [_rows_divergence(dense[rows], sparse[rows], targets[rows], layers) for rows in row_blocks(*dense.shape)]
    return Divergence(*np.concatenate(parts, axis=1))


def row_blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices that cover the rows, each of bounded size."""
    step = max(1, _ELEMENTS_AT_ONCE // vocab)
    yield from (slice(start, start + step) for start in range(0, rows, step))


def log_probabilities(logits: Any, xp: Any = np) -> Any:
    """logits [T, vocab] of NumPy or of the library that works like it -> natural log-probabilities, float32."""
    logits = logits.astype(np.float32)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= xp.log(xp.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def _rows_divergence(dense: Any, sparse: Any, targets: np.ndarray, layers: Any) -> np.ndarray:
    """The four columns of some rows: [4, t] float64."""
    xp = np if layers is None else layers.xp
    log_p, log_q = log_probabilities(dense, xp), log_probabilities(sparse, xp)  # [t, vocab]
    of_targets = xp.arange(len(targets)), xp.asarray(targets)
    kl = (xp.exp(log_p) * (log_p - log_q)).sum(axis=1, dtype=np.float64)
    kl = xp.maximum(kl, 0.0)  # rounding takes a KL of nothing below zero
    agree = log_p.argmax(axis=1) == log_q.argmax(axis=1)
    columns = xp.stack([column.astype(np.float64) for column in (kl, agree, -log_q[of_targets], -log_p[of_targets])])
    host: np.ndarray = columns if layers is None else layers.to_host(columns)
    return host
