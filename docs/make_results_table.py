"""Write the measured tables of README.md, between its markers, from benchmarks/results/*.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from quality_rows import loss_at_density, loss_rows, tune_rows

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- results: written by docs/make_results_table.py -->", "<!-- end of results -->"
NONE_YET = "None yet.\n\n"


Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """How one result is shown. columns: heading -> how to write it from a row; rows: where the rows are in the file."""

    question: str
    columns: dict[str, Callable[[Row], str]]
    rows: Callable[[dict[str, Any]], list[Row]] = lambda result: result["rows"]


def preset_rows(result: dict[str, Any]) -> list[Row]:
    """One row for each kind of text and preset."""
    return [{"text": kind, "preset": preset, **values} for kind, presets in result["presets"].items() for preset, values in presets.items()]


QUALITY_COLUMNS: dict[str, Callable[[Row], str]] = {
    "text": lambda row: row["text"],
    "preset": lambda row: row["preset"],
    "KL from dense, per token": lambda row: f"{row['kl']:.4f}",
    "same likeliest token": lambda row: f"{row['top1']:.3f}",
    "rise of the loss, nats": lambda row: f"{row['nll_rise']:+.4f}",
    "density": lambda row: f"{row['density']:.3f}",
}


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
        if kernel == "ours sm80":
            peers = {name: times.get((work, length, density, name)) for name in ("cudnn", "flash")} | {"flex": None}
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
    """Prefill and decode of the 8B shape, transformers' rows first; a decode step beside what reading the weights alone would take."""
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


def number(name: str, form: str) -> Callable[[Row], str]:
    """A number of the row, or nothing where it has none."""
    return lambda row: "" if row.get(name) is None else format(row[name], form)


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


GPU = "nvidia_h200"  # whose results are shown

