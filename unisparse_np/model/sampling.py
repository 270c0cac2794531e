"""From logits to the next token: greedy by default, or a draw from a trimmed distribution.

The steps, in this order (each sees what the one before it left):
    1. repetition_penalty  logits of tokens already seen are divided by it when positive, multiplied when not
    2. temperature         logits / temperature; 0 stops here and takes the largest logit (the smallest id of a tie)
    3. top_k               keep the k most probable tokens (ties: smallest ids first)
    4. top_p               keep the fewest most probable tokens whose share of what step 3 left reaches top_p
    5. min_p               keep tokens at least min_p times as probable as the most probable one
    6. draw                one uniform number from the seeded generator, looked up in the cumulative distribution
Every step keeps the most probable token, so there is always one to draw.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence

import numpy as np

from ..errors import InvalidInput, broken_logits


class Sampler:
    """Chooses one token id from logits; two samplers of the same settings and seed choose alike.

    Args:
        temperature: 0 is greedy; below 1 sharpens, above 1 flattens.
        top_k: how many tokens to keep; 0 is off.
        top_p: probability mass to keep, 0 < top_p <= 1; 1 is off.
        min_p: least probability relative to the largest, 0 <= min_p <= 1; 0 is off.
        repetition_penalty: above 1 discourages tokens already seen; 1 is off.
        seed: of the random generator; None draws differently each time.

    Raises:
        InvalidInput: a value is outside its range.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> None:
        self.temperature = _number("temperature", temperature, "a number of at least 0 (0 is greedy)", lambda x: x >= 0)
        self.top_k = _whole_number("top_k", top_k, "a whole number of at least 0 (0 is off)")
        self.top_p = _number("top_p", top_p, "a number with 0 < top_p <= 1 (1 is off)", lambda x: 0 < x <= 1)
        self.min_p = _number("min_p", min_p, "a number with 0 <= min_p <= 1 (0 is off)", lambda x: 0 <= x <= 1)
        self.repetition_penalty = _number(
            "repetition_penalty", repetition_penalty, "a number above 0 (1 is off, 1.1 is mild)", lambda x: x > 0
        )
        if seed is not None:
            seed = _whole_number("seed", seed, "a whole number of at least 0, or None")
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: np.ndarray, previous_ids: Sequence[int] | np.ndarray) -> int:
        """The next token id.

        logits [vocab] float32; -inf forbids a token. previous_ids: prompt and generated ids so far, for the penalty.

        Raises:
            CheckpointError: the logits hold NaN or +inf, or forbid every token.
        """
        if not math.isfinite(logits.max()):  # NaN wins every maximum
            raise broken_logits(int(np.isnan(logits).sum() + np.isposinf(logits).sum()), len(logits))
        if self.repetition_penalty != 1.0:
            logits = penalize_repetition(logits, previous_ids, self.repetition_penalty)
        if self.temperature == 0.0:
            return int(np.argmax(logits))
        token_ids, probabilities = self.distribution(logits)
        cumulative = np.cumsum(probabilities)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(token_ids[min(int(drawn), len(token_ids) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Steps 2 to 5, for a temperature above 0: (ids [n] of the tokens that can be drawn, their probabilities [n] float64)."""
        with np.errstate(over="ignore"):  # a tiny temperature may take a loser to -inf: its weight is 0
            weights = np.exp((logits.astype(np.float64) - float(logits.max())) / self.temperature)  # [vocab], the largest is 1
        token_ids = np.flatnonzero(weights)  # -inf is never drawn
        if 0 < self.top_k < len(token_ids):
            token_ids = keep_top_k(weights, token_ids, self.top_k)
        if self.top_p < 1.0:
            token_ids = keep_top_p(weights, token_ids, self.top_p)
        if self.min_p > 0.0:
            token_ids = keep_min_p(weights, token_ids, self.min_p)
        kept = weights[token_ids]
        return token_ids, kept / kept.sum()


def penalize_repetition(logits: np.ndarray, previous_ids: Sequence[int] | np.ndarray, penalty: float) -> np.ndarray:
    """Step 1, as in CTRL (Keskar et al. 2019, section 4.1) with the sign rule of Hugging Face: seen tokens lose, once each.

    logits [vocab] -> a new array [vocab] float64.
    """
    logits = logits.astype(np.float64)
    seen = np.zeros(len(logits), dtype=bool)
    seen[np.asarray(previous_ids, dtype=np.int64)] = True
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(weights: np.ndarray, token_ids: np.ndarray, top_k: int) -> np.ndarray:
    """Step 3: the ids of the top_k largest weights, largest first.

    weights [vocab]: probabilities up to a common factor. token_ids [n]: what is left so far, top_k <= n; smaller ids first among
    equal weights.
    """
    kept = weights[token_ids]
    kth_largest = np.partition(kept, -top_k)[-top_k]
    return _descending(weights, token_ids[kept >= kth_largest])[:top_k]  # k of them and the ties of the last


def keep_top_p(weights: np.ndarray, token_ids: np.ndarray, top_p: float) -> np.ndarray:
    """Step 4: the ids of the fewest largest weights that reach top_p of the sum over token_ids, largest first (Holtzman et al. 2020)."""
    kept = weights[token_ids]
    mass = kept.sum()
    # All weights below the floor together are less than half of the mass that may go, so none of them is needed: they
    # are not worth sorting.
    floor = (1.0 - top_p) / 2 * mass / len(kept)
    token_ids = _descending(weights, token_ids[kept >= floor])
    mass_before = np.concatenate([[0.0], np.cumsum(weights[token_ids])[:-1]])
    return token_ids[mass_before < top_p * mass]


def keep_min_p(weights: np.ndarray, token_ids: np.ndarray, min_p: float) -> np.ndarray:
    """Step 5: the ids of weights of at least min_p times the largest."""
    kept = weights[token_ids]
    return token_ids[kept >= min_p * kept.max()]


def _descending(weights: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
    """token_ids by falling weight; equal weights keep their order."""
    return token_ids[np.argsort(-weights[token_ids], kind="stable")]


def _number(name: str, value: object, rule: str, is_legal: Callable[[float], bool]) -> float:
    number = math.nan if isinstance(value, bool) or not isinstance(value, numbers.Real) else float(value)
    if not math.isfinite(number) or not is_legal(number):
        raise InvalidInput(f"{name}={value!r} is outside its range: give {rule}")
    return number


def _whole_number(name: str, value: object, rule: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 0:
        raise InvalidInput(f"{name}={value!r} is outside its range: give {rule}")
    return int(value)
