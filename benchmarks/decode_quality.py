"""What do sparse decode steps change? Dense steps beside those of `--decode-attention unisparse`, over the same tokens.

    make smollm2 && python benchmarks/decode_quality.py --backend cupy

text: SmolLM2 reads windows of prose and code but for their last 128 tokens, which are then read one by one. Per token of these:
    KL(dense || sparse) in nats, whether the likeliest token agrees, the rise of the negative log-likelihood, each against dense
    steps after a dense prefill; and the density of the steps. The prompt is read densely, so that only the steps differ, and
    sparsely, with sparse steps and with dense ones.
needles: needle-llama answers its own tasks with dense and with sparse steps; a score is RULER's.
Results go to benchmarks/results/decode_quality.json.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from common import NEEDLE_LLAMA, SMOLLM2, stamp_of_backend, write_result
from losses import QUESTION_SEED, needle_tasks, questions, text_windows

from unisparse_np.config import PRESETS
from unisparse_np.evaluation.divergence import divergence
from unisparse_np.evaluation.intervals import mean_estimate, share_estimate
from unisparse_np.model.generate import stream_generate
from unisparse_np.model.loading import load

NEW_TOKENS = 128
DENSITY_EVERY = 8  # steps: the steps whose blocks are counted
ATTENTIONS: dict[str, Any] = {"dense": "dense", **{name: PRESETS[name]() for name in PRESETS}}


class Way(NamedTuple):
    """How the prompt is read, and how each token after it; names of ATTENTIONS."""

    prefill: str
    decode: str


def ways(presets: list[str]) -> list[Way]:
    """The dense one first, with which the others are compared."""
    only_steps = [Way("dense", "dense"), *(Way("dense", name) for name in presets)]
    return only_steps + [Way(name, decode) for name in presets for decode in ("dense", name)]


# ---- text ----
def window_rows(model: Any, token_ids: list[int], presets: list[str]) -> list[dict[str, Any]]:
    """One window's loss for each way, and the density of its steps."""
    prompt, after = token_ids[:-NEW_TOKENS], token_ids[-NEW_TOKENS:]
    targets = np.array(after[1:])
    found, rows, dense = {}, [], None
    for prefill in dict.fromkeys(way.prefill for way in ways(presets)):
        cache = model.new_cache(len(token_ids), ATTENTIONS[prefill])
        model.prefill_on_backend(prompt, cache, ATTENTIONS[prefill])
        for way in ways(presets):
            if way.prefill == prefill:
                found[way] = logits_of_steps(model, after[:-1], cache, len(prompt), ATTENTIONS[way.decode])
                dense = found[way] if dense is None else dense
                loss = divergence(dense, found[way], targets, model.backend.layers)
                density = density_of_steps(model, after[:-1], cache, len(prompt), ATTENTIONS[way.decode])
                rows.append({
                    **way._asdict(), "kl": float(loss.kl.mean()), "top1": float(loss.top1.mean()),
                    "nll_rise": float((loss.nll - loss.dense_nll).mean()), "density": density,
                })  # fmt: skip
        cache.release()
    return rows


def logits_of_steps(model: Any, token_ids: list[int], cache: Any, length: int, attention: Any) -> Any:
    """Each step's logits behind the cache's first `length` tokens: [steps, vocab], the backend's."""
    cache.length = length  # what earlier steps wrote behind it is written again
    xp = model.backend.layers.xp
    return xp.stack([xp.array(model.step_on_backend(token_id, cache, attention)) for token_id in token_ids])


def density_of_steps(model: Any, token_ids: list[int], cache: Any, length: int, attention: Any) -> float:
    """Kept over visible blocks of every eighth step, which is read as a prompt of one token: steps alone are not counted."""
    if attention == "dense":
        return 1.0
    before = cache.counts()
    for n in range(0, len(token_ids), DENSITY_EVERY):
        cache.length = length + n
        model.prefill_on_backend(token_ids[n : n + 1], cache, attention)
    kept, visible = (cache.counts() - before).sum(axis=0)
    return float(kept / visible)


def text(backend: str, length: int, windows: int, presets: list[str]) -> dict[str, Any]:
    model, tokenizer = load(str(SMOLLM2), backend=backend)
    rows: dict[Way, list[dict[str, Any]]] = defaultdict(list)
    for kind, start, token_ids in text_windows(tokenizer, length, windows):
        for row in window_rows(model, token_ids, presets):
            rows[Way(row["prefill"], row["decode"])].append({"text": kind, "start": start, **row})
        print(kind, start, *(f"{way.prefill}/{way.decode} KL {found[-1]['kl']:.4f}" for way, found in rows.items()), flush=True)
    return {
        "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", "length": length, "new_tokens": NEW_TOKENS,
        "rows": [{**way._asdict(), **summary(found)} for way, found in rows.items()],
        "windows": [row for found in rows.values() for row in found],
    }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the windows, with the 95% interval of the KL."""
    kl = mean_estimate([row["kl"] for row in rows], lowest=0.0)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("top1", "nll_rise", "density")}
    return {"windows": len(rows), "kl": kl.value, "kl_interval": [kl.low, kl.high], **means}


# ---- needles ----
def needles(backend: str, length: int, count: int, presets: list[str]) -> dict[str, Any]:
    model, tokenizer = load(str(NEEDLE_LLAMA), backend=backend)
    scores: dict[Way, list[float]] = defaultdict(list)
    for number, (task, example) in enumerate(questions(length, count)):
        for way in ways(presets):
            scores[way].append(score(model, tokenizer, example, way))
        print(number, task, *(f"{way.prefill}/{way.decode} {sum(found):g}" for way, found in scores.items()), flush=True)
    rows, dense = [], sum(scores[Way("dense", "dense")])
    for way, found in scores.items():
        estimate = share_estimate(found)
        row = {**way._asdict(), "questions": len(found), "accuracy": estimate.value, "interval": [estimate.low, estimate.high]}
        rows.append(row | {"share_of_dense": sum(found) / dense})
    return {"model": "examples/needle-llama", "length": length, "seed": QUESTION_SEED, "rows": rows}


def score(model: Any, tokenizer: Any, example: tuple, way: Way) -> float:
    """RULER's score of one answer, drawn greedily."""
    token_ids, references, any_one, room = example
    pieces = stream_generate(
        model, tokenizer, [int(t) for t in token_ids], attention=ATTENTIONS[way.prefill], decode_attention=ATTENTIONS[way.decode],
        max_tokens=room,
    )  # fmt: skip
    return float(needle_tasks().score("".join(piece.text for piece in pieces), references, any_one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--length", type=int, default=8192, help="tokens of a window, the steps' among them, and of a question")
    parser.add_argument("--windows", type=int, default=6, help="of each kind of text")
    parser.add_argument("--questions", type=int, default=52, help="spread over the tasks")
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=[name for name in PRESETS if name != "paper"])
    options = parser.parse_args()
    result: dict[str, Any] = {
        "stamp": stamp_of_backend(options.backend),
        "configs": {name: asdict(ATTENTIONS[name]) for name in options.presets},
    }
    for name, measure, count in (("text", text, options.windows), ("needles", needles, options.questions)):
        if count:
            result[name] = measure(options.backend, options.length, count, options.presets)
            for row in result[name]["rows"]:
                print(name, " ".join(f"{key}={value:.4f}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()))
            print(write_result("decode_quality", result), flush=True)


if __name__ == "__main__":
    main()
