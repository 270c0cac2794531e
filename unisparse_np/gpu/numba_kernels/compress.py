"""Step 1 of ALGORITHM.md on a GPU: average tokens and heads into composite tokens.

The same step: reference/compress.py in NumPy, cupy_kernels/compress.py in CUDA C++.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from ...problem import KeySummary, Problem
from .device import DeviceArray, computing, empty, hand_back, launch_over, to_device


def compress(q: Any, k: Any, problem: Problem, key_summary: KeySummary | None = None) -> tuple[Any, Any]:
    """Step 1. q [Hq, Lq, d], k [Hkv, Lk, d] -> qc [Hc, Tq, d], kc [Hkc, Tk, d], in float32 or wider.

    With key_summary (a cache's composite keys) no key is read.
    """
    config = problem.config
    qc = average(computing(q), problem.num_composite_heads, problem.num_q_composites, config.q_compress)
    if key_summary is not None:
        return hand_back(qc, q), hand_back(to_device(key_summary.kc), q)
    return hand_back(qc, q), hand_back(compress_keys(k, problem), q)


def compress_keys(k: Any, problem: Problem) -> DeviceArray:
    """The key half of step 1: k [Hkv, Lk, d] -> kc [Hkc, Tk, d]."""
    return average(computing(k), problem.num_composite_kv_heads, problem.num_k_composites, problem.config.k_compress)


def coarse_composites(qc: Any, kc: Any, problem: Problem) -> tuple[Any, Any]:
    """Step 1, for a Top-P that reads composite tokens of its own: average composites into coarse ones of top_p_compress tokens.

    qc [Hc, Tq, d], kc [Hkc, Tk, d] -> [Hc, ceil(Lq / c_p), d], [Hkc, ceil(Lk / c_p), d], as problem.of_top_p() has them.
    """
    config, coarse = problem.config, problem.of_top_p()
    coarse_qc = average_composites(computing(qc), coarse.num_q_composites, problem.q_len, config.q_compress, coarse.config.q_compress)
    coarse_kc = average_composites(computing(kc), coarse.num_k_composites, problem.k_len, config.k_compress, coarse.config.k_compress)
    return hand_back(coarse_qc, qc), hand_back(coarse_kc, kc)


def average_composites(x: DeviceArray, coarse: int, length: int, width: int, coarse_width: int) -> DeviceArray:
    """Means of `width` of `length` tokens, x [H, T, d] -> [H, coarse, d], means of coarse_width tokens."""
    means = empty((x.shape[0], coarse, x.shape[2]), x.dtype)
    launch_over(means.data.size, mean_of_composites, x.data, means.data, length, width, coarse_width // width)
    return means


def average(x: DeviceArray, composite_heads: int, composites: int, width: int) -> DeviceArray:
    """x [H, L, d] -> [composite_heads, composites, d], each the mean of `width` tokens of H / composite_heads heads."""
    means = empty((composite_heads, composites, x.shape[2]), x.dtype)
    launch_over(composite_heads * composites * x.shape[2], mean_of_neighbours, x.data, means.data, width, x.shape[0] // composite_heads)
    return means


@cuda.jit(device=True)
def mean_of_tokens(x, head, first, last, dim):
    """(x[head, first, dim] + ... + x[head, last - 1, dim]) / (last - first), summed first to last."""
    total = x[head, first, dim]
    for token in range(first + 1, last):
        total += x[head, token, dim]
    return total / np.float32(last - first)  # a float32 count keeps the type of x: an integer would make it float64


@cuda.jit
def mean_of_neighbours(x, means, width, heads):
    """means[g, t, dim] = (sum over heads h of g) (sum over tokens of t) x[h, token, dim] / tokens / heads

    x [H, L, d] -> means [H / heads, ceil(L / width), d]. A thread makes every (number of threads)-th mean; neighbouring
    threads make neighbouring dims, so they read neighbouring memory.
    """
    composites, dims = means.shape[1], means.shape[2]
    for item in range(cuda.grid(1), means.size, cuda.gridsize(1)):
        dim = item % dims
        t = item // dims % composites
        g = item // (dims * composites)
        first = t * width
        last = min(first + width, x.shape[1])  # the last composite averages the tokens that exist
        total = mean_of_tokens(x, g * heads, first, last, dim)
        for h in range(g * heads + 1, (g + 1) * heads):
            total += mean_of_tokens(x, h, first, last, dim)
        means[g, t, dim] = total / np.float32(heads)


@cuda.jit
def mean_of_composites(x, means, length, width, per_mean):
    """means[h, t, dim] = sum over composites u of t (tokens of u) x[h, u, dim] / (tokens of t)

    x [H, ceil(length / width), d] -> means [H, ceil(length / (width * per_mean)), d]. Each composite weighs as many tokens
    as it holds, so that the last mean is over the tokens that exist here too.
    """
    dims = means.shape[2]
    for item in range(cuda.grid(1), means.size, cuda.gridsize(1)):
        dim = item % dims
        t = item // dims % means.shape[1]
        h = item // (dims * means.shape[1])
        first = t * per_mean
        total = x[h, first, dim] * np.float32(min(width, length - first * width))
        for u in range(first + 1, min(first + per_mean, x.shape[1])):
            total += x[h, u, dim] * np.float32(min(width, length - u * width))
        means[h, t, dim] = total / np.float32(min(per_mean * width, length - first * width))
