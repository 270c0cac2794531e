"""Changes to a config that may mend what sparse attention loses. They are tried, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..attention import AttentionConfig
from ..config import PerHead, UniSparseConfig
from ..model.llama import Attention

MASS_LEFT_OUT = 0.2  # a greater P leaves out this share of what P leaves out
FIRST_ROW_THRESHOLD = 0.02
SMALLEST_BLOCK = 32


@dataclass(frozen=True)
class Remedy:
    """One change. `change` gives back an equal config where it has nothing to do."""

    why: str
    change: Callable[[UniSparseConfig], UniSparseConfig]

    def flags(self, config: UniSparseConfig) -> str:
        """The command-line flags that make the change, such as `--sink-blocks 1`."""
        changed = self.change(config)
        values = {field.name: getattr(changed, field.name) for field in fields(config)}
        return " ".join(_flag(name, value) for name, value in values.items() if value != getattr(config, name))

    def everywhere(self, attention: Sequence[AttentionConfig]) -> Attention:
        """The change at every sparse layer."""
        return [self.change(config) if isinstance(config, UniSparseConfig) else config for config in attention]


def remedies_for(config: UniSparseConfig) -> list[Remedy]:
    """Those of the list below that change this config."""
    return [remedy for remedy in REMEDIES if remedy.change(config) != config]


def _more_mass(values: PerHead) -> PerHead:
    if isinstance(values, tuple):
        return tuple(_closer_to_one(value) for value in values)
    return None if values is None else _closer_to_one(values)


def _closer_to_one(share: float) -> float:
    return round(1.0 - (1.0 - share) * MASS_LEFT_OUT, 6)


def _finer_tokens(config: UniSparseConfig) -> UniSparseConfig:
    return replace(config, q_compress=_next_finer(config.q_compress), k_compress=_next_finer(config.k_compress))


def _next_finer(width: int) -> int:
    """The largest divisor below it, half of an even width: it divides all that the width divides. 1 stays 1."""
    return max((divisor for divisor in range(1, width) if width % divisor == 0), default=1)


def _finer_blocks(config: UniSparseConfig) -> UniSparseConfig:
    half = config.block_size // 2
    widths = (config.q_compress, config.k_compress, config.top_p_compress or 1)
    fits = config.block_size % 2 == 0 and half >= SMALLEST_BLOCK and all(half % width == 0 for width in widths)
    return replace(config, block_size=half) if fits else config


def _row_threshold(config: UniSparseConfig) -> UniSparseConfig:
    tau = config.row_threshold
    if isinstance(tau, tuple):
        return replace(config, row_threshold=tuple(value / 2 for value in tau))
    return replace(config, row_threshold=FIRST_ROW_THRESHOLD if tau is None else tau / 2)


REMEDIES = (
    Remedy("always keep the first block, where models park attention", lambda c: replace(c, sink_blocks=max(1, c.sink_blocks))),
    Remedy("keep the keys of smallest norm in every dropped block", lambda c: replace(c, key_anchors=max(1, c.key_anchors))),
    Remedy("keep the block before the diagonal", lambda c: replace(c, local_blocks=max(1, c.local_blocks))),
    Remedy("keep more of the estimated mass", lambda c: replace(c, top_p=_more_mass(c.top_p))),
    Remedy("score with finer composite tokens", _finer_tokens),
    Remedy("choose in finer blocks", _finer_blocks),
    Remedy("also keep what single queries look at", _row_threshold),
)


def _flag(name: str, value: Any) -> str:
    flag = "attn-top-p" if name == "top_p" else name.replace("_", "-")
    shown = "off" if value is None else f"{value:g}" if isinstance(value, float) else f"{value}"
    return f"--{flag} {shown}"
