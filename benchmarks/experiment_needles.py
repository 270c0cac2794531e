"""Precision to the token, and where in a prompt a fact may stand."""

from __future__ import annotations

import argparse
from typing import Any

import tokenizers
from common import NEEDLE_LLAMA, SMOLLM2, code, prose
from experiment_attention import by_line
from experiment_plots import Experiment, Panel
from losses import Row, answer, questions

from unisparse_np import UniSparseConfig
from unisparse_np.config import PRESETS
from unisparse_np.evaluation.copy_suite import CopySuite, quote
from unisparse_np.evaluation.windows import Windows
from unisparse_np.model.loading import load

PAPER_WITH_SINK = UniSparseConfig(key_anchors=0)
BY_NAME = {name: preset() for name, preset in PRESETS.items()}
COPY_CONFIGS: dict[str, Any] = {
    "dense": "dense", "paper + sink, local": PAPER_WITH_SINK, **BY_NAME, "default, S 64": UniSparseConfig(block_size=64),
    "default, P .98": UniSparseConfig(top_p=0.98),
}  # fmt: skip
OURS = {name: config for name, config in BY_NAME.items() if name != "paper"}
DEPTH_CONFIGS: dict[str, Any] = {"dense": "dense", "paper + sink, local": PAPER_WITH_SINK, **OURS}
DEPTH_TASKS = ["niah_multikey_1", "niah_multikey_2", "niah_multikey_3", "kv_dense"]  # one fact among many like it
DEPTH_BINS = 4


def measure_copy(options: argparse.Namespace) -> list[Row]:
    """SmolLM2 quotes 32 tokens after a cue of 48 from anywhere in the window: negative log-likelihood over dense attention's."""
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    windows = [Windows(tokenizer, text, options.length, seed, 2 * options.windows) for text in (prose(), code()) for seed in range(4)]
    prompts = [CopySuite(of_seed).quotation(n) for of_seed in windows for n in range(len(of_seed))]
    found = {name: [quote(model, prompt, config) for prompt in prompts] for name, config in COPY_CONFIGS.items()}
    dense = sum(row["nll"] for row in found["dense"]) / len(prompts)
    rows = []
    for name, quotes in found.items():
        means = {key: sum(row[key] for row in quotes) / len(quotes) for key in quotes[0]}
        rows.append({"config": name, "quotations": len(quotes), **means, "nll_over_dense": means["nll"] - dense})
    return rows


def copy_panels(rows: list[Row]) -> list[Panel]:
    shown = {"nll_over_dense": "NLL of a quotation over dense, nats per token", "right_in_a_row": "tokens right in a row, of 32"}
    sparse = [row for row in rows if row["config"] != "dense"]
    return [Panel("density", label, by_line(sparse, "config", "density", key)) for key, label in shown.items()]


def measure_depth(options: argparse.Namespace) -> list[Row]:
    """needle-llama: accuracy by where the fact stands, in quarters of the prompt."""
    model, tokenizer = load(str(NEEDLE_LLAMA), backend=options.backend)
    spelling = tokenizers.Tokenizer.from_file(str(NEEDLE_LLAMA / "tokenizer.json"))
    found: dict[tuple[str, int], list[float]] = {}
    for _, example in questions(options.length, options.questions, DEPTH_TASKS):
        token_ids, references = example[:2]
        text = spelling.decode([int(token) for token in token_ids])
        depth = min(DEPTH_BINS - 1, DEPTH_BINS * text.index(references[0]) // len(text))
        for name, config in DEPTH_CONFIGS.items():
            found.setdefault((name, depth), []).append(answer(model, tokenizer, example, config)["score"])
    return [
        {"config": name, "quarter": depth + 1, "questions": len(scores), "accuracy": sum(scores) / len(scores)}
        for name in DEPTH_CONFIGS
        for depth in range(DEPTH_BINS)
        if (scores := found.get((name, depth)))
    ]


def depth_panels(rows: list[Row]) -> list[Panel]:
    return [Panel("quarter of the prompt that holds the fact", "accuracy", by_line(rows, "config", "quarter", "accuracy"))]


EXPERIMENTS = {
    "verbatim-copy": Experiment(measure_copy, copy_panels, COPY_CONFIGS),
    "needle-depth": Experiment(measure_depth, depth_panels, DEPTH_CONFIGS),
}
