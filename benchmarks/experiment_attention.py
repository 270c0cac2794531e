"""What composites keep of attention itself: synthetic attention that flattens, rotary frequency bands, rank correlation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from common import NEEDLE_LLAMA, SMOLLM2, prose
from experiment_plots import Experiment, Panel
from losses import Row, questions

from unisparse_np import UniSparseConfig, unisparse_attention
from unisparse_np.attention import score_blocks
from unisparse_np.config import PRESETS
from unisparse_np.inspection.capture import true_masses
from unisparse_np.inspection.rank_correlation import spearman
from unisparse_np.model.loading import load
from unisparse_np.problem import Problem

BY_NAME = {name: preset() for name, preset in PRESETS.items()}
SHARPNESS = (16.0, 12.0, 8.0, 6.0, 4.0, 3.0, 2.0, 1.0, 0.0)
COMPOSITES = (4, 8, 16, 32)
BANDED_LAYERS = 5  # about so many, spread over the model
BANDS = 4  # of equal numbers of frequencies, the fastest first
KEPT_SHARE = 0.25  # of the visible blocks, where bands are compared
LEAST_BLOCKS = 8  # visible to a query block for its ranks to say something
FIRST_TOKEN = 20_000  # of the prose: past its table of operators


# ---- synthetic attention that flattens ----
def measure_diffuse(options: argparse.Namespace) -> list[Row]:
    """Queries that point at one place each, ever less: what the presets keep, and how far their output is from dense attention's."""
    rows = []
    for sharpness in SHARPNESS:
        q, k, v = pointed_attention(sharpness, options.length)
        dense = unisparse_attention(q, k, v, "dense", backend="reference")
        for name, config in BY_NAME.items():
            out, trace = unisparse_attention(q, k, v, config, backend="reference", return_trace=True)
            error = float(np.linalg.norm(out - dense) / np.linalg.norm(dense))
            rows.append({"sharpness": sharpness, "preset": name, "density": trace.density, "relative_error": error})
    return rows


