"""Figures of whole models on one and several GPUs beside what was asked of them: Llama-3.1-8B's shape, and SmolLM2-135M-Instruct."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from result_tables.figures import Figure, Values, ratio, value
from result_tables.tables import GPU, Row

LARGE, SMALL, SEVERAL = (f"llama_gpu_{GPU}",), (f"llama_parity_gpu_{GPU}",), (f"llama_multi_gpu_{GPU}",)
# Reading the weights of the 8B shape alone, 15.0 GB, at the 3.95 TB/s that such reads reach on an H200.
WEIGHTS_SECONDS = 3.8e-3


def prefill_over_cudnn(*cases: tuple[int, float | None]) -> Callable[[dict[str, Any]], Values]:
    """How many times faster than transformers with cuDNN's attention a prompt is read; cases: tokens and given density."""
    return lambda result: tuple(
        value(result, "times_faster_than_cudnn", work="prefill", kernel="ours", tokens=tokens, given_density=density)
        for tokens, density in cases
    )


def our_prompts(result: dict[str, Any]) -> list[Row]:
    """The rows of prompts that were read to their end."""
    return [row for row in result["rows"] if row["work"] == "prefill" and row["kernel"] == "ours" and "seconds" in row]


def peak_gigabytes(result: dict[str, Any]) -> Values:
    """The most that a prompt of 128K took, dense or sparse."""
    peaks = [row["peak_bytes"] for row in our_prompts(result) if row["tokens"] == 131072]
    return (max(peaks) / 1e9 if peaks else None,)


def longest_prompt(result: dict[str, Any]) -> Values:
    """Thousands of tokens, in powers of two, of the longest prompt."""
    read = [row["tokens"] for row in our_prompts(result)]
    return (max(read) / 1024 if read else None,)


def step_over_weights(result: dict[str, Any]) -> Values:
    """A dense step behind 8K tokens over the time of reading the weights alone."""
    return (ratio(value(result, "seconds", work="decode", kernel="ours dense", tokens=8192), WEIGHTS_SECONDS),)


def sparse_step(head_compress: int) -> Callable[[dict[str, Any]], Values]:
    """How many times faster than a dense step behind 128K tokens one is that keeps at most a quarter of the blocks."""

    def measured(result: dict[str, Any]) -> Values:
        dense = value(result, "seconds", work="decode", kernel="ours dense", tokens=131072)
        kernel = f"ours unisparse head_compress {head_compress}"
        return (ratio(dense, value(result, "seconds", work="decode", kernel=kernel, tokens=131072, given_density=0.25)),)

    return measured


def first_token(result: dict[str, Any]) -> Values:
    """Times faster than transformers, dense and sparse."""
    rows = result["speed"]["rows"]
    return tuple(rows[engine]["times_faster_to_first_token"] if engine in rows else None for engine in ("ours dense", "ours unisparse"))


def cold_start(result: dict[str, Any]) -> Values:
    """Median seconds of `generate` in a new process, kernels compiled before."""
    return (statistics.median(run["seconds"] for run in result["cold_start"]["compiled_before"]),)


def best_split(gpus: int, key: str) -> Callable[[dict[str, Any]], Values]:
    """A figure of the fastest way to share 128K tokens at 25% density out to so many GPUs."""

    def measured(result: dict[str, Any]) -> Values:
        case = {"shape": "8B", "tokens": 131072, "given_density": 0.25}
        rows = [row for row in result["rows"] if row["tensor"] * row["context"] == gpus and case.items() <= row.items()]
        return (min(rows, key=lambda row: row["seconds"])[key] if rows else None,)

    return measured


MODEL_FIGURES = [
    Figure(
        "8B shape, dense prompt of 8K / 32K, times the speed of transformers with cuDNN's attention",
        LARGE,
        prefill_over_cudnn((8192, None), (32768, None)),
        asked=(1.0, 1.05),
        goal=(1.15, 1.2),
    ),
    Figure(
        "128K at 50% / 25% / 10% of the blocks, times transformers dense",
        LARGE,
        prefill_over_cudnn((131072, 0.5), (131072, 0.25), (131072, 0.1)),
        asked=(1.7, 2.3, 2.8),
        goal=(1.9, 2.65, 3.25),
    ),
    Figure("peak memory at 128K, GB", LARGE, peak_gigabytes, asked=(40,), goal=(35.5,), form="{:.1f}", less_is_better=True),
    Figure("longest prompt on one card of 141 GB, K tokens", LARGE, longest_prompt, asked=(512,), goal=(768,), form="{:.0f}"),
    Figure(
        "a step behind 8K tokens, times what reading the weights takes (3.8 ms)",
        LARGE,
        step_over_weights,
        asked=(1.35,),
        goal=(1.15,),
        less_is_better=True,
    ),
    Figure("a sparse step behind 128K, heads of a group choose together, times dense", LARGE, sparse_step(4), asked=(1.3,), goal=(1.5,)),
    Figure("the same, each head chooses alone", LARGE, sparse_step(1), asked=(1.3,), goal=(1.5,)),
    Figure(
        "SmolLM2, first token of an 8K prompt, warm, dense / sparse, times transformers",
        SMALL,
        first_token,
        asked=(2.0, 2.0),
        goal=(4.0, 4.0),
    ),
    Figure(
        "SmolLM2, `generate` from nothing to its end, kernels compiled before, s",
        SMALL,
        cold_start,
        asked=(4.0,),
        goal=(2.0,),
        less_is_better=True,
    ),
]

SEVERAL_GPUS_FIGURES = [
    Figure(f"{gpus} GPUs, times the speed of one", SEVERAL, best_split(gpus, "speedup"), asked=(asked,), goal=(gpus,))
    for gpus, asked in ((2, 1.75), (4, 3.2), (8, 5.6))
] + [
    Figure(
        f"{gpus} GPUs, share of the time in exchanges",
        SEVERAL,
        best_split(gpus, "exchange_share"),
        asked=(0.12,),
        goal=(0.12,),
        form="{:.1%}",
        less_is_better=True,
    )
    for gpus in (2, 4, 8)
]
