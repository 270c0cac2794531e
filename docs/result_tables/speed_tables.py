"""The tables of how long attention, selection and whole models take, on processors and GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from result_tables.tables import GPU, Row, Table, number, text


def gpu_attention_rows(result: dict[str, Any]) -> list[Row]:
    """Each attention call beside the peers that ran the same work in the same run."""
    times = {(row["work"], row["length"], row.get("density"), row["kernel"]): row for row in result["rows"] if is_plain(row)}
    rows = []
    for (work, length, density, kernel), row in times.items():
        if kernel not in ("ours", "ours sm80") or work not in ("dense", "sparse", "whole call"):
            continue
        peers = {name: times.get((work, length, density, name)) for name in ("cudnn", "flash", "flex")}
        if work == "whole call":  # selection included, beside dense attention
            peers = {name: times.get(("dense", length, None, name)) for name in ("cudnn", "flash")} | {"flex": None}
        title = work + (", portable kernel" if kernel == "ours sm80" else "")
        rows.append({"work": title, "length": length, "density": density, "ours": row, "peers": peers})
    return rows


def is_plain(row: Row) -> bool:
    """Heads of 128, blocks of 128."""
    return row.get("head_dim", 128) == 128 and row.get("block_size", 128) == 128


def times_faster(name: str) -> Callable[[Row], str]:
    """How many times the peer's time ours is shorter."""
    return lambda row: f"{row['peers'][name]['ms'] / row['ours']['ms']:.2f}" if row["peers"][name] else ""


def selection_rows(result: dict[str, Any]) -> list[Row]:
    """One row per selection: the stages, and all of it."""
    selections: dict[tuple[str, int], Row] = {}
    for row in result["rows"]:
        if row["work"].startswith("selection"):
            selection = selections.setdefault((row["work"], row["length"]), {"work": row["work"], "length": row["length"]})
            selection[row["kernel"]] = row["ms"]
    return list(selections.values())


def reading_order(row: Row) -> tuple:
    """Prefill before decode, short before long, transformers before us, dense before sparse."""
    return (row["work"] == "decode", row["tokens"], not row["kernel"].startswith("transformers"), -(row.get("density") or 1))


def llama_rows(result: dict[str, Any]) -> list[Row]:
    """Prefill and decode of the 8B shape, transformers' rows first; sparse steps beside dense ones behind as many tokens."""
    rows = [row for row in result["rows"] if row["work"] in ("prefill", "decode") and "aside" not in row]
    rows.sort(key=reading_order)
    dense = {row["tokens"]: row["seconds"] for row in rows if row["kernel"] == "ours dense"}
    for row in rows:
        if row["work"] == "decode" and row["tokens"] in dense:
            row["times_faster_than_our_dense"] = dense[row["tokens"]] / row["seconds"]
    return rows


def density_of(row: Row) -> str:
    """Measured, or what was asked of a decode step; nothing for the peer."""
    return "" if row["kernel"].startswith("transformers") else f"{row.get('density') or row.get('given_density') or 1:.2f}"


def profile_rows(result: dict[str, Any]) -> list[Row]:
    """The parts of one prefill, with the time that the card's matrix ceiling would allow."""
    profile = next(row for row in result["rows"] if row["work"] == "profile")
    ceiling = profile["ceiling_seconds"]
    return [
        {"part": part, "seconds": seconds, "share": seconds / profile["seconds"], "ceiling": ceiling.get(part)}
        for part, seconds in profile["parts"].items()
    ]


def first_token_rows(result: dict[str, Any]) -> list[Row]:
    """One row an engine."""
    return [{"engine": engine, **row} for engine, row in result["speed"]["rows"].items()]


