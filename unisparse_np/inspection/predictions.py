"""How far a model's predictions move when its attention becomes sparse, chunk by chunk so that no prompt is too long."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..config import UniSparseConfig
from ..model.kv_cache import KVCache
from ..model.llama import Attention, Llama, Observer
from ..problem import ceil_div
from .prompt import per_layer

CHUNK_SIZE = 512  # tokens whose logits [tokens, vocab] are held at once, for dense and for each sparse run
ROWS_AT_ONCE = 64  # of logits, widened to float64


@dataclass(frozen=True)
class Predictions:
    """One sparse run against the dense run, over every position of a prompt.

    Attributes:
        kl_mean: mean over positions of KL(dense || sparse), in nats.
        kl_p99: its 99th percentile: one position in a hundred moves more.
        kl_last: at the last position, which the answer begins with.
        top1_agreement: share of positions where both find the same token likeliest.
        same_first_token: whether they do at the last position.
        perplexity_dense, perplexity_sparse: of the prompt itself; NaN for a single token.
        densities: one a layer, of the sparse run.
    """

    kl_mean: float
    kl_p99: float
    kl_last: float
    top1_agreement: float
    same_first_token: bool
    perplexity_dense: float
    perplexity_sparse: float
    densities: tuple[float, ...]

    @property
    def density(self) -> float:
        """Mean over layers."""
        return sum(self.densities) / len(self.densities)


def compare_predictions(
    model: Llama,
    token_ids: Sequence[int],
    attentions: Sequence[Attention],
    *,
    chunk_size: int | None = None,
    dense_observer: Observer | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Predictions]:
    """Run dense and every given attention side by side over the prompt; one Predictions for each of `attentions`.

    progress is called with (tokens done, tokens in all). Errors are those of `Llama.prefill`.
    """
    caches = [model.new_cache(len(token_ids), attention) for attention in attentions]
    chunk_size = whole_blocks(chunk_size or CHUNK_SIZE, attentions, model.config.num_hidden_layers)

    def rows(attention: Attention, cache: KVCache, observer: Observer | None = None) -> Iterator[np.ndarray]:
        """Logits a few rows at a time: the same rows for every run, as all have the same chunks."""
        for chunk in model.logits_by_chunk(token_ids, cache, attention, chunk_size=chunk_size, observer=observer):
            yield from (chunk[start : start + ROWS_AT_ONCE] for start in range(0, len(chunk), ROWS_AT_ONCE))

    dense_rows = rows("dense", model.new_cache(len(token_ids), "dense"), dense_observer)
    sparse_rows = [rows(attention, cache) for attention, cache in zip(attentions, caches, strict=True)]
    totals = [_Totals() for _ in attentions]
    targets = np.array([*token_ids[1:], -1])  # the last position has none
    done = 0
    for same_rows in zip(dense_rows, *sparse_rows, strict=True):
        dense, *sparse = (log_softmax(logits) for logits in same_rows)  # [n, vocab] each
        for total, logs in zip(totals, sparse, strict=True):
            total.add(dense, logs, targets[done : done + len(dense)])
        done += len(dense)
        if progress is not None:
            progress(done, len(token_ids))
    return [total.predictions(model.layer_densities(cache)) for total, cache in zip(totals, caches, strict=True)]


def whole_blocks(chunk_size: int, attentions: Sequence[Attention], num_layers: int) -> int:
    """chunk_size rounded up to whole query blocks of every config in use, so that all runs can be cut alike."""
    configs = [config for attention in attentions for config in per_layer(attention, num_layers)]
    unit = math.lcm(*(config.block_size for config in configs if isinstance(config, UniSparseConfig)))
    return ceil_div(chunk_size, unit) * unit


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """[n, vocab] -> log-probabilities in float64."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class _Totals:
    """Per-position measures of one sparse run."""

    def __init__(self) -> None:
        self.kl: list[np.ndarray] = []
        self.agrees: list[np.ndarray] = []
        self.dense_nll: list[np.ndarray] = []
        self.sparse_nll: list[np.ndarray] = []

    def add(self, dense: np.ndarray, sparse: np.ndarray, targets: np.ndarray) -> None:
        """Log-probabilities [n, vocab] of the same positions, and the tokens [n] that follow (-1: none)."""
        self.kl.append((np.exp(dense) * (dense - sparse)).sum(axis=1))
        self.agrees.append(dense.argmax(axis=1) == sparse.argmax(axis=1))
        rows = np.flatnonzero(targets >= 0)
        self.dense_nll.append(-dense[rows, targets[rows]])
        self.sparse_nll.append(-sparse[rows, targets[rows]])

    def predictions(self, densities: Sequence[float]) -> Predictions:
        kl, agrees, dense_nll, sparse_nll = (np.concatenate(x) for x in (self.kl, self.agrees, self.dense_nll, self.sparse_nll))
        return Predictions(
            kl_mean=float(kl.mean()),
            kl_p99=float(np.percentile(kl, 99)),
            kl_last=float(kl[-1]),
            top1_agreement=float(agrees.mean()),
            same_first_token=bool(agrees[-1]),
            perplexity_dense=math.exp(dense_nll.mean()) if dense_nll.size else math.nan,
            perplexity_sparse=math.exp(sparse_nll.mean()) if sparse_nll.size else math.nan,
            densities=tuple(densities),
        )
