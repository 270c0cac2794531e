"""Sweeps over one setting: SmolLM2's loss on text, needle-llama's accuracy, density, and the time that selection takes."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import NEEDLE_LLAMA, SMOLLM2
from experiment_plots import Experiment, Panel
from losses import Row, answers, questions, text_windows, window_losses
from workers import in_processes

from unisparse_np import UniSparseConfig
from unisparse_np.attention import score_blocks
from unisparse_np.cli.bench import seconds
from unisparse_np.evaluation.cost import selection_share
from unisparse_np.model.loading import load
from unisparse_np.problem import Problem

TIMED_CALLS = 5


@dataclass(frozen=True)
class Sweep:
    """Configs by the value that is varied. needles: those of needle-llama, where its heads ask for others."""

    setting: str
    text: dict[str, UniSparseConfig]
    needles: dict[str, UniSparseConfig] = field(default_factory=dict)


def with_both_rules(**settings: int) -> dict[str, UniSparseConfig]:
    """The default's Top-P and the row threshold, S 64, under the same settings."""
    q, k = settings["q_compress"], settings["k_compress"]
    return {
        f"P .95: {q} x {k}": UniSparseConfig(**settings),
        f"tau .02: {q} x {k}": UniSparseConfig(block_size=64, top_p=None, row_threshold=0.02, **settings),
    }


