"""How fast is a generated token, and what grows with the context? Both models on the CPU, dense and sparse decode.

    make smollm2 && python benchmarks/decode_speed.py

A step is timed after contexts of growing length, the attention calls in it apart: only these may grow. Medians of --steps steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

from common import NEEDLE_LLAMA, SMOLLM2, prose, stamp, write_result

from unisparse_np import UniSparseConfig, load
from unisparse_np.model import llama

MODELS = {"needle-llama": NEEDLE_LLAMA, "SmolLM2-135M-Instruct": SMOLLM2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 1024, 2048, 4096, 8000])
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    rows = []
    for name, folder in MODELS.items():
        for decode_attention in ("dense", "unisparse"):
            rows += measure(name, folder, decode_attention, options.contexts, options.steps)
    print(write_result("decode_speed", {"stamp": stamp(), "steps": options.steps, "rows": rows}))


def measure(name: str, folder: Path, decode_attention: str, contexts: list[int], steps: int) -> list[dict[str, Any]]:
    """One row per context: milliseconds of a step, of the attention in it, and of the rest."""
    model, tokenizer = load(str(folder), backend="reference")
    token_ids = tokenizer.encode(prose())[: max(contexts)]
    attention: Any = "dense" if decode_attention == "dense" else UniSparseConfig()
    cache = model.new_cache(max(contexts) + len(contexts) * (steps + 1), UniSparseConfig())
    rows = []
    for context in contexts:
        model.prefill(token_ids[cache.length : context], cache, UniSparseConfig())
        whole, inside = time_steps(model, cache, attention, token_ids[0], steps)
        rows.append({
            "model": name, "decode_attention": decode_attention, "context": context, "step_ms": whole, "attention_ms": inside,
            "rest_ms": whole - inside, "tokens_per_second": 1000 / whole,
        })  # fmt: skip
        print(f"{name:22s} {decode_attention:9s} {context:5d}  {whole:7.2f} ms a token, attention {inside:6.2f}", flush=True)
    return rows


def time_steps(model: Any, cache: Any, attention: Any, token_id: int, steps: int) -> tuple[float, float]:
    """Median milliseconds of a step, and of the attention calls within one."""
    in_attention = [0.0]

    def timed(*args: Any, **keywords: Any) -> Any:
        begin = time.perf_counter()
        try:
            return plain(*args, **keywords)
        finally:
            in_attention[0] += time.perf_counter() - begin

    plain, llama.attend = llama.attend, timed
    whole, inside = [], []
    try:
        for _ in range(steps + 1):
            in_attention[0] = 0.0
            begin = time.perf_counter()
            model.step(token_id, cache, attention)
            whole.append(1000 * (time.perf_counter() - begin))
            inside.append(1000 * in_attention[0])
    finally:
        llama.attend = plain
    return statistics.median(whole[1:]), statistics.median(inside[1:])  # the first one is the warm-up


if __name__ == "__main__":
    main()
