"""Step 1 of ALGORITHM.md: average tokens and heads into composite tokens."""

from __future__ import annotations

import numpy as np

from ..problem import KeySummary, Problem, ceil_div
from .precision import widen


def compress(q: np.ndarray, k: np.ndarray, problem: Problem, key_summary: KeySummary | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Step 1. Average neighbouring tokens, then neighbouring heads, into composite tokens.

    q [Hq, Lq, d], k [Hkv, Lk, d] -> qc [Hc, Tq, d], kc [Hkc, Tk, d], in float32 or wider.
    With key_summary (a cache's composite keys) no key is read.
    """
    qc = mean_of_neighbours(widen(q), problem.config.q_compress)  # [Hq, Tq, d]
    qc = mean_of_heads(qc, problem.config.head_compress)  # [Hc, Tq, d]
    return qc, compress_keys(k, problem) if key_summary is None else key_summary.kc


def compress_keys(k: np.ndarray, problem: Problem) -> np.ndarray:
    """The key half of step 1: k [Hkv, Lk, d] -> kc [Hkc, Tk, d]."""
    kc = mean_of_neighbours(widen(k), problem.config.k_compress)  # [Hkv, Tk, d]
    return mean_of_heads(kc, problem.kv_heads_per_composite)  # [Hkc, Tk, d]


def coarse_composites(qc: np.ndarray, kc: np.ndarray, problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Step 1, for a Top-P that reads composite tokens of its own: average composites into coarse ones of top_p_compress tokens.

    qc [Hc, Tq, d], kc [Hkc, Tk, d] -> [Hc, ceil(Lq / c_p), d], [Hkc, ceil(Lk / c_p), d], as problem.of_top_p() has them.
    """
    config, coarse = problem.config, problem.of_top_p().config
    return (
        mean_of_composites(qc, problem.q_len, config.q_compress, coarse.q_compress),
        mean_of_composites(kc, problem.k_len, config.k_compress, coarse.k_compress),
    )


def mean_of_composites(x: np.ndarray, length: int, width: int, coarse_width: int) -> np.ndarray:
    """Means of `width` tokens, x [H, ceil(length / width), d] -> means of coarse_width tokens [H, ceil(length / coarse_width), d].

    Each weighs as many tokens as it holds, so that the last mean is over the tokens that exist here too.
    """
    heads, _, dim = x.shape
    whole, per_mean = length // coarse_width, coarse_width // width
    means = np.empty((heads, ceil_div(length, coarse_width), dim), dtype=x.dtype)
    groups = x[:, : whole * per_mean].reshape(heads, whole, per_mean, dim)  # [H, whole, per_mean, d]
    means[:, :whole] = sum_in_order(groups, axis=2) / per_mean
    rest = x[:, whole * per_mean :]  # [H, n, d], n < per_mean or the last one not full
    if rest.shape[1]:
        tokens = np.full((rest.shape[1], 1), width, dtype=x.dtype)  # [n, 1]
        tokens[-1] = length - (x.shape[1] - 1) * width
        means[:, whole] = sum_in_order(rest * tokens, axis=1) / (length - whole * coarse_width)
    return means


def mean_of_neighbours(x: np.ndarray, width: int) -> np.ndarray:
    """x [H, L, d] -> [H, ceil(L / width), d]; the last mean is over the tokens that exist, never zero-padded."""
    heads, length, dim = x.shape
    whole = length // width
    means = np.empty((heads, ceil_div(length, width), dim), dtype=x.dtype)
    groups = x[:, : whole * width].reshape(heads, whole, width, dim)  # [H, whole, width, d]
    means[:, :whole] = sum_in_order(groups, axis=2) / width
    if whole * width < length:
        means[:, whole] = sum_in_order(x[:, whole * width :], axis=1) / (length - whole * width)
    return means


def mean_of_heads(x: np.ndarray, width: int) -> np.ndarray:
    """x [H, T, d] -> [H / width, T, d]."""
    if width == 1:
        return x
    heads, length, dim = x.shape
    return sum_in_order(x.reshape(heads // width, width, length, dim), axis=1) / width


def sum_in_order(x: np.ndarray, axis: int) -> np.ndarray:
    """Sum along an axis first to last, so that adding token by token (decode) gives the same bits as adding at once."""
    x = np.moveaxis(x, axis, 0)
    total = x[0].copy()
    for term in x[1:]:
        total += term
    return total