UNEQUAL = [with_both_rules(q_compress=q, k_compress=64 // q) for q in (1, 2, 4, 8, 16, 32, 64)]
SWEEPS = {
    "composite-size": Sweep("c", {str(c): UniSparseConfig(q_compress=c, k_compress=c) for c in (4, 8, 16, 32)}),
    "block-size": Sweep("S", {str(s): UniSparseConfig(block_size=s) for s in (64, 128, 256)}),
    "top-p": Sweep("P", {str(p): UniSparseConfig(top_p=p) for p in (0.80, 0.90, 0.95, 0.98, 0.99)}),
    "head-compress": Sweep(
        "c_h",
        {str(h): UniSparseConfig(head_compress=h) for h in (1, 3, 9)},
        {str(h): UniSparseConfig(head_compress=h) for h in (1, 2, 4, 8)},
    ),
    "unequal-composites": Sweep("rule: c_q x c_k", {label: config for both in UNEQUAL for label, config in both.items()}),
}


def measure(sweep: Sweep, options: argparse.Namespace) -> list[Row]:
    """A row for each value and model."""
    return text_rows(sweep, options) + needle_rows(sweep, options)


def text_rows(sweep: Sweep, options: argparse.Namespace) -> list[Row]:
    """SmolLM2: means over the windows."""
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    windows = [token_ids for _, _, token_ids in text_windows(tokenizer, options.length, options.windows)]
    losses = measured(window_losses, windows, sweep.text, SMOLLM2, options)
    return [
        {
            "model": "SmolLM2", sweep.setting: value, **{key: mean_of(losses[value], key) for key in losses[value][0]},
            "selection": selection_share(config), "selection_ms": selection_ms(config, options.length, model),
        }
        for value, config in sweep.text.items()
    ]  # fmt: skip


def needle_rows(sweep: Sweep, options: argparse.Namespace) -> list[Row]:
    """needle-llama: share of dense accuracy over the questions."""
    configs: dict[str, Any] = {"dense": "dense", **(sweep.needles or sweep.text)}
    examples = [example for _, example in questions(options.length, options.questions)]
    found = measured(answers, examples, configs, NEEDLE_LLAMA, options)
    dense = mean_of(found.pop("dense"), "score")
    return [
        {
            "model": "needle-llama", sweep.setting: value, "share_of_dense": mean_of(of, "score") / dense,
            "density": mean_of(of, "density"), "selection": selection_share(configs[value]),
        }
        for value, of in found.items()
    ]  # fmt: skip


def measured(
    work: Callable[[Any, Any, Any], dict[str, Row]], items: list[Any], configs: dict[str, Any], model: Path, options: argparse.Namespace
) -> dict[str, list[Row]]:
    """Every item under every config: the rows of each config.

    Several processes take a config at a time, so that they compile different kernels; one process computes an item's dense side once.
    """
    each = [configs] if options.workers == 1 else [{value: config} for value, config in configs.items()]
    jobs = [(model, (item, some)) for item in items for some in each]
    rows: dict[str, list[Row]] = {value: [] for value in configs}
    for found in in_processes(work, jobs, options.backend, options.workers):
        for value, row in found.items():
            rows[value].append(row)
    return rows


def mean_of(rows: list[dict[str, float]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def selection_ms(config: UniSparseConfig, length: int, model: Any) -> float:
    """Median milliseconds of steps 1-5 of one layer on random data: of the device's time where there is one."""
    engine, of = model.backend, model.config
    problem = Problem(of.num_attention_heads, of.num_key_value_heads, length, length, of.head_dim, config)
    rng = np.random.default_rng(0)
    q, k = (
        engine.from_any("input", rng.standard_normal((heads, length, of.head_dim), dtype=np.float32).astype(model.forward.dtype))
        for heads in (of.num_attention_heads, of.num_key_value_heads)
    )
    if engine.name == "cupy":
        from device_times import selection_ms  # needs CuPy

        return selection_ms(q, k, problem)

    def select() -> Any:
        return engine.select_blocks(*score_blocks(q, k, problem, engine), problem)

    seconds(select, engine)  # fills caches
    return 1e3 * statistics.median(seconds(select, engine) for _ in range(TIMED_CALLS))


def sweep_panels(setting: str, rows: list[Row]) -> list[Panel]:
    """Loss on text and accuracy on needles, each against density; every point carries its value."""
    text, needles = ([row for row in rows if row["model"] == model] for model in ("SmolLM2", "needle-llama"))
    kl, accuracy = "SmolLM2: KL from dense, nats per token", "needle-llama: share of dense accuracy"
    panels = [
        Panel("density", kl, {"SmolLM2": columns(text, "density", "kl")}, names=names(text, setting)),
        Panel("density", accuracy, {"needle-llama": columns(needles, "density", "share_of_dense")}, names=names(needles, setting)),
    ]
    if setting == "c":
        timed = {"SmolLM2": columns(text, "selection_ms", "kl")}
        panels.insert(0, Panel("selection of one layer, ms", kl, timed, names=names(text, setting)))
    return panels


def unequal_panels(setting: str, rows: list[Row]) -> list[Panel]:
    """Against c_q, one line a rule, for both models; and density."""

    def lines(model: str, key: str) -> dict[str, tuple[list[float], list[float]]]:
        found: dict[str, tuple[list[float], list[float]]] = {}
        for row in rows:
            if row["model"] == model:
                rule, _, sizes = row[setting].partition(": ")
                x, y = found.setdefault(rule, ([], []))
                x.append(float(sizes.partition(" x ")[0]))
                y.append(row[key])
        return found

    x = "c_q (c_k = 64 / c_q)"
    return [
        Panel(x, "SmolLM2: KL from dense, nats per token", lines("SmolLM2", "kl"), log="xy"),
        Panel(x, "SmolLM2: density", lines("SmolLM2", "density"), log="x"),
        Panel(x, "needle-llama: share of dense accuracy", lines("needle-llama", "share_of_dense"), log="x"),
    ]


def columns(rows: list[Row], x: str, y: str) -> tuple[list[float], list[float]]:
    return [row[x] for row in rows], [row[y] for row in rows]


def names(rows: list[Row], setting: str) -> tuple[str, ...]:
    return tuple(f"{setting} {row[setting]}" for row in rows)


EXPERIMENTS = {
    name: Experiment(
        partial(measure, sweep),
        partial(unequal_panels if name == "unequal-composites" else sweep_panels, sweep.setting),
        sweep.text | sweep.needles,
    )
    for name, sweep in SWEEPS.items()
}
