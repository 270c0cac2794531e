"""What does sparse prefill change in a real model's predictions? SmolLM2, the three presets against dense attention.

    make smollm2 && python benchmarks/smollm2_quality.py --length 4096 --windows 4

Windows of English prose (the Python language reference) and of Python source (the standard library), every layer sparse.
Over the second half of each window, per token: KL(dense || sparse) in nats, top-1 agreement, and the rise of the negative
log-likelihood of the text.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
from common import SMOLLM2, code, prose, stamp, write_result

from unisparse_np import UniSparseConfig
from unisparse_np.model.loading import load

PRESETS = {"default": UniSparseConfig(), "paper": UniSparseConfig.paper(), "precise": UniSparseConfig.precise()}
ROWS_AT_ONCE = 256  # of logits, widened to float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=4, help="of each kind of text")
    options = parser.parse_args()
    model, tokenizer = load(str(SMOLLM2), backend="reference")
    windows = []
    for kind, text in (("prose", prose()), ("code", code())):
        token_ids = tokenizer.encode(text)
        starts = np.linspace(0, len(token_ids) - options.length, options.windows).astype(int)
        for start in starts:
            row = measure(model, token_ids[start : start + options.length])
            windows.append({"text": kind, "start": int(start), **row})
            print(
                kind, int(start), *(f"{name} KL {r['kl']:.4f} density {r['density']:.3f}" for name, r in row["presets"].items()), flush=True
            )
    result = {
        "stamp": stamp(), "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", "length": options.length,
        "texts": {"prose": "the Python language reference (pydoc_data.topics)", "code": "modules of Python's standard library"},
        "presets": {kind: averages(windows, kind) for kind in ("all", "prose", "code")}, "windows": windows,
    }  # fmt: skip
    print(write_result(f"smollm2_quality_{options.length}", result))


def measure(model: Any, token_ids: list[int]) -> dict[str, Any]:
    """One window: the dense negative log-likelihood and, per preset, what sparse attention changes."""
    targets = np.array(token_ids[len(token_ids) // 2 + 1 :])
    dense, _ = second_half(model, token_ids, "dense")
    nll = np.concatenate([-p[np.arange(len(p)), t] for p, t in zip(rows_of(dense), rows_of(targets), strict=True)])
    return {
        "dense_nll": float(nll.mean()),
        "presets": {name: against(model, token_ids, config, dense, targets) for name, config in PRESETS.items()},
    }


def second_half(model: Any, token_ids: list[int], attention: Any) -> tuple[np.ndarray, list[float]]:
    """Logits of the window's second half but for its last token, and each layer's density over the whole window."""
    half = len(token_ids) // 2
    cache = model.new_cache(len(token_ids), attention)
    model.prefill(token_ids[:half], cache, attention)
    logits = model.logits(token_ids[half:-1], attention, cache=cache)  # [T/2 - 1, vocab]
    return logits, model.layer_densities(cache)


def against(model: Any, token_ids: list[int], config: UniSparseConfig, dense: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Per-token means of one preset against dense [n, vocab]; targets [n]."""
    sparse, densities = second_half(model, token_ids, config)
    kl, agree, rise = [], [], []
    for p, s, t in zip(rows_of(dense), rows_of(sparse), rows_of(targets), strict=True):
        kl.append((np.exp(p) * (p - s)).sum(axis=1))
        agree.append(p.argmax(axis=1) == s.argmax(axis=1))
        rise.append((p - s)[np.arange(len(p)), t])
    means = {name: float(np.concatenate(parts).mean()) for name, parts in (("kl", kl), ("top1", agree), ("nll_rise", rise))}
    return means | {"density": float(np.mean(densities))}


def rows_of(x: np.ndarray) -> Iterator[np.ndarray]:
    """A few rows at a time; logits as log-probabilities in float64."""
    for start in range(0, len(x), ROWS_AT_ONCE):
        rows = x[start : start + ROWS_AT_ONCE]
        yield log_softmax(rows.astype(np.float64)) if x.ndim == 2 else rows


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def averages(windows: list[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """Each preset's means over the windows of one kind of text, or of all."""
    chosen = [w for w in windows if kind in ("all", w["text"])]
    return {
        name: {measure: float(np.mean([w["presets"][name][measure] for w in chosen])) for measure in ("kl", "top1", "nll_rise", "density")}
        for name in PRESETS
    }


if __name__ == "__main__":
    main()