TABLES: list[tuple[str, Table]] = [
    (
        "needle_accuracy",
        Table(
            "Does sparse attention lose needles? needle-llama on its own tasks, share of right answers",
            {
                "prompt tokens": lambda row: f"{row['length']:,}",
                "attention": lambda row: row["config"],
                "questions": lambda row: str(row["questions"]),
                "accuracy": lambda row: f"{row['accuracy']:.3f} ± {row['interval_95']:.3f}",
                "share of dense": lambda row: f"{row['share_of_dense']:.3f}",
                "density": lambda row: f"{row['density']:.3f}",
            },
        ),
    ),
    (
        "selection_rules_text_8192",
        Table(
            "What does sparse attention lose, and at which density? SmolLM2-135M-Instruct on 8,192 tokens of text and in quoting from "
            "them, needle-llama on the tasks that dense attention solves to 80%; [ ] are 95% intervals, selection is the share of dense "
            "attention's products that choosing the blocks takes, and more rules are in [selection_rules.md](docs/selection_rules.md)",
            {
                "attention": lambda row: row["attention"],
                "text: KL from dense, per token": loss_at_density("text", "kl", ".4f", "kl_interval"),
                "quoting: NLL over dense": loss_at_density("copy_8192", "nll_over_dense", "+.3f", "nll_interval"),
                "needles kept, 4K": loss_at_density("needles_4096", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
                "8K": loss_at_density("needles_8192", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
                "16K": loss_at_density("needles_16384", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
                "selection": lambda row: f"{row['text']['selection']:.3f}",
            },
            loss_rows,
        ),
    ),
    (
        "tune_smollm2_8192",
        Table(
            "What does `tune` find for a model? SmolLM2-135M-Instruct, 8,192 tokens of prose, code and plays, loss at most 0.02, on "
            "windows that the search has not seen; cost is selection and attention as a share of dense attention's products",
            {
                "config": lambda row: row["config"],
                "KL from dense, per token": lambda row: f"{row['kl']:.4f} [{row['kl_interval'][0]:.4f}, {row['kl_interval'][1]:.4f}]",
                "density": lambda row: f"{row['density']:.3f}",
                "cost": lambda row: f"{row['cost']:.3f}",
            },
            tune_rows,
        ),
    ),
    (
        "smollm2_quality_4096",
        Table("What does it change in a real model? SmolLM2-135M-Instruct, 4,096 tokens", QUALITY_COLUMNS, preset_rows),
    ),
    ("smollm2_quality_8192", Table("The same at 8,192 tokens", QUALITY_COLUMNS, preset_rows)),
    (
        "decode_quality",
        Table(
            "And sparse steps, `--decode-attention unisparse`? SmolLM2-135M-Instruct, the last 128 of 8,192 tokens, beside dense "
            "steps after a dense prompt",
            {
                "prompt": lambda row: row["prefill"],
                "steps": lambda row: row["decode"],
                "KL from dense, per token [95%]": lambda row: f"{row['kl']:.4f} [{row['kl_interval'][0]:.4f}, {row['kl_interval'][1]:.4f}]",
                "same likeliest token": lambda row: f"{row['top1']:.3f}",
                "rise of the loss, nats": lambda row: f"{row['nll_rise']:+.4f}",
                "density of the steps": lambda row: f"{row['density']:.3f}",
            },
            lambda result: result["text"]["rows"][1:],
        ),
    ),
    (
        "decode_quality",
        Table(
            "And needles, answered with sparse steps? needle-llama's own tasks at 8,192 tokens",
            {
                "prompt": lambda row: row["prefill"],
                "steps": lambda row: row["decode"],
                "questions": lambda row: str(row["questions"]),
                "accuracy [95%]": lambda row: f"{row['accuracy']:.3f} [{row['interval'][0]:.3f}, {row['interval'][1]:.3f}]",
                "share of dense": lambda row: f"{row['share_of_dense']:.3f}",
            },
            lambda result: result["needles"]["rows"],
        ),
    ),
    (
        "smollm2_prefill",
        Table(
            "How long does a prompt take on a CPU? SmolLM2-135M-Instruct in float32, beside transformers (SDPA) on as many threads",
            {
                "prompt tokens": lambda row: f"{row['length']:,}",
                "engine": lambda row: row["engine"],
                "seconds": lambda row: f"{row['seconds']:.2f}",
                "times transformers": lambda row: f"{row['ratio_to_transformers']:.2f}",
                "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
                "peak memory, MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
                "density": lambda row: f"{row['density']:.3f}",
            },
        ),
    ),
    (
        f"attention_gpu_{GPU}",
        Table(
            "How fast is attention on a GPU? CuPy kernels, q [32, L, 128], k, v [8, L, 128], bfloat16, causal; times faster than PyTorch's "
            "cuDNN and FlashAttention 2, and than FlexAttention on the same block mask",
            {
                "work": lambda row: row["work"],
                "tokens": lambda row: f"{row['length']:,}",
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
                "work": lambda row: row["work"],
                "tokens": lambda row: f"{row['length']:,}",
                "compress": lambda row: f"{row['compress']:.3f}",
                "score_blocks": lambda row: f"{row['score_blocks']:.3f}",
                "select_blocks": lambda row: f"{row['select_blocks']:.3f}",
                "all": lambda row: f"{row['all']:.3f}",
            },
            selection_rows,
        ),
    ),
    (
        "numba_gpu",
        Table(
            "And the Numba kernels, written to be followed? All read the same 8,192 tokens, q [32, L, 128], k, v [8, L, 128], causal",
            {
                "kernel": lambda row: row["kernel"],
                "work": lambda row: row["work"],
                "ms": lambda row: f"{row['ms']:.2f}",
                "TFLOP/s": lambda row: f"{row['tflops']:.2f}" if "tflops" in row else "",
            },
            lambda result: result["times"],
        ),
    ),
    (
        f"llama_gpu_{GPU}",
        Table(
            "How long does an 8B model take on one GPU? Llama-3.1-8B's shape, random bfloat16 weights, batch 1; the density of sparse "
            "attention is given, because random weights concentrate nothing; transformers with cuDNN's attention",
            {
                "work": lambda row: row["work"],
                "tokens": lambda row: f"{row['tokens']:,}",
                "engine": lambda row: row["kernel"],
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
                "part": lambda row: row["part"],
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
                "engine": lambda row: row["engine"],
                "first token, ms": lambda row: f"{1e3 * row['seconds_to_first_token']:.1f}",
                "x transformers": number("times_faster_to_first_token", ".2f"),
                "tokens/s after it": number("tokens_per_second", ",.0f"),
                "density": number("density", ".3f"),
            },
            first_token_rows,
        ),
    ),
    (
        "decode_speed",
        Table(
            "How fast is a generated token, and what grows with the context?",
            {
                "model": lambda row: row["model"],
                "decode attention": lambda row: row["decode_attention"],
                "context": lambda row: f"{row['context']:,}",
                "tokens/s": lambda row: f"{row['tokens_per_second']:.1f}",
                "a step, ms": lambda row: f"{row['step_ms']:.2f}",
                "attention in it, ms": lambda row: f"{row['attention_ms']:.2f}",
            },
            lambda result: [row for row in result["rows"] if row["context"] in (128, 2048, 8000)],
        ),
    ),
]


def with_results(readme: str) -> str:
    """The README with one table for each result that is there, in the order of TABLES."""
    before, start, rest = readme.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"README.md lacks the line {START!r} or {END!r}")
    tables = [shown(name, table) for name, table in TABLES if (RESULTS / f"{name}.json").exists()]
    return f"{before}{START}\n\n{''.join(tables) or NONE_YET}{END}{after}"


def shown(name: str, table: Table) -> str:
    """One result: its question, its rows, and where it was measured."""
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
    lines += ["| " + " | ".join(write(row) for write in table.columns.values()) + " |" for row in table.rows(result)]
    stamp = result.get("stamp", result)
    cpu = stamp["cpu"]
    source = f"[`{name}.json`](benchmarks/results/{name}.json)"
    machine = result.get("device") or device_of(stamp) or f"{cpu['name']}, {cpu['cores']} cores"
    where = f"{machine}, NumPy {stamp['versions']['numpy']}"
    where += "".join(
        f", {library} {stamp['versions'][library]}" for library in ("cupy-cuda13x", "numba-cuda") if library in stamp["versions"]
    )
    caption = f"Measured {stamp['date']} on {where}: {source}, by `{command_of(stamp)}`."
    return f"**{table.question}**\n\n" + "\n".join(lines) + f"\n\n{caption}\n\n"


def command_of(stamp: dict[str, Any]) -> str:
    """The command of a run, without a list of rules."""
    command, rules, _ = stamp["command"].partition(" --rules ")
    return command + (" --rules …" if rules else "")


def device_of(stamp: dict[str, Any]) -> str | None:
    """The GPU of a run, or None."""
    return stamp.get("device") or next((gpu["name"] for gpu in stamp.get("gpus", [])), None)


if __name__ == "__main__":
    README.write_text(with_results(README.read_text(encoding="utf-8")), encoding="utf-8")
