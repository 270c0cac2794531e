"""How much looseness each head bears: what its own sparse attention changes in its layer's output, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..attention import attend
from ..config import UniSparseConfig
from ..model.llama import Llama
from .suite import chunk_unit

FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # of the common looseness: where heads are measured
_STEPS = 61  # between the first and the last factor: what heads can get
_BISECTIONS = 50
_HOST_CHUNK, _DEVICE_CHUNK = 1024, 8192  # tokens read at a time, about


class HeadCurves(NamedTuple):
    """errors: squared change of the layer's output, mean over tokens; densities: anchors included; both [layers, Hq, len(FACTORS)]."""

    errors: np.ndarray
    densities: np.ndarray


def measure_head_curves(model: Llama, windows: Sequence[Sequence[int]], config_of: Callable[[float], UniSparseConfig]) -> HeadCurves:
    """Read the windows with dense attention, and beside it every layer's attention under config_of(factor) for each of FACTORS.

    Errors are those of the second half of each window, where there is something to leave out.
    """
    backend, xp = model.backend, model.backend.layers.xp
    configs = [config_of(factor) for factor in FACTORS]
    num_layers, heads = model.config.num_hidden_layers, model.config.num_attention_heads
    grams = [output_gram(model, layer) for layer in range(num_layers)]
    sums = xp.zeros((2, num_layers, len(FACTORS), heads))  # errors; selected blocks
    visible, unit = 0, chunk_unit(configs)
    chunk = max(unit, (_HOST_CHUNK if backend.layers.memory is None else _DEVICE_CHUNK) // unit * unit)

    for token_ids in windows:
        half = len(token_ids) // 2

        def observe(layer: int, q: Any, k: Any, v: Any, out: Any, trace: Any, half: int = half) -> None:
            nonlocal visible
            first = k.shape[1] - q.shape[1]  # the chunk's first position
            rows = slice(max(0, half - first), None)
            for n, config in enumerate(configs):
                sparse, chosen = attend(q, k, v, config, q_offset=first, backend=backend)
                change = sparse[:, rows].astype(np.float32) - out[:, rows].astype(np.float32)  # [Hq, t, d]
                sums[0, layer, n] += ((change @ grams[layer]) * change).sum(axis=(1, 2))
                sums[1, layer, n] += chosen.mask.sum(axis=(1, 2))
            if layer == 0:
                visible += visible_blocks(first, q.shape[1], configs[0].block_size)

        cache = model.new_cache(len(token_ids), prompt_tokens=len(token_ids))
        model.prefill(token_ids, cache, "dense", chunk_size=chunk, observer=observe)
    errors, selected = (np.moveaxis(of, 1, 2) for of in backend.layers.to_host(sums))  # [layers, Hq, factors] each
    return HeadCurves(errors / sum(len(token_ids) // 2 for token_ids in windows), configs[0].kept_blocks(selected, visible) / visible)


def output_gram(model: Llama, layer: int) -> Any:
    """W_h^T W_h of every head's part of the output product, [Hq, d, d] float32: |change W_h^T|^2 = change gram change."""
    layers, of = model.backend.layers, model.config
    weight = layers.to_host(model.weights.layers[layer].output).astype(np.float32)  # [hidden, Hq d]
    parts = weight.reshape(len(weight), of.num_attention_heads, of.head_dim).transpose(1, 2, 0)  # [Hq, d, hidden]
    return layers.xp.asarray(parts @ parts.transpose(0, 2, 1))


def visible_blocks(first: int, tokens: int, block_size: int) -> int:
    """Under causality, summed over the query blocks of a chunk that begins at position `first`."""
    return sum((first + min(tokens, start + block_size) - 1) // block_size + 1 for start in range(0, tokens, block_size))


@dataclass(frozen=True, eq=False)
class HeadBalance:
    """What each head gets at any looseness. looseness: the common one around which the curves were taken; weights: one a layer."""

    curves: HeadCurves
    weights: Sequence[float]
    looseness: float

    def factors(self, looseness: float) -> list[tuple[float, ...]]:
        """On `self.looseness`, each head's [layers][Hq]: the fewest blocks at the loss of all heads at a common `looseness`.

        Scaling all of them alike would lose more: heads whose error grows slowly have more to give at a stricter bound.
        """
        return balanced_factors(self.curves, self.weights, looseness / self.looseness)


def balanced_factors(curves: HeadCurves, weights: Sequence[float], common_factor: float = 1.0) -> list[tuple[float, ...]]:
    """Each head's factor on the looseness of the curves, so that as many blocks as possible are left out at the loss which all heads
    have at `common_factor`.

    The loss is the sum of all heads' errors times their layer's weight; blocks are fewest at a given loss where every head
    minimises loss + mu density with the same mu (Lagrange), which bisection finds.
    """
    at = np.geomspace(FACTORS[0], FACTORS[-1], _STEPS)
    errors = _between(np.log(np.maximum(curves.errors, 1e-30)), at)
    losses = np.exp(errors) * np.asarray(weights)[:, None, None]  # [layers, Hq, steps]
    densities = _between(curves.densities, at)
    common = np.exp(np.interp(np.log(common_factor), np.log(at), np.log(np.maximum(losses.sum(axis=(0, 1)), 1e-30))))
    low, high = np.log(common) - 30.0, np.log(common) + 30.0  # of log mu; more of it, more loss
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        chosen = (losses + np.exp(middle) * densities).argmin(axis=2)
        loss = np.take_along_axis(losses, chosen[..., None], axis=2).sum()
        low, high = (middle, high) if loss <= common else (low, middle)
    chosen = (losses + np.exp(low) * densities).argmin(axis=2)  # [layers, Hq]
    return [tuple(float(f"{factor:.3g}") for factor in of_layer) for of_layer in at[chosen]]


def _between(curves: np.ndarray, at: np.ndarray) -> np.ndarray:
    """[layers, Hq, len(FACTORS)] -> [layers, Hq, len(at)], straight lines over the factor's logarithm."""
    rows = [np.interp(np.log(at), np.log(FACTORS), row) for row in curves.reshape(-1, curves.shape[-1])]
    return np.array(rows).reshape(*curves.shape[:-1], len(at))
