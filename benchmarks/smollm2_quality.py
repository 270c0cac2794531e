"""What does sparse prefill change in a real model's predictions? SmolLM2, the three presets against dense attention.

    make smollm2 && python benchmarks/smollm2_quality.py --length 4096 --windows 4

Windows of English prose (the Python language reference) and of Python source (the standard library), every layer sparse.
Over the second half of each window, per token: KL(dense || sparse) in nats, top-1 agreement, and the rise of the negative
log-likelihood of the text.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import SMOLLM2, stamp, write_result
from losses import Window, text_windows

from unisparse_np import UniSparseConfig
from unisparse_np.model.loading import load

PRESETS = {"default": UniSparseConfig(), "paper": UniSparseConfig.paper(), "precise": UniSparseConfig.precise()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 1,024")
    parser.add_argument("--windows", type=int, default=4, help="of each kind of text")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    options = parser.parse_args()
    model, tokenizer = load(str(SMOLLM2), backend=options.backend)
    windows = []
    for kind, start, token_ids in text_windows(tokenizer, options.length, options.windows):
        window = Window(model, token_ids)
        presets = {name: window.loss(config) for name, config in PRESETS.items()}
        windows.append({"text": kind, "start": start, "presets": presets})
        print(kind, start, *(f"{name} KL {row['kl']:.4f} density {row['density']:.3f}" for name, row in presets.items()), flush=True)
    libraries = () if options.backend == "reference" else ("cupy-cuda13x",)
    result = {
        "stamp": stamp(*libraries), "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", "length": options.length,
        "texts": {"prose": "the Python language reference (pydoc_data.topics)", "code": "modules of Python's standard library"},
        "presets": {kind: averages(windows, kind) for kind in ("all", "prose", "code")}, "windows": windows,
    }  # fmt: skip
    print(write_result(f"smollm2_quality_{options.length}", result))


def averages(windows: list[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """Each preset's means over the windows of one kind of text, or of all."""
    chosen = [w for w in windows if kind in ("all", w["text"])]
    return {
        name: {measure: float(np.mean([w["presets"][name][measure] for w in chosen])) for measure in ("kl", "top1", "nll_rise", "density")}
        for name in PRESETS
    }


if __name__ == "__main__":
    main()
