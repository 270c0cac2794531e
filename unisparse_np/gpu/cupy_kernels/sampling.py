"""DeviceSampler: the next token from logits on the GPU, by the rule of model/sampling.py; only the token comes to the host."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

from ...errors import broken_logits
from ...problem import ceil_div
from .device import kernel

THREADS, SEARCH_THREADS, SEARCH_BYTES = 256, 1024, 32 * (8 + 3 * 4)  # of sample.cu
DRAW_THREADS, DRAW_BYTES, LARGEST_WEIGHT = 1024, 8 * (2048 + 32 + 3), 1 << 43  # of draw.cu
FOUND = np.dtype([(name, np.float64 if name == "largest" else np.int64) for name in ("largest", "token", "broken", "possible", "positive")])
NULL = np.uint64(0)


class DeviceSampler:
    """Chooses one token id from logits on the device; the settings, already checked, are those of model.sampling.Sampler.

    It draws the token that Sampler draws for the same logits and seed, except where the random number, or top_p, falls within
    rounding of a boundary between two tokens. Tokens seen before are kept on the device, for the repetition penalty.
    """

    def __init__(
        self, temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int | None, vocab_size: int
    ) -> None:
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self._random = np.random.default_rng(seed)
        self._found = cupy.zeros(FOUND.itemsize // 8, np.int64)  # one FOUND
        self._weights = cupy.empty(vocab_size if temperature > 0.0 else 0, np.uint64)
        self._seen = cupy.zeros(vocab_size, np.uint8) if repetition_penalty != 1.0 else None
        self._seen_ids: np.ndarray = np.empty(0, dtype=np.int64)  # what _seen was made from

    def __call__(self, logits: Any, previous_ids: Any) -> int:
        """The next token id: logits [vocab] float32 on the device, previous_ids of the prompt and the answer so far, for the penalty.

        Waits for the device once, to read the token. Raises CheckpointError when the logits hold NaN or +inf, or forbid every token.
        """
        if self._seen is not None:
            self._note_seen(np.asarray(previous_ids, dtype=np.int64), self._seen)
        penalty, vocab = np.float64(self.repetition_penalty), np.int32(len(logits))
        seen = NULL if self._seen is None else self._seen
        find = kernel("sample.cu", "find_largest", SEARCH_BYTES)
        find((1,), (SEARCH_THREADS,), (logits, seen, penalty, vocab, self._found), shared_mem=SEARCH_BYTES)
        if self.temperature > 0.0:
            arguments = (logits, seen, penalty, np.float64(self.temperature), vocab, self._found, self._weights)
            kernel("sample.cu", "weigh", 0)((ceil_div(len(logits), THREADS),), (THREADS,), arguments)
            self._draw(vocab)
        found = cupy.asnumpy(self._found).view(FOUND)[0]
        if found["broken"] or not found["possible"]:
            raise broken_logits(int(found["broken"]), len(logits))
        return int(found["token"])

    def _note_seen(self, ids: np.ndarray, seen: Any) -> None:
        """Bring the seen tokens, [vocab] uint8, up to date: usually by one more id than at the last call."""
        known = len(self._seen_ids)
        if not np.array_equal(ids[:known], self._seen_ids):
            seen[...] = 0
            known = 0
        if len(ids) > known:
            new = cupy.asarray(ids[known:])
            kernel("sample.cu", "note_seen", 0)((ceil_div(len(new), THREADS),), (THREADS,), (new, np.int32(len(new)), seen))
        self._seen_ids = ids.copy()

    def _draw(self, vocab: np.int32) -> None:
        """Steps 3 to 6: the token drawn from the weights, on the device."""
        positive, token = (self._found[FOUND.names.index(name) :] for name in ("positive", "token"))  # type: ignore[union-attr]
        least = np.int64(math.ceil(self.min_p * LARGEST_WEIGHT))
        settings = np.int32(min(self.top_k, int(vocab))), np.float64(self.top_p), least, np.float64(self._random.random())
        draw = kernel("draw.cu", "draw", DRAW_BYTES)
        draw((1,), (DRAW_THREADS,), (self._weights, vocab, positive, *settings, token), shared_mem=DRAW_BYTES)


def new_sampler(
    temperature: float, top_k: int, top_p: float, min_p: float, repetition_penalty: float, seed: int | None, vocab_size: int
) -> DeviceSampler:
    """The sampler of logits on this backend's device."""
    return DeviceSampler(temperature, top_k, top_p, min_p, repetition_penalty, seed, vocab_size)
