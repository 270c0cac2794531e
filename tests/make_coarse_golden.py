"""Write the golden vectors of a Top-P with composite tokens of its own, with the answers of tests/oracle.py.

The oracle is written from ALGORITHM.md alone and calls nothing of the package but the config. Topics that come back and one needle a
head make both rules keep blocks that the other drops; a case whose mask would hang on rounding is refused.

    python -m tests.make_coarse_golden
"""

import json
from dataclasses import asdict
from typing import NamedTuple

import numpy as np

from tests.golden import FOLDER
from tests.oracle import oracle
from unisparse_np import UniSparseConfig

MARGIN = 1e-3  # between a score and what decides about it


class Case(NamedTuple):
    """heads: (Hq, Hkv); tokens: (Lq, Lk)."""

    heads: tuple[int, int]
    tokens: tuple[int, int]
    head_dim: int
    config: UniSparseConfig
    causal: bool = True
    q_offset: int | None = None


CASES = {
    "coarse_ragged": Case((6, 2), (333, 333), 64, UniSparseConfig(64, 4, 2, top_p=0.85, row_threshold=0.5, top_p_compress=8)),
    "coarse_offset": Case(
        (4, 2), (150, 391), 64,
        UniSparseConfig(64, 2, 4, 2, top_p=0.7, row_threshold=0.3, key_anchors=2, sink_blocks=0, local_blocks=0, top_p_compress=16),
        q_offset=213,
    ),
    "coarse_across": Case(
        (4, 2), (100, 141), 32,
        UniSparseConfig(32, 8, 4, 4, top_p=0.5, row_threshold=0.3, sink_blocks=0, local_blocks=0, top_p_compress=32), causal=False,
    ),
}  # fmt: skip


def inputs(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q [Hq, Lq, d], k, v [Hkv, Lk, d] in float16."""
    rng = np.random.default_rng(seed)
    (num_q_heads, num_kv_heads), (q_len, k_len), dim = case.heads, case.tokens, case.head_dim
    topics = 1.2 * rng.standard_normal((num_kv_heads, 5, dim))
    k = topics[:, rng.integers(0, 5, -(-k_len // 24))].repeat(24, axis=1)[:, :k_len] + rng.standard_normal((num_kv_heads, k_len, dim))
    positions = (k_len - q_len if case.q_offset is None else case.q_offset) + np.arange(q_len)
    q = (0.6 * k[:, positions]).repeat(num_q_heads // num_kv_heads, axis=0) + 0.7 * rng.standard_normal((num_q_heads, q_len, dim))
    for head in range(num_q_heads):  # the needle: some neighbouring queries look for some neighbouring keys
        row, key = rng.integers(0, q_len - 8), rng.integers(0, k_len - q_len // 2)
        k[head * num_kv_heads // num_q_heads, key : key + 4] += 1.5 * topics[0, 0]
        q[head, row : row + 8] += 0.7 * topics[0, 0]
    v = rng.standard_normal((num_kv_heads, k_len, dim))
    return tuple(x.astype(np.float16) for x in (q, k, v))


def smallest_margin(answer: dict[str, np.ndarray], case: Case) -> float:
    """How far the nearest decision is from falling otherwise; it must be more than rounding."""
    running = np.cumsum(-np.sort(-answer["mean"], axis=-1), axis=-1)
    return min(np.abs(running - case.config.top_p).min(), np.abs(answer["peak"] - case.config.row_threshold).min())


def main() -> None:
    for name, case in CASES.items():
        for seed in range(100):
            q, k, v = inputs(case, seed)
            answer = oracle(q, k, v, case.config, case.causal, case.q_offset)
            if smallest_margin(answer, case) > MARGIN:
                break
        else:
            raise SystemExit(f"{name}: every seed has a decision within {MARGIN} of rounding")
        repeated = {kind: answer[key].repeat(case.config.head_compress, axis=0) for kind, key in (("scores", "mean"), ("peak", "peak"))}
        params = asdict(case.config) | {"causal": case.causal, "q_offset": case.q_offset}
        arrays = repeated | {"out": answer["out"], "lse": answer["lse"]}
        np.savez_compressed(
            FOLDER / f"{name}.npz", params=json.dumps(params), q=q, k=k, v=v, mask=answer["mask"],
            **{kind: x.astype(np.float32) for kind, x in arrays.items()},
        )  # fmt: skip
        print(f"{name}: seed {seed}, margin {smallest_margin(answer, case):.1e}, {answer['mask'].mean():.2f} of all blocks kept")


if __name__ == "__main__":
    main()
