"""The Numba kernels on a GPU: are they right, how fast are they, beside CuPy's kernels and the NumPy reference.

    PYTHONPATH=. python benchmarks/numba_gpu.py [--length 8192] [--density 0.25]

Right: every stage against the float64 reference (`audit`), on random inputs in four dtypes and several configs; exit code 1
when one does not agree. Fast: 32 query heads, 8 KV heads, head_dim 128, causal; the same inputs for all, in float32, and for CuPy
also rounded to bfloat16, where it has the tensor cores. Medians of CUDA-event times. Results go to
benchmarks/results/numba_gpu.json.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
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


class Timed:
    """The rows of one result, printed as they come."""

    def __init__(self, length: int) -> None:
        self.rows: list[dict[str, Any]] = []
        self._length = length

    def add(self, kernel: str, work: str, ms: float, flop: float | None = None) -> None:
        row = {"kernel": kernel, "work": work, "length": self._length, "ms": ms} | ({"tflops": flop / ms / 1e9} if flop else {})
        self.rows.append(row)
        print(f"{kernel:<14} {work:<28} {ms:10.3f} ms" + (f" {flop / ms / 1e9:8.2f} TFLOP/s" if flop else ""), flush=True)


def time_all(length: int, density: float) -> list[dict[str, Any]]:
    """Every stage of every backend on the same numbers and the same mask."""
    config = UniSparseConfig(key_anchors=0)
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM, config)
    arrays = random_qkv((NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM), np.float32)
    mask = random_mask(length, density, config.block_size)
    timed = Timed(length)
    time_backend("numba", numba_kernels, arrays, mask, problem, density, timed)
    if importlib.util.find_spec("cupy") is not None:
        from unisparse_np.gpu import cupy_kernels

        for dtype, allowed in ((np.float32, 1e-4), (ml_dtypes.bfloat16, 2e-2)):
            rounded = [x.astype(dtype) for x in arrays]
            time_backend(f"cupy {np.dtype(dtype).name}", cupy_kernels, rounded, mask, problem, density, timed)
            difference = np.abs(attend(numba_kernels, rounded, mask, problem) - attend(cupy_kernels, rounded, mask, problem)).max()
            assert difference < allowed, f"the backends differ by {difference}"
    time_reference(arrays, mask, problem, density, timed)
    return timed.rows


def time_backend(
    name: str, engine: Any, arrays: list[np.ndarray], mask: np.ndarray, problem: Problem, density: float, timed: Timed
) -> None:
    """One GPU backend's rows."""
    q, k, v = (engine.from_any("x", x) for x in arrays)
    there = on_device(mask, engine)
    size = problem.config.block_size
    dense_flop, sparse_flop = attended_flop(np.tril(np.ones_like(mask)), size), attended_flop(mask, size)
    timed.add(name, "dense attention", median_ms(lambda: engine.dense_attention(q, k, v, problem)), dense_flop)
    sparse = f"attention at density {density:g}"
    timed.add(name, sparse, median_ms(lambda: engine.sparse_attention(q, k, v, there, problem)), sparse_flop)
    qc, kc = (engine.as_composites(x, problem, q.dtype) for x in engine.compress(q, k, problem))
    mean, peak = engine.score_blocks(qc, kc, problem)
    timed.add(name, "compress", median_ms(lambda: engine.compress(q, k, problem)))
    timed.add(name, "score_blocks", median_ms(lambda: engine.score_blocks(qc, kc, problem)))
    timed.add(name, "select_blocks", median_ms(lambda: engine.select_blocks(mean, peak, problem)))
    timed.add(name, "find_anchors", median_ms(lambda: engine.find_anchors(k, size, 1)))


def attend(engine: Any, arrays: list[np.ndarray], mask: np.ndarray, problem: Problem) -> np.ndarray:
    """A backend's sparse attention [Hq, L, d], as float32 on the host."""
    out, _ = engine.sparse_attention(*(engine.from_any("x", x) for x in arrays), on_device(mask, engine), problem)
    return np.asarray(engine.as_numpy(out)).astype(np.float32)


def on_device(mask: np.ndarray, engine: Any) -> Any:
    """A mask as the backend's own array."""
    return to_device(mask) if engine is numba_kernels else engine.xp.asarray(mask)


def time_reference(arrays: list[np.ndarray], mask: np.ndarray, problem: Problem, density: float, timed: Timed) -> None:
    """NumPy on one KV head and the query heads that read it: an eighth of the work."""
    part = problem.of_kv_heads(0, 1)
    group = part.num_q_heads
    q, k, v = arrays[0][:group], arrays[1][:1], arrays[2][:1]
    qc, kc = reference.compress(q, k, part)
    mean, peak = reference.score_blocks(qc, kc, part)
    works: dict[str, Callable[[], Any]] = {
        f"attention at density {density:g}": lambda: reference.sparse_attention(q, k, v, mask[:group], part),
        "compress": lambda: reference.compress(q, k, part),
        "score_blocks": lambda: reference.score_blocks(qc, kc, part),
        "select_blocks": lambda: reference.select_blocks(mean, peak, part),
        "find_anchors": lambda: reference.find_anchors(k, part.config.block_size, 1),
    }
    for work, run in works.items():
        started = time.perf_counter()
        run()
        flop = attended_flop(mask[:group], part.config.block_size) if work.startswith("attention") else None
        timed.add("reference", f"{work}, {group} of {NUM_Q_HEADS} heads", 1e3 * (time.perf_counter() - started), flop)


def verdicts(rows: list[dict[str, Any]]) -> dict[str, float]:
    """How the sparse kernel stands beside the dense one and beside CuPy's."""
    ms = {(row["kernel"], row["work"].split(" at ")[0]): row["ms"] for row in rows}
    found = {"dense ms / sparse ms": ms["numba", "dense attention"] / ms["numba", "attention"]}
    for kernel in ("cupy float32", "cupy bfloat16"):
        if (kernel, "attention") in ms:
            found[f"share of the dense speed of {kernel}"] = ms[kernel, "dense attention"] / ms["numba", "dense attention"]
            found[f"share of the sparse speed of {kernel}"] = ms[kernel, "attention"] / ms["numba", "attention"]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--density", type=float, default=0.25)
    arguments = parser.parse_args()
    rows = time_all(arguments.length, arguments.density)
    found = verdicts(rows)
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    cupy = metadata.packages_distributions().get("cupy", [])
    result = stamp("numba", "numba-cuda", *cupy) | {"gpus": gpus(), "times": rows, "verdicts": found}
    write_result("numba_gpu", result)  # the checks take longer
    checks = check_stages()
    print(write_result("numba_gpu", result | {"checks": checks}))
    return 0 if all(check["ok"] for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
