"""Thousands of random problems on the GPU against the float64 reference, by ALGORITHM.md's "Comparing backends".

    PYTHONPATH=. python benchmarks/random_problems_gpu.py [--count 2000] [--seed 0] [--seconds 300] [--workers 12]
        [--shapes 47] [--output FILE]

Shapes, strides, dtypes, offsets, configs, chunks, batches and key summaries are drawn (tests/random_problems.py); even seeds
run the device's own kernels, odd ones the portable kernels. The processes share the GPU; each also computes the reference.
Results go to benchmarks/results/random_problems_<device>.json: for each attention kernel and dtype the number of problems and the
largest deviations. Exit status 1 if a problem failed.
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
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes are the parallelism


class Problem(NamedTuple):
    """What came of one problem.

    Attributes:
        kind: kernels and dtype, such as "native attend_sm90 bfloat16".
        features: what the problem had, in words.
        wrong: what is wrong with it, in words.
        largest: deviations from the reference, by name; of outputs in 16 bits also how many times a plain 16-bit computation's.
        counts: entries of the mask, how many of them differ inside rounding, and what was found the same to the bit how often.
    """

    kind: str
    features: list[str]
    wrong: list[str]
    largest: dict[str, float]
    counts: dict[str, int]


def work(seed: int, shapes: int) -> Problem:
    """One problem, drawn, run and judged."""
    import cupy

    from tests.random_problems import random_case, run_on_device
    from unisparse_np.gpu import cupy_kernels as engine

    path = "portable" if seed % 2 else "native"
    use_portable_kernels(path == "portable")
    try:
        case = random_case(seed, shapes)
        outcome = run_on_device(case, engine, cupy)
    except Exception:
        return Problem(f"{path} error", [], [f"seed {seed}: {traceback.format_exc(limit=6)}"], {}, {})
    counts = {"mask entries": outcome.blocks, "mask entries that differ inside rounding": outcome.differing}
    counts |= {f"{name}, the same to the bit": number for name, number in Counter(outcome.repeats).items()}
    kind = f"{path} {outcome.kernel.split()[0]} {case.dtype}"
    return Problem(kind, features(case), [f"{case}: {what}" for what in outcome.wrong], deviations(outcome.reports), counts)


def deviations(reports: dict[str, Any]) -> dict[str, float]:
    """The largest of each stage. The bound on 16-bit outputs is PLAIN_ERROR_FACTOR times the error of a plain computation."""
    from unisparse_np.comparison import PLAIN_ERROR_FACTOR

    output = reports["sparse_attention"]
    found = {"block scores": reports["score_blocks"].error, "output": output.error, "log-sum-exp": reports["log-sum-exp"].error}
    if "plain 16-bit" in output.detail:
        plain = output.allowed / PLAIN_ERROR_FACTOR
        found["output, times a plain 16-bit computation's"] = output.error / plain if output.error else 0.0
    return found


def features(case: Any) -> list[str]:
    """What the record counts."""
    problem, config = case.problem, case.problem.config
    rules = [name for name in ("top_p", "row_threshold", "top_p_compress") if getattr(config, name) is not None]
    said = {
        "not causal": not problem.causal,
        "an offset of its own": problem.causal and problem.q_offset != problem.k_len - problem.q_len,
        "key anchors": config.key_anchors > 0,
        "compressed heads": config.head_compress > 1,
        "a value for each head": isinstance(config.top_p, tuple) or isinstance(config.row_threshold, tuple),
        "16 queries or fewer": problem.q_len <= 16,
        "memory amid NaN": any("NaN" in layout for layout in case.layouts),
    }
    shapes = [f"head_dim {problem.head_dim}", f"block_size {config.block_size}", f"rules: {', '.join(rules)}"]
    return [*shapes, *(name for name, true in said.items() if true)]


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
    parser.add_argument("--shapes", type=int, default=47, help="what kernels are compiled for: so many shapes, an odd number")
    parser.add_argument("--output", default="", help="where the JSON goes; default: benchmarks/results")
    arguments = parser.parse_args()
    start = time.time()
    found: list[Problem] = []
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        seeds = range(arguments.seed, arguments.seed + arguments.count)
        results = pool.imap_unordered(partial(work, shapes=arguments.shapes), seeds)
        with contextlib.suppress(StopIteration, multiprocessing.TimeoutError):
            while True:
                found.append(results.next(timeout=max(0.0, start + arguments.seconds - time.time())))
                for failure in found[-1].wrong:
                    print(failure, file=sys.stderr, flush=True)
    seconds = time.time() - start
    save(arguments, found, seconds)
    failures = sum(len(problem.wrong) for problem in found)
    print(f"{len(found)} problems ({dict(Counter(problem.kind for problem in found))}) in {seconds:.0f} s, {failures} failures")
    return 1 if failures else 0


def summary(problems: list[Problem]) -> dict[str, Any]:
    """How many, the largest deviation of each kind, and the sums of what was counted."""
    names = dict.fromkeys(name for problem in problems for name in problem.largest)
    counts = sum((Counter(problem.counts) for problem in problems), Counter[str]())
    return {
        "problems": len(problems),
        "largest deviation": {name: max(problem.largest.get(name, 0.0) for problem in problems) for name in names},
        **counts,
    }


def save(arguments: argparse.Namespace, found: list[Problem], seconds: float) -> None:
    """Write what was run and found, with the machine."""
    import json
    from dataclasses import asdict
    from pathlib import Path

    import cupy

    from benchmarks.common import stamp_of_backend, write_result
    from unisparse_np.comparison import PLAIN_ERROR_FACTOR, TOLERANCES

    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    kinds = sorted({problem.kind for problem in found})
    result = {
        **stamp_of_backend("cupy"),
        "seeds": f"{arguments.seed} to {arguments.seed + arguments.count - 1}, as many as came back in time",
        "seconds": round(seconds, 1),
        "problems": len(found),
        "failures": [failure for problem in found for failure in problem.wrong],
        "allowed": {dtype: asdict(TOLERANCES[dtype]) for dtype in ("float32", "float16", "bfloat16")}
        | {"output, times a plain 16-bit computation's": PLAIN_ERROR_FACTOR},
        "features": dict(sorted(Counter(feature for problem in found for feature in problem.features).items())),
        "kernels": {kind: summary([problem for problem in found if problem.kind == kind]) for kind in kinds},
    }
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n")
    else:
        write_result(f"random_problems_{device.lower().replace(' ', '_')}", result)


if __name__ == "__main__":
    sys.exit(main())