def pointed_attention(sharpness: float, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """q, k, v [4, L, 64]: keys drift slowly, so that neighbours are alike; each run of 16 queries looks for one earlier place.

    sharpness: the mean logit of a query with the key it looks for; other logits scatter about 0.
    """
    rng = np.random.default_rng(1)
    heads, head_dim, drift = 4, 64, 0.98
    noise = rng.standard_normal((heads, length, head_dim))
    k = np.empty_like(noise)
    k[:, 0] = noise[:, 0]
    for t in range(1, length):
        k[:, t] = drift * k[:, t - 1] + np.sqrt(1 - drift**2) * noise[:, t]
    runs = np.arange(length) // 16
    targets = (rng.random((heads, runs[-1] + 1))[:, runs] * np.arange(length)).astype(int)  # [heads, L], earlier places
    pointed = np.take_along_axis(k, targets[:, :, None], axis=1)  # |k|^2 is about head_dim
    q = sharpness * pointed / np.sqrt(head_dim) + 0.5 * rng.standard_normal(pointed.shape)
    v = rng.standard_normal(k.shape)
    return q.astype(np.float32), k.astype(np.float32), v.astype(np.float32)


def diffuse_panels(rows: list[Row]) -> list[Panel]:
    x = "sharpness: logit of the place looked for (0: flat)"
    shown = {"density": "density", "relative_error": "relative error of the output"}
    return [Panel(x, label, by_line(rows, "preset", "sharpness", key)) for key, label in shown.items()]


# ---- rotary frequency bands ----
def measure_bands(options: argparse.Namespace) -> list[Row]:
    """With one band of rotary frequencies left in q and k: how much of that attention do the blocks hold that composites prefer?"""
    rows = []
    for model_name, model, token_ids in models(options):
        found: dict[tuple[int, int], list[float]] = {(c, band): [] for c in COMPOSITES for band in range(BANDS)}
        for _, q, k in layers_of(model, token_ids, every=max(1, model.config.num_hidden_layers // BANDED_LAYERS)):
            for band in range(BANDS):
                q_alone, k_alone = only_band(q, band), only_band(k, band)
                truth = true_masses(q_alone, k_alone, problem_of(q, k, UniSparseConfig(block_size=64)), model.backend)
                for c in COMPOSITES:
                    found[c, band].append(recall(q_alone, k_alone, truth, c, model.backend))
        rows += [{"model": model_name, "c": c, "band": band, "recall": float(np.mean(of))} for (c, band), of in found.items()]
    return rows


def recall(q: Any, k: Any, truth: np.ndarray, c: int, engine: Any) -> float:
    """True mass of the best quarter of the blocks by composites, over that of the best quarter by true mass [Hq, N, N]."""
    problem = problem_of(q, k, UniSparseConfig(q_compress=c, k_compress=c, block_size=64))
    scores = engine.as_numpy(score_blocks(q, k, problem, engine)[0])  # [Hq, N, N]
    kept = best = 0.0
    for i in range(LEAST_BLOCKS, problem.num_q_blocks):
        count = max(1, round(KEPT_SHARE * (i + 1)))
        chosen = np.argsort(-scores[:, i, : i + 1], axis=1)[:, :count]
        kept += float(np.take_along_axis(truth[:, i], chosen, axis=1).sum())
        best += float(-np.sort(-truth[:, i, : i + 1], axis=1)[:, :count].sum())
    return kept / best


def only_band(x: Any, band: int) -> Any:
    """x [H, L, d] with 0 in all but one band; frequency i turns dimensions i and i + d/2."""
    half = x.shape[-1] // 2
    width = half // BANDS
    alone = x * 0
    for first in (band * width, half + band * width):
        alone[..., first : first + width] = x[..., first : first + width]
    return alone


def band_panels(rows: list[Row]) -> list[Panel]:
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        named = [{**row, "c": f"c {row['c']}", "band": row["band"] + 1} for row in rows if row["model"] == model]
        x = f"{model}: quarter of the frequencies (1 the fastest)"
        panels.append(Panel(x, "recall of the best quarter of blocks", by_line(named, "c", "band", "recall")))
    return panels


# ---- rank correlation ----
def measure_ranks(options: argparse.Namespace) -> list[Row]:
    """Spearman of compressed with true block masses along each query block's row, mean over heads and rows, layer by layer."""
    rows = []
    for model_name, model, token_ids in models(options):
        for layer, q, k in layers_of(model, token_ids):
            base = problem_of(q, k, UniSparseConfig())
            truth = true_masses(q, k, base, model.backend)
            for c in COMPOSITES:
                problem = replace(base, config=UniSparseConfig(q_compress=c, k_compress=c))
                scores = model.backend.as_numpy(score_blocks(q, k, problem, model.backend)[0])
                rows.append({
                    "model": model_name, "layer": layer, "c": c, "all_blocks": mean_spearman(scores, truth, 0),
                    "without_sink": mean_spearman(scores, truth, 1),
                })  # fmt: skip
    return rows


def mean_spearman(scores: np.ndarray, truth: np.ndarray, first: int) -> float:
    """[Hq, N, N] each; over blocks first .. i of each row i that has enough of them."""
    heads, blocks, _ = scores.shape
    rows = range(LEAST_BLOCKS, blocks)
    return float(np.nanmean([spearman(scores[h, i, first : i + 1], truth[h, i, first : i + 1]) for h in range(heads) for i in rows]))


def rank_panels(rows: list[Row]) -> list[Panel]:
    panels = []
    for model in dict.fromkeys(row["model"] for row in rows):
        lines = {}
        for key, label in (("all_blocks", "all blocks"), ("without_sink", "without the first block")):
            chosen = [{**row, "c": f"c {row['c']}, {label}"} for row in rows if row["model"] == model and row["c"] in (8, 32)]
            lines |= by_line(chosen, "c", "layer", key)
        panels.append(Panel(f"{model}: layer", "Spearman of compressed and true masses", lines))
    return panels


# ---- what they share ----
def models(options: argparse.Namespace) -> Iterator[tuple[str, Any, list[int]]]:
    """Each model with a prompt of its own kind."""
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    yield "SmolLM2", model, tokenizer.encode(prose())[FIRST_TOKEN : FIRST_TOKEN + options.length]
    model, _ = load(str(NEEDLE_LLAMA), backend=options.backend)
    _, example = next(questions(options.length, 1, ["niah_multikey_1"]))
    yield "needle-llama", model, [int(token) for token in example[0]]


def layers_of(model: Any, token_ids: list[int], every: int = 1) -> list[tuple[int, Any, Any]]:
    """(layer, q [Hq, T, d], k [Hkv, T, d]) of a dense prefill, every so many layers."""
    found = []

    def observer(layer: int, q: Any, k: Any, v: Any, out: Any, trace: Any) -> None:
        if layer % every == 0:
            found.append((layer, q.copy(), k.copy()))

    cache = model.new_cache(len(token_ids), "dense")
    model.prefill(token_ids, cache, "dense", chunk_size=len(token_ids), observer=observer)
    return found


def problem_of(q: Any, k: Any, config: UniSparseConfig) -> Problem:
    return Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], config)


def by_line(rows: list[Row], line: str, x: str, y: str) -> dict[str, tuple[list[float], list[float]]]:
    """Rows -> one line for each value of `line`."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        points = lines.setdefault(str(row[line]), ([], []))
        points[0].append(row[x])
        points[1].append(row[y])
    return lines


EXPERIMENTS = {
    "diffuse-attention": Experiment(measure_diffuse, diffuse_panels, BY_NAME),
    "rotary-bands": Experiment(measure_bands, band_panels),
    "rank-correlation": Experiment(measure_ranks, rank_panels),
}
