"""UniSparseConfig: the knobs of the algorithm, named as in the paper, validated once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .errors import InvalidInput

PerHead = float | tuple[float, ...] | None
MAX_KEY_ANCHORS = 8


@dataclass(frozen=True)
class UniSparseConfig:
    """What to compress, what to keep, what always stays visible. Steps are those of ALGORITHM.md.

    Args:
        block_size: S, tokens per block; the unit of selection (step 3).
        q_compress: c_q, query tokens averaged into one composite token (step 1); divides block_size.
        k_compress: c_k, the same for keys.
        head_compress: c_h, neighbouring query heads averaged into one composite head (step 1); 1 is off.
        top_p: P, the share of compressed attention mass to keep (step 4), 0 < P <= 1. A sequence holds one value
            per composite head. None turns the rule off.
        row_threshold: tau, keep a block when one composite query alone gives it more than this share (step 4),
            0 < tau < 1. A sequence holds one value per composite head. None turns the rule off.
        key_anchors: r, keys of smallest norm per block that stay visible when their block is dropped (step 6), 0..8.
        sink_blocks: leading blocks that are always kept (step 5).
        local_blocks: blocks before the diagonal that are always kept under causality (step 5).
        top_p_compress: c_p, tokens averaged into one composite token for Top-P, queries and keys alike (step 1), where the
            row threshold reads the finer ones of q_compress and k_compress; a multiple of both, divides block_size. None:
            both rules read the same composite tokens.

    Raises:
        InvalidInput: a value breaks its rule, both rules of step 4 are off, or top_p_compress is set with only one of them on.
    """

    block_size: int = 128
    q_compress: int = 8
    k_compress: int = 8
    head_compress: int = 1
    top_p: PerHead = 0.95
    row_threshold: PerHead = None
    key_anchors: int = 1
    sink_blocks: int = 1
    local_blocks: int = 1
    top_p_compress: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST_VALUE.items():
            object.__setattr__(self, name, _whole_number(name, getattr(self, name), least))
        if self.key_anchors > MAX_KEY_ANCHORS:
            raise InvalidInput(f"key_anchors={self.key_anchors} is more than {MAX_KEY_ANCHORS}: give 0 (off) to {MAX_KEY_ANCHORS}")
        for name in ("q_compress", "k_compress"):
            if self.block_size % getattr(self, name):
                raise InvalidInput(
                    f"{name}={getattr(self, name)} does not divide block_size={self.block_size}: "
                    f"give a divisor, such as {math.gcd(getattr(self, name), self.block_size)}"
                )
        object.__setattr__(self, "top_p", _share("top_p", self.top_p, one_allowed=True))
        object.__setattr__(self, "row_threshold", _share("row_threshold", self.row_threshold, one_allowed=False))
        if self.top_p is None and self.row_threshold is None:
            raise InvalidInput("top_p=None and row_threshold=None leave no rule to keep blocks by: set at least one of them")
        if self.top_p_compress is not None:
            self._check_top_p_compress()

    def _check_top_p_compress(self) -> None:
        width = _whole_number("top_p_compress", self.top_p_compress, 1)
        object.__setattr__(self, "top_p_compress", width)
        for name in ("top_p", "row_threshold"):
            if getattr(self, name) is None:
                raise InvalidInput(
                    f"top_p_compress={width} with {name}=None: Top-P reads composite tokens of its own only beside the row threshold; "
                    "set both rules, or leave top_p_compress None and set q_compress and k_compress"
                )
        finest = math.lcm(self.q_compress, self.k_compress)
        if width % finest or self.block_size % width:
            legal = [c for c in range(finest, self.block_size + 1, finest) if self.block_size % c == 0]
            raise InvalidInput(
                f"top_p_compress={width} is not a multiple of q_compress={self.q_compress} and k_compress={self.k_compress} "
                f"that divides block_size={self.block_size}: give one of {', '.join(map(str, legal))}"
            )

    def kept_blocks(self, selected: Any, visible: int) -> Any:
        """Density's numerator: of so many visible blocks the selected ones, and r / S of each other one for its anchor keys.

        selected: a count, or an array of counts.
        """
        return selected + min(self.key_anchors / self.block_size, 1.0) * (visible - selected)

    @classmethod
    def paper(cls, top_p: PerHead = 0.95) -> UniSparseConfig:
        """The paper's bare rule: Top-P alone, no sink, local or anchor keys. Loses the sinks of a real Llama."""
        return cls(top_p=top_p, key_anchors=0, sink_blocks=0, local_blocks=0)

    @classmethod
    def balanced(cls) -> UniSparseConfig:
        """Small blocks, Top-P over coarse composite tokens for text, the row threshold over fine ones for single needles."""
        return cls(block_size=64, q_compress=2, k_compress=2, top_p=0.93, row_threshold=0.025, top_p_compress=8)

    @classmethod
    def precise(cls) -> UniSparseConfig:
        """Small blocks, finer queries than keys, and the row threshold instead of Top-P: keeps single needles."""
        return cls(block_size=64, q_compress=2, k_compress=4, top_p=None, row_threshold=0.02)


PRESETS: dict[str, Callable[[], UniSparseConfig]] = {
    "default": UniSparseConfig,
    "balanced": UniSparseConfig.balanced,
    "paper": UniSparseConfig.paper,
    "precise": UniSparseConfig.precise,
}

_LEAST_VALUE = {
    "block_size": 1, "q_compress": 1, "k_compress": 1, "head_compress": 1, "key_anchors": 0, "sink_blocks": 0, "local_blocks": 0,
}  # fmt: skip


def _whole_number(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InvalidInput(f"{name}={value!r} is not a whole number: give an integer of at least {least}")
    if value < least:
        raise InvalidInput(f"{name}={value} is too small: give an integer of at least {least}")
    return int(value)


def _share(name: str, value: object, one_allowed: bool) -> PerHead:
    """One share, or a tuple of shares (one per composite head), or None."""
    if value is None:
        return None
    if isinstance(value, str) or (isinstance(value, Iterable) and getattr(value, "ndim", 1) > 1):
        shown = " ".join(repr(value).split())
        raise InvalidInput(f"{name}={shown} is not a number: give one share, a flat sequence of shares (one per composite head), or None")
    if isinstance(value, Iterable) and getattr(value, "ndim", 1) == 1:
        shares = tuple(_one_share(name, item, one_allowed) for item in value)
        if not shares:
            raise InvalidInput(f"{name} is an empty sequence: give one value per composite head")
        return shares
    return _one_share(name, value, one_allowed)


def _one_share(name: str, value: object, one_allowed: bool) -> float:
    rule = f"0 < {name} <= 1" if one_allowed else f"0 < {name} < 1"
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise InvalidInput(f"{name}={value!r} is not a number: give one with {rule}, or None to turn the rule off") from None
    if isinstance(value, bool) or not (0.0 < share < 1.0 or (one_allowed and share == 1.0)):
        raise InvalidInput(f"{name}={value} is outside its range: give a number with {rule}, or None to turn the rule off")
    return share
