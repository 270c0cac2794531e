"""An 8B-shaped Llama on one GPU against transformers on the same card: prefill, memory, decode.

    PYTHONPATH=. python benchmarks/llama_gpu.py [--longest 524288] [--only prefill,decode] [--flash]

The shape is Llama-3.1-8B's; weights are random bfloat16, made on the device. Random weights do not concentrate attention, so
the density of sparse attention is *given*: the real selection runs and is timed, then its mask is replaced by one that holds
the first block, the diagonal, the block before it, and as many random ones as the density asks for. Batch 1.
Each side runs in a process of its own, one after the other, transformers with cuDNN's kernels and, if asked, with FlashAttention 2's.
Kernels that a long prompt needs are compiled before its time is taken. Results go to benchmarks/results/llama_gpu_<device>.json,
which is written anew after every row.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.common import stamp, write_result
from benchmarks.given_density import LLAMA_3_1_8B, GivenDensity, prompt_of

PREFILL = {8192: 5, 32768: 2, 131072: 1}  # tokens: timed runs after one to warm up; 0: one run, warmed up by the shorter ones
WARM_UP_TOKENS = 8192  # the end of a long prompt, read to have its kernels compiled
DENSITIES = (0.5, 0.25, 0.10)
DECODE_CONTEXTS = (8192, 131072)
# Random keys make attention even, so a share P of the mass is about a share P of the blocks: P gives the density of sparse decode.
# With head_compress 1 each head selects alone, and what a group reads is the union of four random masks; with 4 they share one.
DECODE_TOP_P, DECODE_HEAD_COMPRESS = (0.25, 0.10), (1, 4)
DECODE_STEPS = 32
SDPA_KERNELS = {"cudnn": "CUDNN_ATTENTION", "flash": "FLASH_ATTENTION"}


def timed(run: Callable[[], Any], times: int) -> float:
    """Median seconds of `times` runs after one to warm up, or of one run alone for times = 0; each waits for the device itself."""
    if times:
        run()
    seconds = []
    for _ in range(max(1, times)):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


# ---- transformers ----
def transformers_rows(only: set[str], flash: bool) -> Iterator[dict[str, Any]]:
    import torch
    import transformers
    from torch.nn.attention import SDPBackend, sdpa_kernel

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_3_1_8B, attn_implementation="sdpa")).eval()

    def prefill(ids: Any) -> Any:
        with torch.inference_mode():
            answer = model(ids, use_cache=True, logits_to_keep=1)
        torch.cuda.synchronize()
        return answer

    def step(cache: Any) -> None:
        with torch.inference_mode():
            model(torch.zeros((1, 1), dtype=torch.long, device="cuda"), past_key_values=cache, use_cache=True)
        torch.cuda.synchronize()

    yield {"device": torch.cuda.get_device_name()}
    for name, kernel in SDPA_KERNELS.items():
        if name == "flash" and not flash:
            continue
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            for tokens, times in PREFILL.items() if "prefill" in only else ():
                if name == "flash" and tokens < max(PREFILL):
                    continue  # cuDNN's is the faster one: the baseline
                ids = torch.from_numpy(prompt_of(tokens))[None].cuda()
                row = {"work": "prefill", "tokens": tokens, "kernel": f"transformers {name}"}
                torch.cuda.reset_peak_memory_stats()
                try:
                    row["seconds"] = timed(lambda ids=ids: prefill(ids), 0 if name == "flash" else times)
                    row["peak_bytes"] = torch.cuda.max_memory_allocated()
                except torch.OutOfMemoryError:
                    row["out_of_memory"] = True
                yield row
    if "decode" in only:
        cache = prefill(torch.from_numpy(prompt_of(DECODE_CONTEXTS[0]))[None].cuda()).past_key_values
        seconds = timed(lambda: step(cache), DECODE_STEPS)
        yield {"work": "decode", "tokens": DECODE_CONTEXTS[0], "kernel": "transformers", "seconds": seconds}


# ---- ours ----
def ours_rows(only: set[str], longest: int) -> Iterator[dict[str, Any]]:
    from unisparse_np import UniSparseConfig

    model, sparse = new_llama(longest), UniSparseConfig()
    yield {"device": device_name()}
    if "prefill" in only:
        for tokens, times in PREFILL.items():
            yield prefill_row(model, tokens, "dense", None, times)
        yield prefill_row(model, min(PREFILL), sparse, DENSITIES[0], PREFILL[min(PREFILL)])
        warm_up(model, max(PREFILL), sparse)
        for density in DENSITIES:
            yield prefill_row(model, max(PREFILL), sparse, density, PREFILL[max(PREFILL)])
    if "decode" in only:
        yield read_row()
        sparser = [UniSparseConfig(top_p=share, head_compress=heads) for share in DECODE_TOP_P for heads in DECODE_HEAD_COMPRESS]
        for tokens in DECODE_CONTEXTS:
            yield from decode_rows(model, tokens, ("dense", *sparser))
    if "prefill" in only:  # the longest last: what a run that is stopped has measured by then is kept
        yield profile_row(model, max(PREFILL), DENSITIES[1])
        if longest > max(PREFILL):
            warm_up(model, longest, sparse)
            yield prefill_row(model, longest, sparse, DENSITIES[-1], 0)


def new_llama(longest: int) -> Any:
    import cupy

    from benchmarks.random_llama import random_llama
    from unisparse_np.attention import load_model_backend
    from unisparse_np.model.config import ModelConfig

    model = random_llama(ModelConfig.from_dict(LLAMA_3_1_8B), load_model_backend("cupy"), max(longest, 131072 + 8 * DECODE_STEPS))
    cupy.get_default_memory_pool().free_all_blocks()  # what drawing the numbers took
    return model


def device_name() -> str:
    import cupy

    name: str = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return name


def warm_up(model: Any, tokens: int, attention: Any) -> None:
    """Read only the end of a prompt, over zeros: compiles what all of it needs."""
    cache = model.new_cache(tokens, attention)
    for layer in range(model.config.num_hidden_layers):
        for keys_or_values in cache.upto(layer, tokens):
            keys_or_values[...] = 0
    cache.length = tokens - WARM_UP_TOKENS
    with GivenDensity(DENSITIES[-1]):
        model.prefill(prompt_of(WARM_UP_TOKENS).tolist(), cache, attention)
    cache.release()


def prefill_row(model: Any, tokens: int, attention: Any, density: float | None, times: int) -> dict[str, Any]:
    """One prompt length, `times` as in timed()."""
    import contextlib

    import cupy

    ids = prompt_of(tokens).tolist()
    densities: list[float] = []
    cupy.get_default_memory_pool().free_all_blocks()

    def run() -> None:
        cache = model.new_cache(tokens, attention)
        model.prefill(ids, cache, attention)  # the last logits come to the host: the device is done
        densities[:] = model.layer_densities(cache)

    with contextlib.nullcontext() if density is None else GivenDensity(density):
        seconds = timed(run, times)
    peak = cupy.cuda.runtime.memGetInfo()[1] - cupy.cuda.runtime.memGetInfo()[0]  # the pool keeps what it took
    row = {"work": "prefill", "tokens": tokens, "kernel": "ours", "seconds": seconds, "peak_bytes": peak}
    row |= {"given_density": density, "density": float(np.mean(densities))}
    return row


def profile_row(model: Any, tokens: int, density: float) -> dict[str, Any]:
    """Where a sparse prefill's time goes, and how long each part would take at the card's ceilings."""
    from benchmarks.device_times import DeviceTimes, matrix_ceiling
    from unisparse_np import UniSparseConfig
    from unisparse_np.gpu.cupy_kernels import layers, products, run

    config, attention = model.config, UniSparseConfig()
    functions = {
        "products": [(layers, "product_at"), (products, "product_at"), (layers, "head")],
        "attention": [(run, "attend")],
        "norms, rotary and pooling, swiglu": [(layers, name) for name in ("_norm_rows", "rotary_table", "rotate_heads", "_by_rows")],
    }
    cache = model.new_cache(tokens, attention)
    with GivenDensity(density):
        functions["selection"] = [(run, "_select")]  # the real one, its mask replaced
        model.prefill(prompt_of(8192).tolist(), model.new_cache(8192, attention), attention)
        with DeviceTimes(functions) as times:
            begin = time.perf_counter()
            model.prefill(prompt_of(tokens).tolist(), cache, attention)
            whole = time.perf_counter() - begin
        parts = times.seconds()
    parts["everything else, idle time included"] = whole - sum(parts.values())
    hidden, heads = config.hidden_size, config.num_attention_heads
    per_layer = hidden * ((2 * heads + 2 * config.num_key_value_heads) * config.head_dim + 3 * config.intermediate_size)
    flop = {
        "products": 2.0 * tokens * per_layer * config.num_hidden_layers,
        "attention": density * 2.0 * tokens**2 * config.head_dim * heads * config.num_hidden_layers,
    }
    rate = matrix_ceiling()
    row = {"work": "profile", "tokens": tokens, "kernel": "ours", "given_density": density, "seconds": whole, "parts": parts}
    return row | {"ceiling_seconds": {kind: value / rate for kind, value in flop.items()}, "matrix_flop_per_second": rate}


def decode_rows(model: Any, tokens: int, attentions: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Seconds a token behind a prompt, one attention after the other on one cache. The prompt is read sparsely: only its length matters."""
    import cupy

    from unisparse_np import UniSparseConfig

    sparse = UniSparseConfig()
    cache = model.new_cache(tokens + (DECODE_STEPS + 1) * len(attentions), sparse)
    with GivenDensity(DENSITIES[-1]):
        model.prefill(prompt_of(tokens).tolist(), cache, sparse)
    for attention in attentions:
        seconds = timed(functools.partial(model.step, 17, cache, attention), DECODE_STEPS)
        row = {"work": "decode", "tokens": tokens, "kernel": "ours dense", "seconds": seconds}
        if attention != "dense":
            row |= {"kernel": f"ours unisparse head_compress {attention.head_compress}", "given_density": attention.top_p}
            row |= selected_and_read(model, cache, attention)
        yield row
    del cache
    cupy.get_default_memory_pool().free_all_blocks()


