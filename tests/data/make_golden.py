"""Add a case to tests/data/golden: float16 inputs, float64 answers of tests/oracle.py, which knows ALGORITHM.md alone.

    PYTHONPATH=. python tests/data/make_golden.py precise_preset

The other cases were made by an independent program before there was a reference.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

from tests.oracle import oracle
from unisparse_np import UniSparseConfig

FOLDER = Path(__file__).parent / "golden"
SEED = 12
# What a preset is today. 420 tokens: seven blocks of 64, the last one ragged.
CASES = {"precise_preset": ((4, 2, 420, 64), UniSparseConfig.precise())}


def inputs(heads: int, kv_heads: int, length: int, head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v float16: keys that drift, so that neighbours are alike, and runs of 32 queries that look for one earlier place each."""
    rng = np.random.default_rng(SEED)
    k = rng.standard_normal((kv_heads, length, head_dim))
    for t in range(1, length):
        k[:, t] += 0.9 * k[:, t - 1]
    k *= 0.43 * (0.5 + rng.random((kv_heads, length, 1)))  # about as long as random keys, some short: those are anchors
    places = (np.repeat(rng.random((heads, -(-length // 32))), 32, axis=1)[:, :length] * (1 + np.arange(length))).astype(int)  # [heads, L]
    q = 3.5 * k[np.arange(heads)[:, None] * kv_heads // heads, places] + 0.2 * rng.standard_normal((heads, length, head_dim))
    v = rng.standard_normal((kv_heads, length, head_dim))
    return q.astype(np.float16), k.astype(np.float16), v.astype(np.float16)


def main() -> None:
    for name in sys.argv[1:]:
        shape, config = CASES[name]
        q, k, v = inputs(*shape)
        found = oracle(q, k, v, config)
        params = json.dumps({**asdict(config), "causal": True, "q_offset": 0})
        arrays = {"scores": found["mean"], "peak": found["peak"], "out": found["out"], "lse": found["lse"]}
        narrow = {key: value.astype(np.float32) for key, value in arrays.items()}
        np.savez_compressed(FOLDER / f"{name}.npz", q=q, k=k, v=v, mask=found["mask"], params=np.array(params), **narrow)
        print(f"{name}: {found['mask'].mean():.2f} of all pairs of blocks kept")


if __name__ == "__main__":
    main()
