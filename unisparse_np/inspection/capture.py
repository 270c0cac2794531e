"""Scores, masks and reasons of every layer and head, collected while the model reads a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..attention import score_blocks
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..model.llama import Attention, Llama, Progress
from ..problem import Problem, ceil_div
from ..trace import Trace
from .prompt import sparse_configs, sparse_layer
from .reasons import reasons_of
from .true_attention import attention_weights, mass_per_block

BYTES_PER_BLOCK = 4 + 4 + 1  # score, true mass, reason
MOST_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class LayerCapture:
    """One sparse layer. N blocks of the prompt; [i, j] is query block i and key block j, and 0 where j > i.

    Attributes:
        config: the layer's.
        scores [Hq, N, N] float32: B of step 3, composite heads repeated.
        reasons [Hq, N, N] uint8: why a block was kept (`Reason`), 0 where it was dropped.
        true_mass [Hq, N, N] float32: what dense attention would give each block, mean over the queries; None if not asked for.
    """

    config: UniSparseConfig
    scores: np.ndarray
    reasons: np.ndarray
    true_mass: np.ndarray | None

    @property
    def kept(self) -> np.ndarray:
        """[Hq, N, N] bool."""
        return self.reasons != 0

    @property
    def densities(self) -> np.ndarray:
        """[Hq]: selected and anchor share of the visible blocks."""
        blocks = self.reasons.shape[1]
        visible = blocks * (blocks + 1) // 2
        kept = self.kept.sum(axis=(1, 2))
        return self.config.kept_blocks(kept, visible) / visible


@dataclass(frozen=True)
class Capture:
    """What one attention kept of one prompt: layer -> LayerCapture, of the layers that were asked for."""

    label: str
    layers: Mapping[int, LayerCapture]


def capture(
    model: Llama,
    token_ids: Sequence[int],
    attention: Attention,
    *,
    label: str = "",
    layers: Sequence[int] | None = None,
    with_truth: bool = True,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Capture:
    """Read the prompt with this attention and keep what it selected.

    Args:
        layers: the sparse layers to keep; None for all of them.
        with_truth: also compute dense attention's mass on every block, which costs as much as dense attention.

    Raises:
        InvalidInput: no sparse layer, a layer out of range or dense, or more blocks than fit memory.
    """
    configs = chosen_layers(model, attention, layers)
    _check_size(model, len(token_ids), configs)
    observer = _Collector(model.backend, configs, len(token_ids), with_truth)
    model.prefill(
        token_ids, model.new_cache(len(token_ids), attention), attention, chunk_size=chunk_size, progress=progress, observer=observer
    )
    return Capture(label, {layer: observer.layers[layer] for layer in configs})


def chosen_layers(model: Llama, attention: Attention, layers: Sequence[int] | None) -> dict[int, UniSparseConfig]:
    """Layer -> config, of those asked for. Raises as `capture`."""
    count = model.config.num_hidden_layers
    configs = sparse_configs(attention, count)
    if layers is None:
        return configs
    return {layer: configs[layer] for layer in sorted({sparse_layer(layer, configs, count) for layer in layers})}


def _check_size(model: Llama, tokens: int, configs: Mapping[int, UniSparseConfig]) -> None:
    blocks = sum(ceil_div(tokens, config.block_size) ** 2 for config in configs.values())
    needed = blocks * model.config.num_attention_heads * BYTES_PER_BLOCK
    if needed > MOST_BYTES:
        raise InvalidInput(
            f"the blocks of {len(configs)} layers at {tokens:,} tokens take {needed / 2**30:.1f} GiB, more than {MOST_BYTES / 2**30:.0f}: "
            "choose some layers with --layer"
        )


class _Collector:
    """An observer of a prefill from position 0 that fills one LayerCapture a layer, chunk by chunk."""

    def __init__(self, backend: Any, configs: Mapping[int, UniSparseConfig], tokens: int, with_truth: bool) -> None:
        self._backend, self._configs, self._tokens, self._with_truth = backend, configs, tokens, with_truth
        self.layers: dict[int, LayerCapture] = {}

    def __call__(self, layer: int, q: Any, k: Any, v: Any, out: Any, trace: Trace) -> None:
        if layer not in self._configs:
            return
        config = self._configs[layer]
        problem = Problem(q.shape[0], k.shape[0], q.shape[1], k.shape[1], q.shape[2], config)
        found = self.layers.setdefault(layer, self._empty(config, problem.num_q_heads))
        first = problem.query_positions(0)[0] // config.block_size
        place = (slice(None), slice(first, first + problem.num_q_blocks), slice(problem.num_k_blocks))
        mean, peak = score_blocks(q, k, problem, self._backend)
        mean, peak = self._backend.as_numpy(mean), None if peak is None else self._backend.as_numpy(peak)
        found.scores[place] = np.repeat(mean, config.head_compress, axis=0)
        found.reasons[place] = reasons_of(self._backend.as_numpy(trace.mask), mean, peak, problem)
        if found.true_mass is not None:
            found.true_mass[place] = true_masses(q, k, problem, self._backend)

    def _empty(self, config: UniSparseConfig, heads: int) -> LayerCapture:
        blocks = ceil_div(self._tokens, config.block_size)
        shape = (heads, blocks, blocks)
        true_mass = np.zeros(shape, np.float32) if self._with_truth else None
        return LayerCapture(config, np.zeros(shape, np.float32), np.zeros(shape, np.uint8), true_mass)


def true_masses(q: Any, k: Any, problem: Problem, backend: Any) -> np.ndarray:
    """Dense attention's mass on each block, mean over the queries of a block -> [Hq, Nq, Nk], a query block at a time."""
    masses = np.zeros((problem.num_q_heads, problem.num_q_blocks, problem.num_k_blocks), np.float32)
    for head in range(problem.num_q_heads):
        for i in range(problem.num_q_blocks):
            rows = slice(*problem.query_range(i))
            weights = attention_weights(q[head, rows], k[head // problem.group_size], i, problem, backend.xp)  # [rows, keys]
            mass = mass_per_block(weights, problem.config.block_size, backend.xp).mean(axis=0)  # [visible]
            masses[head, i, : problem.visible_blocks(i)] = backend.as_numpy(mass)
    return masses
