"""Thousands of random problems on the GPU against the float64 reference, by ALGORITHM.md's "Comparing backends".

    PYTHONPATH=. python benchmarks/random_problems_gpu.py [--count 2000] [--seed 0] [--seconds 300] [--workers 12] [--output FILE]

Shapes, strides, dtypes, offsets, configs, chunks, batches and key summaries are drawn (tests/random_problems.py); even seeds
run the device's own kernels, odd ones the portable kernels. The processes share the GPU; each also computes the reference.
Results go to benchmarks/results/random_problems_<device>.json; exit status 1 if a problem failed.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are the parallelism


def work(seed: int) -> tuple[str, list[str]]:
    """One problem: which kernels it ran on, and what is wrong."""
    import cupy

    from tests.random_problems import random_case, run_on_device
    from unisparse_np.gpu import cupy_kernels as engine

    portable = bool(seed % 2)
    use_portable_kernels(portable)
    try:
        case = random_case(seed)
        wrong = run_on_device(case, engine, cupy)
        return "portable" if portable else "native", [f"{case}: {what}" for what in wrong]
    except Exception:
        return "error", [f"seed {seed}: {traceback.format_exc(limit=6)}"]


def use_portable_kernels(portable: bool, native: dict[str, Any] = {}) -> None:  # noqa: B006 (what to go back to)
    """Hide the Hopper kernels from the dispatch, or show them again."""
    from unisparse_np.gpu.cupy_kernels import attend, plan, scores

    for module in (attend, scores):
        native.setdefault(module.__name__, module.HOPPER_HEAD_DIMS)
        module.HOPPER_HEAD_DIMS = () if portable else native[module.__name__]
    plan.forget_plans()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="problems")
    parser.add_argument("--seed", type=int, default=0, help="of the first problem")
    parser.add_argument("--seconds", type=float, default=300, help="what has not come back after so long is left out")
    parser.add_argument("--workers", type=int, default=12, help="processes")
    parser.add_argument("--output", default="", help="where the JSON goes; default: benchmarks/results")
    arguments = parser.parse_args()
    start = time.time()
    kinds: Counter[str] = Counter()
    failures: list[str] = []
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        results = pool.imap_unordered(work, range(arguments.seed, arguments.seed + arguments.count))
        with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
            while True:
                kind, wrong = results.next(timeout=max(0.0, start + arguments.seconds - time.time()))
                kinds[kind] += 1
                failures += wrong
                for failure in wrong:
                    print(failure, file=sys.stderr, flush=True)
    seconds = time.time() - start
    save(arguments, kinds, failures, seconds)
    print(f"{sum(kinds.values())} problems ({dict(kinds)}) in {seconds:.0f} s, {len(failures)} failures")
    return 1 if failures else 0


def save(arguments: argparse.Namespace, kinds: Counter[str], failures: list[str], seconds: float) -> None:
    """Write what was run and found, with the machine."""
    import json
    from pathlib import Path

    import cupy

    from benchmarks.common import stamp, write_result

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    result = {
        **stamp(),
        "device": device,
        "cupy": cupy.__version__,
        "seed": arguments.seed,
        "problems": dict(kinds),
        "seconds": round(seconds, 1),
        "failures": failures,
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    else:
        write_result(f"random_problems_{device.lower().replace(' ', '_')}", result)


if __name__ == "__main__":
    sys.exit(main())
