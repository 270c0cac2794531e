"""The rules of block selection that are measured side by side, by name, and which of them say something about what."""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS

from unisparse_np import UniSparseConfig


def config(top_p: float | None = None, tau: float | None = None, **more: int) -> UniSparseConfig:
    """A rule with sink, local block and one anchor unless said otherwise."""
    return UniSparseConfig(top_p=top_p, row_threshold=tau, **more)


PLAIN = {"key_anchors": 0}
S64 = {"block_size": 64}
RULES: dict[str, UniSparseConfig | list[UniSparseConfig]] = {
    "paper, bare, P .95": UniSparseConfig.paper(),
    "+ sink block": config(0.95, key_anchors=0, local_blocks=0),
    "+ local block": config(0.95, **PLAIN),
    "+ 1 anchor a block: default": UniSparseConfig(),
    "2 anchors": config(0.95, key_anchors=2),
    "anchors, no sink, no local": config(0.95, sink_blocks=0, local_blocks=0),
    "no anchors, P .98": config(0.98, **PLAIN),
    "no anchors, P .99": config(0.99, **PLAIN),
    "P .98": config(0.98),
    "P .90": config(0.90),
    "P .80": config(0.80),
    "c 4": config(0.95, q_compress=4, k_compress=4),
    "c 16": config(0.95, q_compress=16, k_compress=16),
    "c 32": config(0.95, q_compress=32, k_compress=32),
    "tau .02": config(tau=0.02),
    "c 4, tau .02": config(tau=0.02, q_compress=4, k_compress=4),
    "c 2, tau .02": config(tau=0.02, q_compress=2, k_compress=2),
    "S 64": config(0.95, **S64),
    "S 64, tau .02": config(tau=0.02, **S64),
    "S 64, c 4, P .98": config(0.98, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, tau .01": config(tau=0.01, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, tau .02": config(tau=0.02, q_compress=4, k_compress=4, **S64),
    "S 64, c 4, P .95 or tau .02": config(0.95, 0.02, q_compress=4, k_compress=4, **S64),
    "S 64, c_q 4, c_k 2, tau .02": config(tau=0.02, q_compress=4, k_compress=2, **S64),
    "S 64, c_q 4, c_k 2, tau .01": config(tau=0.01, q_compress=4, k_compress=2, **S64),
    "S 64, c_q 8, c_k 2, P .95": config(0.95, q_compress=8, k_compress=2, **S64),
    "S 64, c_q 2, c_k 4, tau .01": config(tau=0.01, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 4, tau .02": config(tau=0.02, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 4, tau .03": config(tau=0.03, q_compress=2, k_compress=4, **S64),
    "S 64, c_q 2, c_k 8, tau .02": config(tau=0.02, q_compress=2, k_compress=8, **S64),
    "S 64, c_q 2, c_k 8, tau .01": config(tau=0.01, q_compress=2, k_compress=8, **S64),
    "S 64, c_q 1, c_k 8, tau .03": config(tau=0.03, q_compress=1, k_compress=8, **S64),
    "S 64, c_q 1, c_k 8, tau .025": config(tau=0.025, q_compress=1, k_compress=8, **S64),
    "S 64, c_q 1, c_k 16, tau .02": config(tau=0.02, q_compress=1, k_compress=16, **S64),
    "S 64, c 8, P .95 or c_q 4, c_k 2, tau .02": config(0.95, 0.02, q_compress=4, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .95 or c_q 8, c_k 2, tau .02": config(0.95, 0.02, q_compress=8, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .93 or c_q 4, c_k 2, tau .02": config(0.93, 0.02, q_compress=4, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .90 or c_q 2, c_k 4, tau .02": config(0.90, 0.02, q_compress=2, k_compress=4, top_p_compress=8, **S64),
    "S 64, c 8, P .90 or c_q 2, c_k 2, tau .03": config(0.90, 0.03, q_compress=2, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .93 or c_q 2, c_k 2, tau .03": config(0.93, 0.03, q_compress=2, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .95 or c_q 2, c_k 2, tau .03": config(0.95, 0.03, q_compress=2, k_compress=2, top_p_compress=8, **S64),
    "S 64, c 8, P .93 or c_q 2, c_k 2, tau .025: balanced": config(0.93, 0.025, q_compress=2, k_compress=2, top_p_compress=8, **S64),
    "S 64, c_q 2, c_k 2, tau .03": config(tau=0.03, q_compress=2, k_compress=2, **S64),
    "S 64, c_q 2, c_k 2, tau .035": config(tau=0.035, q_compress=2, k_compress=2, **S64),
    "S 64, c_q 2, c_k 2, tau .0375": config(tau=0.0375, q_compress=2, k_compress=2, **S64),
    "S 64, c_q 2, c_k 2, tau .04": config(tau=0.04, q_compress=2, k_compress=2, **S64),
    "S 64, c_q 2, c_k 2, tau .05": config(tau=0.05, q_compress=2, k_compress=2, **S64),
}


def of_heads(kind: str) -> list[UniSparseConfig]:
    """A config a layer with values per head, as benchmarks/head_values.py found them; none before it has run."""
    path = RESULTS / f"head_values_{kind}.json"
    layers = json.loads(path.read_text(encoding="utf-8"))["attention"] if path.exists() else []
    return [one_layer(**layer) for layer in layers]


def one_layer(**settings: Any) -> UniSparseConfig:
    """A config from plain JSON values."""
    return UniSparseConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()})


PER_HEAD = {"S 64, P per head": of_heads("top_p"), "S 64, c 8, P or c 2, tau, both per head": of_heads("both")}
RULES |= {rule: layers for rule, layers in PER_HEAD.items() if layers}
UNIONS = tuple(rule for rule in RULES if " or c_q " in rule)
FINE = tuple(rule for rule in RULES if rule.startswith("S 64, c_q 2, c_k 2, "))
ON_NEEDLES = (
    "paper, bare, P .95", "+ sink block", "+ local block", "+ 1 anchor a block: default", "tau .02", "c 4, tau .02", "c 2, tau .02",
    "S 64", "S 64, c 4, P .98", "S 64, tau .02", "S 64, c 4, tau .02", "S 64, c_q 4, c_k 2, tau .02", "S 64, c_q 2, c_k 4, tau .02",
    "S 64, c_q 1, c_k 8, tau .025", *UNIONS, *FINE,
)  # fmt: skip
ON_COPIES = (
    "paper, bare, P .95", "+ sink block", "+ local block", "+ 1 anchor a block: default", "2 anchors", "P .98", "S 64",
    "S 64, c 4, P .98", "S 64, c_q 4, c_k 2, tau .02", "S 64, c_q 2, c_k 4, tau .02", "S 64, c_q 1, c_k 8, tau .025", *UNIONS,
    *(rule for rule in PER_HEAD if rule in RULES),
)  # fmt: skip
DEFAULT_RULES = {"text": tuple(RULES), "copy": ON_COPIES, "needles": ON_NEEDLES}
