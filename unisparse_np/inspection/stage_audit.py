"""A backend against the reference, stage by stage, on random q, k, v and on a model's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ml_dtypes
import numpy as np

from ..comparison import TOLERANCES, AuditReport, audit
from ..config import UniSparseConfig
from ..model.llama import Attention, Llama
from ..trace import Trace
from .model_audit import plain
from .predictions import whole_blocks
from .prompt import sparse_configs

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
USUAL_DTYPES = ("float32", "float16", "bfloat16")
RANDOM_SHAPE = (4, 2, 400, 64)  # Hq, Hkv, tokens, d: grouped heads, and a ragged last block whatever the block size
RANDOM_CONFIGS = {
    "default": UniSparseConfig(),
    "paper": UniSparseConfig.paper(),
    "balanced": UniSparseConfig.balanced(),
    "precise": UniSparseConfig.precise(),
    "two heads pooled": UniSparseConfig(head_compress=2),
}
LAST_QUERIES = 256  # of a model's prompt: enough for whole blocks, few enough for float64


def audit_random(backend: str, dtypes: Sequence[str] = USUAL_DTYPES) -> Iterator[tuple[str, AuditReport]]:
    """One (label, report) for each config, and one for the later part of a prompt, in each dtype."""
    for dtype in dtypes:
        heads, kv_heads, tokens, head_dim = RANDOM_SHAPE
        draw = np.random.default_rng(0)
        q, k, v = (draw.standard_normal((h, tokens, head_dim)).astype(DTYPES[dtype]) for h in (heads, kv_heads, kv_heads))
        for label, config in RANDOM_CONFIGS.items():
            yield f"random, {label}", audit(q, k, v, config, backend=backend)
        yield "random, later chunk", audit(q[:, 256:], k, v, backend=backend)


def audit_layers(
    model: Llama, token_ids: Sequence[int], attention: Attention, layers: Sequence[int] | None = None
) -> Iterator[tuple[str, AuditReport]]:
    """One (label, report) for each layer asked for, on the q, k, v of the prompt's last queries, as dense attention made them.

    layers: sparse layers; None for the first, the middle and the last of these.
    """
    configs = sparse_configs(attention, model.config.num_hidden_layers)
    sparse = list(configs)
    chosen = list(layers) if layers is not None else sorted({sparse[0], sparse[len(sparse) // 2], sparse[-1]})
    recorder = _Recorder(model.backend, chosen)
    chunk_size = whole_blocks(LAST_QUERIES, [attention], model.config.num_hidden_layers)
    model.prefill(token_ids, model.new_cache(len(token_ids)), "dense", chunk_size=chunk_size, observer=recorder)
    for layer in chosen:
        q, k, v = recorder.last[layer]
        yield f"layer {layer}", audit(q, k, v, configs[layer], backend=model.backend.name)


def as_dict(reports: Sequence[tuple[str, AuditReport]]) -> dict[str, Any]:
    """All reports as plain values for JSON, with the tolerance table."""
    return plain(
        {
            "ok": all(report.ok for _, report in reports),
            "backend": reports[0][1].backend,
            "cases": [
                {
                    "inputs": label,
                    "dtype": report.dtype,
                    "ok": report.ok,
                    "config": asdict(report.problem.config),
                    "stages": [asdict(stage) | {"ok": stage.ok} for stage in report.stages],
                }
                for label, report in reports
            ],
            "tolerances": {dtype: asdict(tolerance) for dtype, tolerance in TOLERANCES.items()},
        }
    )


class _Recorder:
    """An observer that keeps q, k, v of the last full chunk at some layers, on the host."""

    def __init__(self, backend: Any, layers: Sequence[int]) -> None:
        self._backend, self._layers = backend, layers
        self.last: dict[int, list[np.ndarray]] = {}

    def __call__(self, layer: int, q: Any, k: Any, v: Any, out: Any, trace: Trace) -> None:
        if layer in self._layers and (layer not in self.last or q.shape[1] >= self.last[layer][0].shape[1]):
            self.last[layer] = [np.array(self._backend.as_numpy(x)) for x in (q, k, v)]