ATTENTION_TABLES: list[tuple[str, Table]] = [
    (
        f"attention_gpu_{GPU}",
        Table(
            "How fast is attention on a GPU? CuPy kernels, q [32, L, 128], k, v [8, L, 128], bfloat16, causal; times faster than PyTorch's "
            "cuDNN and FlashAttention 2, and than FlexAttention on the same block mask",
            {
                "work": text("work"),
                "tokens": number("length", ","),
                "density": lambda row: f"{row['density'] or 1:.3f}",
                "ms": lambda row: f"{row['ours']['ms']:.2f}",
                "TFLOP/s": lambda row: f"{row['ours']['tflops']:.0f}" if "tflops" in row["ours"] else "",
                "x cuDNN": times_faster("cudnn"),
                "x FlashAttention 2": times_faster("flash"),
                "x FlexAttention": times_faster("flex"),
            },
            gpu_attention_rows,
        ),
    ),
    (
        f"attention_gpu_{GPU}",
        Table(
            "And choosing the blocks? Milliseconds of the same run",
            {
                "work": text("work"),
                "tokens": number("length", ","),
                "compress": number("compress", ".3f"),
                "score_blocks": number("score_blocks", ".3f"),
                "select_blocks": number("select_blocks", ".3f"),
                "all": number("all", ".3f"),
            },
            selection_rows,
        ),
    ),
    (
        "numba_gpu",
        Table(
            "And the Numba kernels, written to be followed? All read the same 8,192 tokens, q [32, L, 128], k, v [8, L, 128], causal",
            {"kernel": text("kernel"), "work": text("work"), "ms": number("ms", ".2f"), "TFLOP/s": number("tflops", ".2f")},
            lambda result: result["times"],
        ),
    ),
]

MODEL_TABLES: list[tuple[str, Table]] = [
    (
        f"llama_gpu_{GPU}",
        Table(
            "How long does an 8B model take on one GPU? Llama-3.1-8B's shape, random bfloat16 weights, batch 1; the density of sparse "
            "attention is given, because random weights concentrate nothing; transformers with cuDNN's attention",
            {
                "work": text("work"),
                "tokens": number("tokens", ","),
                "engine": text("kernel"),
                "density": density_of,
                "blocks read": number("density_read", ".2f"),
                "seconds": lambda row: f"{row['seconds']:.4f}" if "seconds" in row else "out of memory",
                "x transformers, cuDNN": number("times_faster_than_cudnn", ".2f"),
                "x our dense": number("times_faster_than_our_dense", ".2f"),
                "peak memory, GB": lambda row: f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "",
            },
            llama_rows,
        ),
    ),
    (
        f"llama_gpu_{GPU}",
        Table(
            "Where does the time of 131,072 tokens at 25% density go?",
            {
                "part": text("part"),
                "seconds": number("seconds", ".2f"),
                "share": number("share", ".0%"),
                "at the matrix ceiling, s": number("ceiling", ".2f"),
            },
            profile_rows,
        ),
    ),
    (
        f"llama_parity_gpu_{GPU}",
        Table(
            "And a small one? SmolLM2-135M-Instruct in bfloat16, a prompt of 8,128 tokens, warm",
            {
                "engine": text("engine"),
                "first token, ms": lambda row: f"{1e3 * row['seconds_to_first_token']:.1f}",
                "x transformers": number("times_faster_to_first_token", ".2f"),
                "tokens/s after it": number("tokens_per_second", ",.0f"),
                "density": number("density", ".3f"),
            },
            first_token_rows,
        ),
    ),
]

SEVERAL_GPUS_TABLES: list[tuple[str, Table]] = [
    (
        f"llama_multi_gpu_{GPU}",
        Table(
            "How long does a prompt take several GPUs? Random bfloat16 weights in the shape of Llama-3.1's 8B and 70B, given density",
            {
                "shape": text("shape"),
                "tokens": number("tokens", ","),
                "density": number("density", ".2f"),
                "tensor-parallel": text("tensor"),
                "context-parallel": text("context"),
                "seconds": number("seconds", ".2f"),
                "x one GPU": number("speedup", ".2f"),
                "in exchanges": number("exchange_share", ".1%"),
            },
        ),
    ),
]

CPU_TABLES: list[tuple[str, Table]] = [
    (
        "smollm2_prefill",
        Table(
            "How long does a prompt take on a CPU? SmolLM2-135M-Instruct in float32, beside transformers (SDPA) on as many threads",
            {
                "prompt tokens": number("length", ","),
                "engine": text("engine"),
                "seconds": number("seconds", ".2f"),
                "times transformers": number("ratio_to_transformers", ".2f"),
                "tokens/s": number("tokens_per_second", ",.0f"),
                "peak memory, MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                "density": number("density", ".3f"),
            },
        ),
    ),
    (
        "decode_speed",
        Table(
            "How fast is a generated token on a CPU, and what grows with the context?",
            {
                "model": text("model"),
                "decode attention": text("decode_attention"),
                "context": number("context", ","),
                "tokens/s": number("tokens_per_second", ".1f"),
                "a step, ms": number("step_ms", ".2f"),
                "attention in it, ms": number("attention_ms", ".2f"),
            },
            lambda result: [row for row in result["rows"] if row["context"] in (128, 2048, 8000)],
        ),
    ),
]
