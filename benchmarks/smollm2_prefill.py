"""How long does a prompt take on a CPU? SmolLM2 in float32: this project, dense and sparse, beside transformers (SDPA).

    make smollm2 && pip install torch transformers && python benchmarks/smollm2_prefill.py

Every measurement is a process of its own (so that peak memory is its own too), engines take turns, and the median of the
repeats counts. All engines use the same number of threads and compute the logits of the last position only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

from common import SMOLLM2, prose, stamp, write_result

ENGINES = ("transformers", "dense", "default", "precise")
WARM_UP = 256  # tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--child", nargs=2, metavar=("ENGINE", "LENGTH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child[0], int(options.child[1]), options.threads)))
        return
    rows = []
    for length in options.lengths:
        runs: dict[str, list[dict[str, float]]] = {engine: [] for engine in ENGINES}
        for _ in range(options.repeats):
            for engine in ENGINES:
                runs[engine].append(in_process(engine, length, options.threads))
        rows += [summary(engine, length, runs) for engine in ENGINES]
        for row in rows[-len(ENGINES) :]:
            print(
                f"{length:6d} {row['engine']:13s} {row['seconds']:7.2f} s  {row['ratio_to_transformers']:.2f}x transformers' time, "
                f"peak {row['peak_memory_bytes'] / 2**20:.0f} MiB",
                flush=True,
            )
    result = {"stamp": stamp("torch", "transformers"), "model": "SmolLM2-135M-Instruct", "dtype": "float32", "threads": options.threads}
    print(write_result("smollm2_prefill", {**result, "text": "the Python language reference", "rows": rows}))


def in_process(engine: str, length: int, threads: int) -> dict[str, float]:
    """One measurement in a fresh process."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, __file__, "--child", engine, str(length), "--threads", str(threads)]
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def summary(engine: str, length: int, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """The medians of one engine at one length."""
    median = {name: statistics.median(run["seconds"] for run in group) for name, group in runs.items()}
    return {
        "engine": engine,
        "length": length,
        "seconds": median[engine],
        "all_seconds": [run["seconds"] for run in runs[engine]],
        "ratio_to_transformers": median[engine] / median["transformers"],
        "tokens_per_second": length / median[engine],
        "peak_memory_bytes": statistics.median(run["peak_memory_bytes"] for run in runs[engine]),
        "density": statistics.median(run["density"] for run in runs[engine]),
    }


def measure(engine: str, length: int, threads: int) -> dict[str, float]:
    """Seconds of one warm prefill, and this process's peak memory."""
    prefill = transformers_prefill(threads) if engine == "transformers" else our_prefill(engine)
    prefill(WARM_UP)
    begin = time.perf_counter()
    density = prefill(length)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "density": density, "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def transformers_prefill(threads: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32, attn_implementation="sdpa")
    token_ids = AutoTokenizer.from_pretrained(SMOLLM2)(prose(), return_tensors="pt").input_ids

    def prefill(length: int) -> float:
        with torch.inference_mode():
            model(token_ids[:, :length], logits_to_keep=1, use_cache=True)
        return 1.0

    return prefill


def our_prefill(name: str) -> Any:
    from unisparse_np import load
    from unisparse_np.config import PRESETS

    model, tokenizer = load(str(SMOLLM2), backend="reference")
    attention = "dense" if name == "dense" else PRESETS[name]()
    token_ids = tokenizer.encode(prose())

    def prefill(length: int) -> float:
        cache = model.new_cache(length, attention)
        model.prefill(token_ids[:length], cache, attention)
        return statistics.fmean(model.layer_densities(cache))

    return prefill


if __name__ == "__main__":
    main()
