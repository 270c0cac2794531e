"""The report page: one HTML file with the masks, scores and texts inside, that needs no network."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..model.tokenizer import Tokenizer
from ..problem import ceil_div
from .capture import Capture, LayerCapture

STEPS = 65535  # scores are stored as 16-bit square roots: 0.3% exact at a score of 1e-4, and 0 only below 1e-10
MOST_BYTES = 64 * 1024**2


@dataclass(frozen=True)
class Focus:
    """What the page shows first; block -1 is the last query block."""

    layer: int
    head: int
    block: int


def report_page(captures: Sequence[Capture], token_ids: Sequence[int], tokenizer: Tokenizer, model_name: str, focus: Focus) -> bytes:
    """The page for one config, or two side by side, in UTF-8.

    Raises:
        InvalidInput: it would be too large for a browser.
    """
    sizes = sorted({layer.config.block_size for capture in captures for layer in capture.layers.values()})
    _check_size(captures)
    data = {
        "tokens": len(token_ids),
        "focus": {"layer": focus.layer, "head": focus.head, "block": focus.block},
        "texts": {size: block_texts(token_ids, size, tokenizer) for size in sizes},
        "views": [_view(capture) for capture in captures],
    }
    environment = jinja2.Environment(autoescape=True)
    page = environment.from_string(_part("page.html")).render(
        title=f"What sparse attention kept: {model_name}",
        model_name=model_name,
        tokens=len(token_ids),
        style=Markup(_part("style.css")),
        script=Markup(_part("script.js")),
        data=Markup(_json_in_html(data)),
    )
    return page.encode("utf-8")


def block_texts(token_ids: Sequence[int], block_size: int, tokenizer: Tokenizer) -> list[str]:
    """The text of each block, special tokens spelled out."""
    starts = range(0, len(token_ids), block_size)
    return [tokenizer.decode(token_ids[start : start + block_size], show_special_tokens=True) for start in starts]


def flags_of(config: UniSparseConfig) -> str:
    """The config in one line."""
    rules = []
    if config.top_p is not None:
        rules.append(f"Top-P {_short(config.top_p)}")
    if config.row_threshold is not None:
        rules.append(f"row threshold {_short(config.row_threshold)}")
    compress = f"{config.q_compress}" if config.q_compress == config.k_compress else f"{config.q_compress} x {config.k_compress}"
    if config.top_p_compress is not None:
        compress += f" ({config.top_p_compress} for Top-P)"
    heads = f", {config.head_compress} heads pooled" if config.head_compress > 1 else ""
    return (
        f"{', '.join(rules)}; blocks of {config.block_size}, compress {compress}{heads}; "
        f"sink {config.sink_blocks}, local {config.local_blocks}, anchors {config.key_anchors}"
    )


def _short(values: Any) -> str:
    return f"{values:g}" if not isinstance(values, tuple) else f"{min(values):g} to {max(values):g} by head"


def _view(capture: Capture) -> dict[str, Any]:
    return {
        "label": capture.label,
        "layers": [{"layer": number, **_layer(layer)} for number, layer in capture.layers.items()],
    }


def _layer(layer: LayerCapture) -> dict[str, Any]:
    """The visible blocks of every head, row after row: entry i * (i + 1) / 2 + j is query block i and key block j."""
    blocks = layer.scores.shape[1]
    rows, columns = np.tril_indices(blocks)
    order = np.argsort(-np.where(np.tri(blocks, dtype=bool), layer.scores, -1.0), axis=-1, kind="stable")
    ranks = np.empty_like(order)
    np.put_along_axis(ranks, order, np.arange(blocks)[None, None, :], axis=-1)
    rank_type = "u1" if blocks <= 256 else "<u2"
    top_p = layer.config.top_p
    return {
        "block_size": layer.config.block_size,
        "blocks": blocks,
        "flags": flags_of(layer.config),
        "top_p": list(top_p) if isinstance(top_p, tuple) else top_p,
        "head_compress": layer.config.head_compress,
        "densities": [round(float(density), 4) for density in layer.densities],
        "scores": _base64(_quantised(layer.scores[:, rows, columns])),
        "ranks": _base64(ranks[:, rows, columns].astype(rank_type)),
        "reasons": _base64(layer.reasons[:, rows, columns]),
        "true_mass": None if layer.true_mass is None else _base64(_quantised(layer.true_mass[:, rows, columns])),
    }


def _quantised(shares: np.ndarray) -> np.ndarray:
    """Shares from 0 to 1 as 16-bit square roots, little-endian."""
    return np.round(np.sqrt(np.clip(shares, 0.0, 1.0)) * STEPS).astype("<u2")


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _check_size(captures: Sequence[Capture]) -> None:
    layers = [layer for capture in captures for layer in capture.layers.values()]
    blocks = [ceil_div(layer.scores.shape[1] * (layer.scores.shape[1] + 1), 2) * layer.scores.shape[0] for layer in layers]
    needed = sum(blocks) * 7 * 4 // 3  # score, rank, reason and true mass, in base64
    if needed > MOST_BYTES:
        raise InvalidInput(
            f"a page of {len(layers)} layers would hold {needed / 1e6:,.0f} MB, more than a browser opens quickly: choose some with --layer"
        )


def _json_in_html(data: object) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts hold."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _part(name: str) -> str:
    return (resources.files(__package__) / "page" / name).read_text(encoding="utf-8")
