"""What does sparse prefill change in a real model's predictions? SmolLM2, the presets against dense attention.

    make smollm2 && python benchmarks/smollm2_quality.py --length 4096 --windows 4

Windows of English prose (the Python language reference) and of Python source (the standard library), every layer sparse.
Over the second half of each window, per token: KL(dense || sparse) in nats, top-1 agreement, and the rise of the negative
log-likelihood of the text.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from common import SMOLLM2, plain, stamp_of_backend, write_result
from losses import text_windows, window_losses
from workers import in_processes

from unisparse_np.config import PRESETS as MAKERS
from unisparse_np.model.tokenizer import Tokenizer

PRESETS = {name: preset() for name, preset in MAKERS.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=4096, help="tokens, a multiple of 1,024")
    parser.add_argument("--windows", type=int, default=4, help="of each kind of text")
    parser.add_argument("--backend", default="reference", choices=("reference", "cupy"))
    parser.add_argument("--workers", type=int, default=1, help="windows read at once, each in a process of its own")
    options = parser.parse_args()
    jobs = [(SMOLLM2, window) for window in text_windows(Tokenizer.from_folder(SMOLLM2), options.length, options.windows)]
    windows = []
    for window in in_processes(read_window, jobs, options.backend, options.workers):
        windows.append(window)
        shown = (f"{name} KL {row['kl']:.4f} density {row['density']:.3f}" for name, row in window["presets"].items())
        print(window["text"], window["start"], *shown, flush=True)
    windows.sort(key=lambda window: (window["text"], window["start"]))
    result = {
        "stamp": stamp_of_backend(options.backend), "model": "SmolLM2-135M-Instruct, from its Q4_1 GGUF", "length": options.length,
        "texts": {"prose": "the Python language reference (pydoc_data.topics)", "code": "modules of Python's standard library"},
        "configs": plain(PRESETS), "backend": options.backend,
        "presets": {kind: averages(windows, kind) for kind in ("all", "prose", "code")}, "windows": windows,
    }  # fmt: skip
    print(write_result(f"smollm2_quality_{options.length}", result))


def read_window(model: Any, tokenizer: Any, job: tuple[str, int, list[int]]) -> dict[str, Any]:
    """One window under every preset."""
    kind, start, token_ids = job
    return {"text": kind, "start": start, "presets": window_losses(model, tokenizer, (token_ids, PRESETS))}


def averages(windows: list[dict[str, Any]], kind: str) -> dict[str, dict[str, float]]:
    """Each preset's means over the windows of one kind of text, or of all."""
    chosen = [w for w in windows if kind in ("all", w["text"])]
    return {
        name: {measure: float(np.mean([w["presets"][name][measure] for w in chosen])) for measure in ("kl", "top1", "nll_rise", "density")}
        for name in PRESETS
    }


if __name__ == "__main__":
    main()
