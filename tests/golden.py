"""The golden vectors: float16 inputs and float64 answers of ALGORITHM.md, made by programs that are independent of the package.

tests/make_coarse_golden.py made those named coarse_*.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unisparse_np import Problem, UniSparseConfig

FOLDER = Path(__file__).parent / "data" / "golden"
FILES = sorted(FOLDER.glob("*.npz"))


class Golden(NamedTuple):
    """One case: q, k, v float16; scores, peak [Hq, Nq, Nk] (composite heads repeated); mask, out, lse."""

    problem: Problem
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    scores: np.ndarray
    peak: np.ndarray
    mask: np.ndarray
    out: np.ndarray
    lse: np.ndarray


def load(path: Path) -> Golden:
    with np.load(path) as data:
        params = json.loads(str(data["params"]))
        causal, q_offset = params.pop("causal", True), params.pop("q_offset", None)
        arrays = {name: data[name] for name in ("q", "k", "v", "scores", "peak", "mask", "out", "lse")}
    q, k = arrays["q"], arrays["k"]
    problem = Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], UniSparseConfig(**params), causal, q_offset)
    return Golden(problem, **arrays)
