"""Rotary position frequencies, for every scaling rule that transformers writes into a Llama-like config.json.

A rotation turns pair i of a head by `position * inv_freq[i]` (RoFormer, arXiv 2104.09864); the rules below only change
inv_freq, and YaRN also stretches the rotated vectors by an attention factor. Frequencies are float32, in transformers'
order of operations, because models were trained with those roundings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import CheckpointError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (),
}
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip


@dataclass(frozen=True)
class RopeParameters:
    """The rotary part of config.json; names as in transformers 5's `rope_parameters`.

    max_position_embeddings is copied from the model's config: the dynamic rule starts to stretch there, and the others
    take it where original_max_position_embeddings is not given.
    """

    rope_type: str
    rope_theta: float
    max_position_embeddings: int
    original_max_position_embeddings: float
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @classmethod
    def from_config(cls, raw: Mapping[str, Any], max_position_embeddings: int) -> RopeParameters:
        """Read `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (transformers 4) of a config.json.

        Raises:
            CheckpointError: an unknown rule, a missing or non-positive number, or one set of parameters per layer type.
        """
        given = _rope_dictionary(raw)
        rope_type = given.get("rope_type", given.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise CheckpointError(f"config.json: rope_type {rope_type!r} is not supported: use a model with one of {', '.join(ROPE_TYPES)}")
        partial = given.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
        if partial not in (None, 1, 1.0):
            raise CheckpointError(f"config.json: partial_rotary_factor {partial} is not supported: every head must rotate whole (1.0)")
        numbers = {name: _positive(name, given[name]) for name in _NUMBERS if given.get(name) is not None}
        for name in _NEEDED[rope_type]:
            if name not in numbers:
                raise CheckpointError(f"config.json: rope_type {rope_type!r} needs {name}, which is missing: add it to the rope parameters")
        if rope_type == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
            raise CheckpointError(
                f"config.json: high_freq_factor {numbers['high_freq_factor']} must be greater than low_freq_factor "
                f"{numbers['low_freq_factor']}: correct the llama3 rope parameters"
            )
        numbers.setdefault("original_max_position_embeddings", float(max_position_embeddings))
        if rope_type == "yarn":
            numbers.setdefault("factor", max_position_embeddings / numbers["original_max_position_embeddings"])
        numbers.setdefault("rope_theta", 10000.0)
        truncate = given.get("truncate") is not False
        return cls(rope_type=rope_type, max_position_embeddings=max_position_embeddings, truncate=truncate, **numbers)

    def inverse_frequencies(self, head_dim: int, sequence_length: int) -> tuple[np.ndarray, float]:
        """The angle per position of each pair, and the factor on cos and sin.

        Args:
            head_dim: d, even.
            sequence_length: tokens of the prompt. Only the dynamic rule looks at it, and past max_position_embeddings only.

        Returns:
            inv_freq [d/2] float32, radians per position; attention factor (1.0 for all rules but yarn).
        """
        if self.rope_type == "dynamic":
            return _frequencies(self._dynamic_base(head_dim, sequence_length), head_dim), 1.0
        inv_freq = _frequencies(self.rope_theta, head_dim)  # [d/2]
        if self.rope_type == "linear":
            return inv_freq / np.float32(self.factor), 1.0
        if self.rope_type == "llama3":
            return self._llama3(inv_freq), 1.0
        if self.rope_type == "yarn":
            return self._yarn(head_dim), self._yarn_attention_factor()
        return inv_freq, 1.0

    def _dynamic_base(self, head_dim: int, sequence_length: int) -> float:
        """NTK-aware base: theta * (factor * L / L0 - (factor - 1)) ^ (d / (d - 2)), with L at least L0."""
        stretch = max(sequence_length, self.max_position_embeddings) / self.max_position_embeddings
        return self.rope_theta * (self.factor * stretch - (self.factor - 1)) ** (head_dim / (head_dim - 2))

    def _llama3(self, inv_freq: np.ndarray) -> np.ndarray:
        """Divide the long wavelengths by factor, keep the short ones, and blend between (Llama 3.1)."""
        original, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inv_freq  # [d/2], tokens per turn
        blend = (original / wavelength - low) / (high - low)
        blended = (1 - blend) * inv_freq / self.factor + blend * inv_freq
        stretched = np.where(wavelength > original / low, inv_freq / self.factor, blended)
        return np.where(wavelength < original / high, inv_freq, stretched).astype(np.float32)

    def _yarn(self, head_dim: int) -> np.ndarray:
        """Blend kept and divided frequencies by how often a pair turns within the original length (arXiv 2309.00071, 3.2)."""
        low, high = self._turning_pair(self.beta_fast, head_dim), self._turning_pair(self.beta_slow, head_dim)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        width = high - low if high != low else 0.001
        ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)  # [d/2]; 0 keeps, 1 divides
        powers = self.rope_theta ** _exponents(head_dim)
        return (1 / (self.factor * powers) * ramp + 1 / powers * (1 - ramp)).astype(np.float32)

    def _turning_pair(self, turns: float, head_dim: int) -> float:
        """The (fractional) pair that turns this often within the original length."""
        length = self.original_max_position_embeddings
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.rope_theta))

    def _yarn_attention_factor(self) -> float:
        """0.1 ln(factor) + 1 (YaRN 3.3), or the ratio of two such terms where the config names mscale and mscale_all_dim."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._magnitude(self.mscale) / self._magnitude(self.mscale_all_dim)
        return self._magnitude(1.0)

    def _magnitude(self, mscale: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # [d/2]


def _frequencies(base: float, head_dim: int) -> np.ndarray:
    """base ^ (-2i / d) for pair i."""
    return (1.0 / (base ** _exponents(head_dim))).astype(np.float32)


def _rope_dictionary(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Both styles as one flat dictionary."""
    name = "rope_parameters" if raw.get("rope_parameters") is not None else "rope_scaling"
    given = raw.get(name)
    if given is not None and not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: {name} is {given!r}, not an object: write it as transformers does, or null")
    merged = {"rope_theta": raw.get("rope_theta"), **(given or {})}
    if merged["rope_theta"] is None:
        merged["rope_theta"] = raw.get("rope_theta")
    if raw.get("original_max_position_embeddings") is not None:  # written outside by some models; transformers lets it win
        merged["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    nested = [key for key, value in merged.items() if isinstance(value, Mapping)]
    if nested:
        raise CheckpointError(f"config.json: {name} differs by layer type ({', '.join(nested)}), which is not supported: give one set")
    return merged


def _positive(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (0 < value < math.inf):
        raise CheckpointError(f"config.json: {name} is {value!r}: the rope parameters need a finite number above 0")
    return float(value)
