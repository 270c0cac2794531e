"""One probe of the tuner: the loss and the cost of an attention on some windows, each measured once and written down."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ..config import UniSparseConfig
from ..model.llama import Attention, Llama
from .cost import modelled_cost
from .divergence import divergence, log_probabilities, row_blocks
from .results import ResultsFile
from .suite import chunk_unit, plain_attention
from .text_suite import logits_of_piece, pieces
from .windows import Windows

CostKind = Literal["model", "time"]
_TIMINGS = 2  # of a prefill; the faster counts
_TELLS = 0.9  # a sparse prefill that takes less than this share of a dense one is faster, and not by chance


class Probe(NamedTuple):
    """kl: KL(dense || sparse) in nats per token over the second halves, and per window. cost: share of dense. densities: one a layer."""

    kl: float
    cost: float
    densities: list[float]
    kl_of_windows: list[float]


class Prober:
    """Measures attentions on windows of a text. What the results file holds already is not measured again.

    Dense log-probabilities of each window's second half are kept in a temporary file, as float16: log-probabilities near 0, those
    that weigh in a KL, keep a relative precision of 2^-11, so the KL is good to about 1e-6. The file has no name and goes with
    the process; the operating system keeps it in memory where there is room.
    """

    def __init__(
        self,
        model: Llama,
        windows: Windows,
        results: ResultsFile,
        cost_kind: CostKind = "model",
        progress: Callable[[], None] | None = None,
    ) -> None:
        self._model, self._windows, self._results = model, windows, results
        self._cost_kind = cost_kind
        self._progress = progress
        self._dense: dict[int, np.ndarray] = {}
        self._known = {_key(record["attention"], record["window"]): record for record in results.records}

    def __call__(self, attention: Attention, windows: Sequence[int]) -> Probe:
        """The attention's loss and cost, means over these windows."""
        records = [self._record(attention, window) for window in windows]
        kl_of_windows = [record["kl"] for record in records]
        densities = [float(np.mean(of_layer)) for of_layer in zip(*(record["densities"] for record in records), strict=True)]
        cost = modelled_cost(attention, densities)
        if self._cost_kind == "time":
            dense_seconds = sum(self._record("dense", window)["seconds"] for window in windows)
            cost = sum(record["seconds"] for record in records) / dense_seconds
        if self._progress is not None:
            self._progress()
        return Probe(float(np.mean(kl_of_windows)), cost, densities, kl_of_windows)

    def _record(self, attention: Attention, window: int) -> dict[str, Any]:
        key = _key(plain_attention(attention), window)
        if key not in self._known:
            record = {"attention": plain_attention(attention), "window": window, **self._measure(attention, window)}
            self._results.append(record)
            self._known[key] = record
        return self._known[key]

    def _measure(self, attention: Attention, window: int) -> dict[str, Any]:
        token_ids, layers = self._windows[window], self._model.backend.layers
        cache, half = self._read_half(token_ids, attention)
        targets = np.array(token_ids[half + 1 :])
        kl, done = 0.0, 0
        dense = None if attention == "dense" else self._dense_log_probabilities(window)
        for logits in self._logits_after(half, token_ids, attention, cache):
            if dense is not None:
                rows = slice(done, done + len(logits))
                kl += float(divergence(layers.xp.asarray(dense[rows]), logits, targets[rows], layers).kl.sum())
            done += len(logits)
        measured: dict[str, Any] = {"kl": kl / done, "densities": self._model.layer_densities(cache)}
        return measured | ({"seconds": self._seconds(token_ids, attention)} if self._cost_kind == "time" else {})

    def _read_half(self, token_ids: list[int], attention: Attention) -> tuple[Any, int]:
        """A cache that holds whole blocks of the first half, and where the second half begins."""
        cache = self._model.new_cache(len(token_ids), attention, prompt_tokens=len(token_ids))
        half = len(token_ids) // 2
        if split := half // chunk_unit([attention]) * chunk_unit([attention]):
            self._model.prefill(token_ids[:split], cache, attention)
        return cache, half

    def _logits_after(self, half: int, token_ids: list[int], attention: Attention, cache: Any) -> Any:
        """Logits of positions half .. len-2, in pieces [t, vocab], the backend's."""
        split = cache.length
        for start, stop in pieces(len(token_ids) - 1 - split, chunk_unit([attention])):
            logits = logits_of_piece(self._model, token_ids[split + start : split + stop], attention, cache)
            if split + stop > half:
                yield logits[max(0, half - split - start) :]

    def _dense_log_probabilities(self, window: int) -> np.ndarray:
        """[T/2, vocab] float16 of the window's second half, computed on first use."""
        if window not in self._dense:
            token_ids, layers = self._windows[window], self._model.backend.layers
            cache, half = self._read_half(token_ids, "dense")
            shape = (len(token_ids) - 1 - half, self._model.config.vocab_size)
            kept = np.memmap(tempfile.TemporaryFile(), dtype=np.float16, mode="w+", shape=shape)  # noqa: SIM115  (the array keeps it)
            done = 0
            for logits in self._logits_after(half, token_ids, "dense", cache):
                for rows in row_blocks(*logits.shape):
                    part = log_probabilities(logits[rows], layers.xp)
                    least = np.finfo(np.float16).min
                    kept[done : done + len(part)] = layers.to_host(layers.xp.maximum(part, least).astype(np.float16))
                    done += len(part)
            self._dense[window] = kept
        return self._dense[window]

    def _seconds(self, token_ids: list[int], attention: Attention) -> float:
        return prefill_seconds(self._model, token_ids, attention)


def time_tells(model: Llama, token_ids: list[int]) -> bool:
    """Whether the default preset reads a prompt faster than dense attention: where launching takes longer than the work, nothing does."""
    dense, sparse = (prefill_seconds(model, token_ids, attention) for attention in ("dense", UniSparseConfig()))
    return sparse < _TELLS * dense


def prefill_seconds(model: Llama, token_ids: list[int], attention: Attention) -> float:
    """The fastest of a few prefills; the first, which may compile kernels, does not count."""
    seconds = []
    for _ in range(1 + _TIMINGS):
        cache = model.new_cache(len(token_ids), attention)
        started = time.perf_counter()
        model.prefill(token_ids, cache, attention)  # its logits come to the host, so the work is done when it returns
        seconds.append(time.perf_counter() - started)
    return min(seconds[1:])


def _key(attention: Any, window: int) -> str:
    return f"{window} {json.dumps(attention)}"