def selected_and_read(model: Any, cache: Any, attention: Any) -> dict[str, float]:
    """Shares of the key blocks in the last layer's last step: those that a head selects, and those that some head of its group selects."""
    import cupy

    from unisparse_np.gpu.cupy_kernels.select import to_bool

    decoder = cache.decoders[(attention,) * model.config.num_hidden_layers]
    selector = decoder.attention_of(attention).selector
    mask = cupy.asnumpy(to_bool(selector.mask, selector.problem))[:, 0, : -(-cache.length // attention.block_size)]  # [Hq, Nk]
    of_groups = mask.reshape(model.config.num_key_value_heads, -1, mask.shape[1]).any(axis=1)
    return {"density": float(mask.mean()), "density_read": float(of_groups.mean())}


def read_row() -> dict[str, Any]:
    """How fast this card reads: 8 GB summed up by CuPy, bytes a second."""
    import cupy

    words = cupy.ones(1 << 31, np.float32)
    seconds = timed(lambda: (words.sum(), cupy.cuda.Device().synchronize()), 5)
    return {"work": "read", "kernel": "cupy sum", "seconds": seconds, "bytes_per_second": words.nbytes / seconds}


# ---- both, one after the other ----
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--longest", type=int, default=131072, help="tokens of one more sparse prefill (default: none beyond 131072)")
    parser.add_argument("--only", default="prefill,decode", help="comma-separated: prefill, decode")
    parser.add_argument("--sides", default="transformers,ours")
    parser.add_argument("--flash", action="store_true", help="also transformers with FlashAttention 2's kernels, 17 s more")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        only = set(arguments.only.split(","))
        for row in transformers_rows(only, arguments.flash) if arguments.side == "transformers" else ours_rows(only, arguments.longest):
            print(json.dumps(row), flush=True)
        return
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for side in arguments.sides.split(","):
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith("{"):  # what a library prints
                    print(line, end="", flush=True)
                    continue
                rows.append(json.loads(line))
                report(rows, failed)
        if process.returncode:
            failed.append(side)
            report(rows, failed)
    sys.exit(1 if failed else 0)


def show(row: dict[str, Any]) -> None:
    print(" ".join(f"{key}={value:.5g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()), flush=True)


def report(rows: list[dict[str, Any]], failed: list[str]) -> None:
    """Show the newest row with its ratio within this run, and write the file; `failed` names sides that ended early: what they had
    measured is kept."""
    measured = [row for row in rows if "work" in row]
    baseline = {row["tokens"]: row.get("seconds") for row in measured if row["kernel"] == "transformers cudnn" and row["work"] == "prefill"}
    for row in measured:
        if row["work"] == "prefill" and row["kernel"] == "ours" and baseline.get(row["tokens"]):
            row["times_faster_than_cudnn"] = baseline[row["tokens"]] / row["seconds"]
    show(rows[-1])
    device = rows[0]["device"]
    about = {"stamp": about_this_run(), "device": device, "config": LLAMA_3_1_8B, "failed": failed}
    write_result(f"llama_gpu_{device.lower().replace(' ', '_')}", about | {"rows": measured})


@functools.lru_cache
def about_this_run() -> dict[str, Any]:
    return stamp("cupy-cuda13x", "torch", "transformers")


if __name__ == "__main__":
    main()
