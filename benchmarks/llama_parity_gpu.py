"""SmolLM2 on one GPU against transformers on the same card and run: the same greedy answers? How long to the first token?

    make smollm2 && PYTHONPATH=. python benchmarks/llama_parity_gpu.py [--only answers,speed,cold]

answers: 20 prompts of 20 to 1,900 tokens (prose and code that come with Python), 32 greedy tokens each, dense attention, both
    in bfloat16. Where an answer parts from transformers', both sides' logits of the two tokens at that place are kept, with
    those of a float32 run: it counts as rounding where transformers' two logits lie within two of bfloat16's steps.
speed: a prompt of 8,128 tokens, warm, from token ids to the first token on the host, and tokens a second after it.
cold: `unisparse-np generate` in a new process, first with nothing compiled, then with CuPy's cache filled.
Results go to benchmarks/results/llama_parity_gpu_<device>.json; parts that are not run again stay, each with its own stamp.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import cupy
import numpy as np

from benchmarks.common import RESULTS, SMOLLM2, code, prose, stamp, write_result
from unisparse_np import UniSparseConfig, load

LENGTHS = (20, 28, 40, 56, 70, 80, 110, 150, 170, 200, 240, 270, 360, 480, 640, 850, 1100, 1300, 1600, 1900)
NEW_TOKENS = 32
CHARACTERS_APART = 20_011  # between the places where prompts begin
LONG_PROMPT, LONG_ANSWER = 8128, 64
WARM_RUNS, COLD_RUNS = 6, 3


def prompts(tokenizer: Any) -> list[tuple[str, list[int]]]:
    """Kind of text and token ids, prose and code in turn."""
    made = []
    for number, length in enumerate(LENGTHS):
        kind, text = (("prose", prose()), ("code", code()))[number % 2]
        start = number * CHARACTERS_APART % (len(text) // 2)
        made.append((kind, tokenizer.encode(text[start : start + 12 * length + 200])[:length]))
    return made


# ---- answers ----
def compare_answers(model: Any, judge: Any, tokenizer: Any) -> dict[str, Any]:
    exact = open_judge("float32")
    rows = []
    for kind, prompt in prompts(tokenizer):
        mine, my_logits = greedily(model, prompt)
        theirs = judge_greedily(judge, prompt)
        row: dict[str, Any] = {"text": kind, "prompt_tokens": len(prompt), "equal": mine == theirs}
        if mine != theirs:
            place = next(n for n, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            pair = [mine[place], theirs[place]]
            judged = judge_logits(judge, [*prompt, *mine[:place]])
            step = 2.0 ** (math.floor(math.log2(float(judged[pair].abs().max()))) - 7)  # between neighbouring bfloat16 numbers
            row |= {
                "differs_at": place,
                "tokens": [tokenizer.decode([token]) for token in pair],
                "our_logits": [float(my_logits[place][token]) for token in pair],
                "transformers_logits": [float(judged[token]) for token in pair],
                "float32_logits": [float(value) for value in judge_logits(exact, [*prompt, *mine[:place]])[pair]],
                "bfloat16_step": step,
                "within_rounding": bool(abs(judged[pair[0]] - judged[pair[1]]) <= 2 * step),
            }
        rows.append(row)
        print(row, flush=True)
    return {
        "new_tokens": NEW_TOKENS,
        "prompts": len(rows),
        "equal": sum(row["equal"] for row in rows),
        "differ_within_rounding": sum(row.get("within_rounding", False) for row in rows),
        "differ_otherwise": sum(not row.get("within_rounding", True) for row in rows),
        "rows": rows,
    }


def greedily(model: Any, prompt: list[int]) -> tuple[list[int], list[np.ndarray]]:
    """Our next tokens, and the logits that each was chosen from."""
    cache = model.new_cache(len(prompt) + NEW_TOKENS)
    logits = [model.prefill(prompt, cache, "dense")]
    chosen = [int(logits[0].argmax())]
    while len(chosen) < NEW_TOKENS:
        logits.append(model.step(chosen[-1], cache, "dense"))
        chosen.append(int(logits[-1].argmax()))
    cache.release()
    return chosen, logits


def open_judge(dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    return AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=getattr(torch, dtype), attn_implementation="sdpa").cuda().eval()


def judge_greedily(judge: Any, prompt: list[int]) -> list[int]:
    import torch

    ids = torch.tensor([prompt], device="cuda")
    out = judge(ids, use_cache=True, logits_to_keep=1)
    chosen = [int(out.logits[0, -1].argmax())]
    while len(chosen) < NEW_TOKENS:
        out = judge(torch.tensor([[chosen[-1]]], device="cuda"), past_key_values=out.past_key_values, use_cache=True)
        chosen.append(int(out.logits[0, -1].argmax()))
    return chosen


def judge_logits(judge: Any, ids: list[int]) -> Any:
    import torch

    return judge(torch.tensor([ids], device="cuda"), logits_to_keep=1).logits[0, -1].float().cpu()


# ---- speed ----
def measure_speed(model: Any, judge: Any, tokenizer: Any) -> dict[str, Any]:
    prompt = tokenizer.encode(prose())[:LONG_PROMPT]
    rows = {}
    for name, measure in {
        "ours unisparse": lambda: our_speed(model, prompt, UniSparseConfig()),
        "ours dense": lambda: our_speed(model, prompt, "dense"),
        "transformers": lambda: judge_speed(judge, prompt),
    }.items():
        rows[name] = measure()
        print(name, rows[name], flush=True)
    first = {name: row["seconds_to_first_token"] for name, row in rows.items()}
    for name, row in rows.items():
        row["times_faster_to_first_token"] = first["transformers"] / row["seconds_to_first_token"]
        print(f"{name}: {row['times_faster_to_first_token']:.2f} times faster than transformers", flush=True)
    return {"prompt_tokens": LONG_PROMPT, "rows": rows}


def our_speed(model: Any, prompt: list[int], attention: Any) -> dict[str, Any]:
    seconds, rates, densities = [], [], []
    sampler = model.backend.new_sampler(0.0, 0, 1.0, 0.0, 1.0, None, model.config.vocab_size)
    for _ in range(WARM_RUNS + 1):
        begin = time.perf_counter()
        cache = model.new_cache(LONG_PROMPT + LONG_ANSWER, attention)
        token = sampler(model.prefill_on_backend(prompt, cache, attention), prompt)
        seconds.append(time.perf_counter() - begin)
        for _ in range(2):  # compiles and records the step
            token = sampler(model.step_on_backend(token, cache, "dense"), prompt)
        begin = time.perf_counter()
        for _ in range(LONG_ANSWER - 3):
            token = sampler(model.step_on_backend(token, cache, "dense"), prompt)
        rates.append((LONG_ANSWER - 3) / (time.perf_counter() - begin))
        densities = model.layer_densities(cache)
        cache.release()
    return {
        "seconds_to_first_token": statistics.median(seconds[1:]),
        "first_run_seconds": seconds[0],
        "tokens_per_second": statistics.median(rates[1:]),
        "density": float(np.mean(densities)),
    }


def judge_speed(judge: Any, prompt: list[int]) -> dict[str, Any]:
    import torch

    seconds, rates = [], []
    for _ in range(WARM_RUNS + 1):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        out = judge(torch.tensor([prompt], device="cuda"), use_cache=True, logits_to_keep=1)
        token = int(out.logits[0, -1].argmax())
        seconds.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        for _ in range(16):
            out = judge(torch.tensor([[token]], device="cuda"), past_key_values=out.past_key_values, use_cache=True)
            token = int(out.logits[0, -1].argmax())
        rates.append(16 / (time.perf_counter() - begin))
    return {
        "seconds_to_first_token": statistics.median(seconds[1:]),
        "first_run_seconds": seconds[0],
        "tokens_per_second": statistics.median(rates[1:]),
    }


# ---- cold start ----
def measure_cold_start() -> dict[str, Any]:
    """Seconds of the whole process, and what `generate` itself reports."""
    command = [sys.executable, "-m", "unisparse_np", "generate", "-m", str(SMOLLM2), "--backend", "cupy", "--json", "-n", "1"]
    command += ["--text", "What is the capital of France?"]
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "CUPY_CACHE_DIR": f"{cache}/cupy", "PYTHONPYCACHEPREFIX": f"{cache}/python"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package has its bytecode
        for _ in range(COLD_RUNS + 1):
            begin = time.perf_counter()
            answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            seconds = time.perf_counter() - begin
            facts = json.loads(answer.stdout)["statistics"]
            names = ("load_seconds", "time_to_first_token", "compile_seconds")
            rows.append({"seconds": seconds, **{name: facts[name] for name in names}})
            print("cold", rows[-1], flush=True)
    return {"nothing_compiled": rows[0], "compiled_before": rows[1:], "seconds": statistics.median(row["seconds"] for row in rows[1:])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cold,speed,answers", help="comma-separated: cold, speed, answers")
    only = parser.parse_args().only.split(",")
    device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    name, now = f"llama_parity_gpu_{device.lower().replace(' ', '_')}", stamp("cupy-cuda13x", "torch", "transformers")
    before = RESULTS / f"{name}.json"
    result: dict[str, Any] = json.loads(before.read_text()) if before.exists() else {}
    result |= {"stamp": now, "device": device, "model": "SmolLM2-135M-Instruct"}

    def keep(part: str, found: dict[str, Any]) -> None:
        result[part] = {"stamp": now} | found
        print(write_result(name, result), flush=True)

    if "cold" in only:
        keep("cold_start", measure_cold_start())
    if {"speed", "answers"} & set(only):
        model, tokenizer = load(SMOLLM2, backend="cupy", dtype="bfloat16")
        judge = open_judge("bfloat16")
    if "speed" in only:
        keep("speed", measure_speed(model, judge, tokenizer))
    if "answers" in only:
        keep("answers", compare_answers(model, judge, tokenizer))


if __name__ == "__main__":
    main()
