"""The tables of what sparse attention costs a model: answers, text, quotations, sparse steps."""

from __future__ import annotations

from typing import Any

from result_tables.quality_rows import OTHER_LOSSES, loss_at_density, loss_rows, tune_rows
from result_tables.tables import Columns, Row, Table, number, text, with_interval


def preset_rows(result: dict[str, Any]) -> list[Row]:
    """One row for each kind of text and preset."""
    return [{"text": kind, "preset": preset, **values} for kind, presets in result["presets"].items() for preset, values in presets.items()]


QUALITY_COLUMNS: Columns = {
    "text": text("text"),
    "preset": text("preset"),
    "KL from dense, per token": number("kl", ".4f"),
    "same likeliest token": number("top1", ".3f"),
    "rise of the loss, nats": number("nll_rise", "+.4f"),
    "density": number("density", ".3f"),
}

PRESETS: tuple[str, Table] = (  # the table of README.md: what each rule loses, and what it costs
    "selection_rules_text_8192",
    Table(
        "What does each rule lose, at which density? SmolLM2-135M-Instruct on 8,192 tokens of text and in quoting from them; "
        "needle-llama on the tasks that dense attention solves to 80%",
        {
            "attention": text("attention"),
            "text: KL from dense, per token, at density": loss_at_density("text", "kl", ".4f", "kl_interval"),
            "quoting: NLL over dense": loss_at_density("copy_8192", "nll_over_dense", "+.3f", "nll_interval"),
            "needles kept, 4K": loss_at_density("needles_4096", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
            "8K": loss_at_density("needles_8192", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
            "16K": loss_at_density("needles_16384", "share_on_solved_tasks", ".3f", "share_on_solved_interval"),
            "selection": lambda row: f"{row['text']['selection']:.3f}",
        },
        loss_rows,
        others=tuple(f"selection_rules_{name}" for name in OTHER_LOSSES),
    ),
)

LOSS_TABLES: list[tuple[str, Table]] = [
    (
        "needle_accuracy",
        Table(
            "Does sparse attention lose needles? needle-llama on its own tasks, share of right answers",
            {
                "prompt tokens": number("length", ","),
                "attention": text("config"),
                "questions": text("questions"),
                "accuracy": lambda row: f"{row['accuracy']:.3f} ± {row['interval_95']:.3f}",
                "share of dense": number("share_of_dense", ".3f"),
                "density": number("density", ".3f"),
            },
        ),
    ),
    (
        "tune_smollm2_8192",
        Table(
            "What does `tune` find for a model? SmolLM2-135M-Instruct, 8,192 tokens of prose, code and plays, loss at most 0.02, on "
            "windows that the search has not seen; cost is selection and attention as a share of dense attention's products",
            {
                "config": text("config"),
                "KL from dense, per token": with_interval("kl", "kl_interval", ".4f"),
                "density": number("density", ".3f"),
                "cost": number("cost", ".3f"),
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
                "prompt": text("prefill"),
                "steps": text("decode"),
                "KL from dense, per token [95%]": with_interval("kl", "kl_interval", ".4f"),
                "same likeliest token": number("top1", ".3f"),
                "rise of the loss, nats": number("nll_rise", "+.4f"),
                "density of the steps": number("density", ".3f"),
            },
            lambda result: result["text"]["rows"][1:],
        ),
    ),
    (
        "decode_quality",
        Table(
            "And needles, answered with sparse steps? needle-llama's own tasks at 8,192 tokens",
            {
                "prompt": text("prefill"),
                "steps": text("decode"),
                "questions": text("questions"),
                "accuracy [95%]": with_interval("accuracy", "interval", ".3f"),
                "share of dense": number("share_of_dense", ".3f"),
            },
            lambda result: result["needles"]["rows"],
        ),
    ),
]
