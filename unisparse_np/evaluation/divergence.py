"""How far two models' next-token distributions are apart, from logits, a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_ELEMENTS_AT_ONCE = 1 << 24  # of a block of logits: bounds the temporaries at a few hundred MB whatever the vocabulary


class Divergence(NamedTuple):
    """Per position, [T] float64 each: KL(dense || sparse) in nats, whether the likeliest token agrees, and both
    negative log-likelihoods of the token that follows."""

    kl: np.ndarray
    top1: np.ndarray
    nll: np.ndarray
    dense_nll: np.ndarray


def divergence(dense: np.ndarray, sparse: np.ndarray, targets: np.ndarray) -> Divergence:
    """dense, sparse [T, vocab] logits (any floating dtype), targets [T] ids of the following tokens.

    Exponentials in float32, sums in float64: the KL is good to about 1e-6.
    """
    parts = [_rows_divergence(dense[rows], sparse[rows], targets[rows]) for rows in row_blocks(*dense.shape)]
    return Divergence(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def row_blocks(rows: int, vocab: int) -> Iterator[slice]:
    """Slices that cover the rows, each of bounded size."""
    step = max(1, _ELEMENTS_AT_ONCE // vocab)
    yield from (slice(start, start + step) for start in range(0, rows, step))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """logits [T, vocab] -> natural log-probabilities, float32."""
    logits = logits.astype(np.float32)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def _rows_divergence(dense: np.ndarray, sparse: np.ndarray, targets: np.ndarray) -> Divergence:
    log_p, log_q = log_probabilities(dense), log_probabilities(sparse)  # [T, vocab]
    of_targets = np.arange(len(targets)), targets
    kl = np.einsum("tv,tv->t", np.exp(log_p), log_p - log_q, dtype=np.float64)
    kl = np.maximum(kl, 0.0)  # rounding takes a KL of nothing below zero
    agree = log_p.argmax(axis=1) == log_q.argmax(axis=1)
    return Divergence(kl, agree.astype(np.float64), -log_q[of_targets].astype(np.float64), -log_p[of_targets].astype(np.float64))
