"""The Numba kernels on a GPU: are they right, how fast are they, beside CuPy's kernels and the NumPy reference.

    PYTHONPATH=. python benchmarks/numba_gpu.py [--length 8192] [--density 0.25]

Right: every stage against the float64 reference (`audit`), on random inputs in four dtypes and several configs; exit code 1
when one does not agree. Fast: 32 query heads, 8 KV heads, head_dim 128, causal; the same inputs for all, float32 for Numba and
NumPy, bfloat16 for CuPy (which has no float32 kernel). Medians of CUDA-event times. Results go to
benchmarks/results/numba_gpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numba import cuda

from benchmarks.common import stamp, write_result
from unisparse_np import Problem, UniSparseConfig, audit, reference
from unisparse_np.cli.env import gpus
from unisparse_np.gpu import numba_kernels
from unisparse_np.gpu.numba_kernels.device import to_device

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
AUDITS = {  # (q heads, kv heads, q_len, k_len, head_dim), config, causal
    "default": ((8, 2, 1500, 1500, 128), UniSparseConfig(), True),
    "paper": ((8, 2, 1500, 1500, 128), UniSparseConfig.paper(), True),
    "precise": ((8, 2, 700, 1500, 64), UniSparseConfig.precise(), True),
    "heads averaged, both rules": ((8, 2, 900, 900, 80), UniSparseConfig(64, 4, 8, 8, 0.8, 0.05, key_anchors=3), True),
    "not causal": ((4, 2, 600, 900, 256), UniSparseConfig(64, top_p=0.7), False),
    "odd blocks": ((2, 1, 333, 333, 33), UniSparseConfig(48, 3, 16, top_p=0.6), True),
    "decode": ((8, 2, 1, 3001, 128), UniSparseConfig(), True),
}


def random_qkv(shape: tuple[int, int, int, int, int], dtype: Any) -> list[np.ndarray]:
    num_q_heads, num_kv_heads, q_len, k_len, dim = shape
    rng = np.random.default_rng(0)
    shapes = ((num_q_heads, q_len, dim), (num_kv_heads, k_len, dim), (num_kv_heads, k_len, dim))
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


def check_stages() -> list[dict[str, Any]]:
    rows = []
    for name, (shape, config, causal) in AUDITS.items():
        for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16):
            report = audit(*random_qkv(shape, dtype), config, backend="numba", causal=causal)
            errors = {stage.stage: {"error": stage.error, "allowed": stage.allowed} for stage in report.stages}
            rows.append({"case": name, "dtype": report.dtype, "ok": report.ok, "stages": errors})
            print(f"{'ok ' if report.ok else 'BAD'} {name}, {report.dtype}" + ("" if report.ok else f"\n{report}"), flush=True)
    return rows


def median_ms(run: Callable[[], Any], budget_ms: float = 400.0) -> float:
    """Median milliseconds of one call, after two to warm up."""
    start, stop = cuda.event(), cuda.event()

    def once() -> float:
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return cuda.event_elapsed_time(start, stop)

    run()
    first = once()
    return statistics.median(once() for _ in range(int(min(30, max(5, budget_ms / max(first, 0.01))))))


def random_mask(length: int, density: float, size: int) -> np.ndarray:
    """[Hq, Nq, Nk] bool: each block below the diagonal with this probability, and the diagonal."""
    blocks = length // size
    mask = np.tril(np.random.default_rng(0).random((NUM_Q_HEADS, blocks, blocks)) < density, -1)
    return mask | np.eye(blocks, dtype=bool)


def attended_flop(mask: np.ndarray, size: int) -> float:
    """Of both products over the kept blocks; half of each diagonal block."""
    return 4.0 * size * size * HEAD_DIM * (float(mask.sum()) - 0.5 * mask.shape[0] * mask.shape[1])


def time_attention(length: int, density: float) -> list[dict[str, Any]]:
    config = UniSparseConfig(key_anchors=0)
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM, config)
    arrays = random_qkv((NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM), np.float32)
    mask = random_mask(length, density, config.block_size)
    whole = np.tril(np.ones_like(mask))
    q, k, v, mask_there = (to_device(x) for x in (*arrays, mask))
    rows: list[dict[str, Any]] = []

    def add(kernel: str, work: str, ms: float, flop: float | None = None) -> None:
        rows.append({"kernel": kernel, "work": work, "length": length, "ms": ms} | ({"tflops": flop / ms / 1e9} if flop else {}))
        print(f"{kernel:<10} {work:<28} {ms:10.3f} ms" + (f" {flop / ms / 1e9:8.2f} TFLOP/s" if flop else ""), flush=True)

    sparse_flop, dense_flop = attended_flop(mask, config.block_size), attended_flop(whole, config.block_size)
    sparse = f"attention at density {density:g}"
    add("numba", "dense attention", median_ms(lambda: numba_kernels.dense_attention(q, k, v, problem)), dense_flop)
    add("numba", sparse, median_ms(lambda: numba_kernels.sparse_attention(q, k, v, mask_there, problem)), sparse_flop)
    qc, kc = numba_kernels.compress(q, k, problem)
    mean, peak = numba_kernels.score_blocks(qc, kc, problem)
    add("numba", "compress", median_ms(lambda: numba_kernels.compress(q, k, problem)))
    add("numba", "score_blocks", median_ms(lambda: numba_kernels.score_blocks(qc, kc, problem)))
    add("numba", "select_blocks", median_ms(lambda: numba_kernels.select_blocks(mean, peak, problem)))
    add("numba", "find_anchors", median_ms(lambda: numba_kernels.find_anchors(k, config.block_size, 1)))
    if importlib.util.find_spec("cupy") is not None:
        time_cupy(arrays, mask, problem, sparse, sparse_flop, dense_flop, add)
    started = time.perf_counter()
    reference.sparse_attention(*(x[:g] for x, g in zip(arrays, (4, 1, 1), strict=True)), mask[:4], problem.of_kv_heads(0, 1))
    add("reference", f"{sparse}, 4 of 32 heads", 1e3 * (time.perf_counter() - started), sparse_flop / 8)
    return rows


def time_cupy(
    arrays: list[np.ndarray], mask: np.ndarray, problem: Problem, sparse: str, sparse_flop: float, dense_flop: float, add: Callable
) -> None:
    """CuPy's kernels on the same numbers, rounded to bfloat16; and that both backends agree on them."""
    from unisparse_np.gpu import cupy_kernels

    q, k, v = (cupy_kernels.from_any("x", x.astype(ml_dtypes.bfloat16)) for x in arrays)
    mask_there = cupy_kernels.xp.asarray(mask)
    mine, _ = numba_kernels.sparse_attention(*(numba_kernels.from_any("x", x) for x in (q, k, v)), to_device(mask), problem)
    theirs, _ = cupy_kernels.sparse_attention(q, k, v, mask_there, problem)
    difference = np.abs(np.asarray(mine) - np.asarray(cupy_kernels.as_numpy(theirs)).astype(np.float32)).max()
    assert difference < 2e-2, f"the backends differ by {difference}"
    add("cupy", "dense attention", median_ms(lambda: cupy_kernels.dense_attention(q, k, v, problem)), dense_flop)
    add("cupy", sparse, median_ms(lambda: cupy_kernels.sparse_attention(q, k, v, mask_there, problem)), sparse_flop)


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How the sparse kernel stands beside the dense one and beside CuPy's."""
    ms = {(row["kernel"], row["work"].split(" at ")[0]): row["ms"] for row in rows}
    found = {"dense ms / sparse ms": ms["numba", "dense attention"] / ms["numba", "attention"]}
    if ("cupy", "attention") in ms:
        found["share of cupy's dense speed"] = ms["cupy", "dense attention"] / ms["numba", "dense attention"]
        found["share of cupy's sparse speed"] = ms["cupy", "attention"] / ms["numba", "attention"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--density", type=float, default=0.25)
    arguments = parser.parse_args()
    rows = time_attention(arguments.length, arguments.density)
    found = verdicts(rows)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    checks = check_stages()
    stamped = stamp("numba", "numba-cuda")
    print(write_result("numba_gpu", stamped | {"gpus": gpus(), "times": rows, "verdicts": found, "checks": checks}))
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
