"""Problem: the shapes of one attention call and everything that follows from them.

Every ceil-div, visible range and diagonal of the project is computed here and nowhere else, so that the
stages of every backend can be read without index arithmetic. Symbols and rules are those of ALGORITHM.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from .config import UniSparseConfig
from .errors import InvalidInput


class KeySummary(NamedTuple):
    """What a KV cache keeps beside its keys, so that no key is pooled twice.

    kc [Hkc, Tk, d] float32 (or wider): composite keys (step 1).
    anchors [Hkv, Nk, r] int32: positions of each block's anchor keys in ascending norm, -1 where a ragged block is
    shorter than r (step 6).
    """

    kc: Any
    anchors: Any


@dataclass(frozen=True)
class Problem:
    """One call's shapes, its causality and its config; validated on creation. Batch is not part of it.

    Raises:
        InvalidInput: head counts that do not divide, an offset that is not legal, a head_compress that does not fit.
    """

    num_q_heads: int
    num_kv_heads: int
    q_len: int
    k_len: int
    head_dim: int
    config: UniSparseConfig = field(default_factory=UniSparseConfig)
    causal: bool = True
    q_offset: int | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_q_heads", "num_kv_heads", "q_len", "k_len", "head_dim"):
            if getattr(self, name) < 1:
                raise InvalidInput(f"{name}={getattr(self, name)} is empty: every axis of q, k and v needs at least one entry")
        if self.num_q_heads % self.num_kv_heads:
            raise InvalidInput(
                f"num_q_heads={self.num_q_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: "
                "grouped-query attention needs whole groups"
            )
        self._resolve_offset()
        self._resolve_scale()
        self._check_head_compress()
        for name in ("top_p", "row_threshold"):
            values = getattr(self.config, name)
            if isinstance(values, tuple) and len(values) != self.num_composite_heads:
                raise InvalidInput(
                    f"{name} has {len(values)} values, but there are {self.num_composite_heads} composite heads "
                    f"({self.num_q_heads} query heads / head_compress {self.config.head_compress}): give one per composite head"
                )

    def _resolve_offset(self) -> None:
        if not self.causal:
            if self.q_offset is not None:
                raise InvalidInput(f"q_offset={self.q_offset} means nothing without causality: leave it None when causal=False")
            return
        offset = self.k_len - self.q_len if self.q_offset is None else int(self.q_offset)
        if offset < 0 or offset + self.q_len > self.k_len:
            given = "" if self.q_offset is None else f"q_offset={self.q_offset}, "
            raise InvalidInput(
                f"{given}q_len={self.q_len}, k_len={self.k_len}: causal queries sit at positions q_offset .. q_offset + q_len - 1, "
                "which must all be among the keys (0 <= q_offset <= k_len - q_len)"
            )
        object.__setattr__(self, "q_offset", offset)

    def _resolve_scale(self) -> None:
        scale = 1.0 / math.sqrt(self.head_dim) if self.scale is None else float(self.scale)
        if not math.isfinite(scale):
            raise InvalidInput(f"scale={self.scale} is not finite: give a finite number, or None for 1/sqrt(head_dim)")
        object.__setattr__(self, "scale", scale)

    def _check_head_compress(self) -> None:
        c_h, group = self.config.head_compress, self.group_size
        if self.num_q_heads % c_h or (group % c_h and c_h % group):
            legal = [c for c in range(1, self.num_q_heads + 1) if self.num_q_heads % c == 0 and (group % c == 0 or c % group == 0)]
            raise InvalidInput(
                f"head_compress={c_h} does not fit {self.num_q_heads} query heads in groups of {group}: "
                f"give one of {', '.join(map(str, legal))}"
            )

    # ---- heads ----
    @property
    def group_size(self) -> int:
        """G: query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def num_composite_heads(self) -> int:
        """Hc: composite query heads."""
        return self.num_q_heads // self.config.head_compress

    @property
    def num_composite_kv_heads(self) -> int:
        """Hkc: heads of the composite keys; fewer than Hkv only when head_compress spans several KV heads."""
        return self.num_kv_heads // self.kv_heads_per_composite

    @property
    def kv_heads_per_composite(self) -> int:
        """KV heads averaged into one composite key head."""
        return max(1, self.config.head_compress // self.group_size)

    @property
    def heads_per_composite_kv_head(self) -> int:
        """Hc / Hkc: composite query heads that read the same composite key head."""
        return self.num_composite_heads // self.num_composite_kv_heads

    # ---- tokens, composite tokens, blocks ----
    @property
    def num_q_composites(self) -> int:
        """Tq: composite query tokens."""
        return ceil_div(self.q_len, self.config.q_compress)

    @property
    def num_k_composites(self) -> int:
        """Tk: composite key tokens."""
        return ceil_div(self.k_len, self.config.k_compress)

    @property
    def num_q_blocks(self) -> int:
        """Nq: query blocks, counted from the first query."""
        return ceil_div(self.q_len, self.config.block_size)

    @property
    def num_k_blocks(self) -> int:
        """Nk: key blocks, counted from key 0."""
        return ceil_div(self.k_len, self.config.block_size)

    def query_range(self, i: int) -> tuple[int, int]:
        """[start, stop) of query block i, as rows of q."""
        return i * self.config.block_size, min(self.q_len, (i + 1) * self.config.block_size)

    def query_composite_range(self, i: int) -> tuple[int, int]:
        """[start, stop) of the composite queries of query block i."""
        per_block = self.config.block_size // self.config.q_compress
        return i * per_block, min(self.num_q_composites, (i + 1) * per_block)

    def query_positions(self, i: int) -> tuple[int, int]:
        """First and last absolute position of query block i (causal only)."""
        start, stop = self.query_range(i)
        return self._offset + start, self._offset + stop - 1

    # ---- what is visible (steps 2 and 4) ----
    def visible_keys(self, i: int) -> int:
        """Keys 0 .. n-1 are visible to some query of block i; returns n."""
        return self.query_positions(i)[1] + 1 if self.causal else self.k_len

    def visible_blocks(self, i: int) -> int:
        """Key blocks 0 .. n-1 are visible to query block i; returns n."""
        return ceil_div(self.visible_keys(i), self.config.block_size)

    @property
    def total_visible_blocks(self) -> int:
        """Visible blocks, summed over query heads and query blocks: density's denominator."""
        return sum(self.visible_blocks(i) for i in range(self.num_q_blocks)) * self.num_q_heads

    def visible_composites(self, t: int) -> int:
        """Composite keys 0 .. n-1 are visible to composite query t; returns n."""
        if not self.causal:
            return self.num_k_composites
        last_position = self._offset + min(self.q_len, (t + 1) * self.config.q_compress) - 1
        return last_position // self.config.k_compress + 1

    @property
    def keys_read(self) -> int:
        """Keys 0 .. n-1 are all that is read, up to the end of the (coarse) composite key that holds the last query; returns n."""
        if not self.causal:
            return self.k_len
        largest = self.config.top_p_compress or self.config.k_compress  # top_p_compress is a multiple of k_compress
        last_position = self._offset + self.q_len - 1
        return min(self.k_len, (last_position // largest + 1) * largest)

    # ---- what is forced (step 5) ----
    def forced_blocks(self, i: int) -> tuple[int, int, int]:
        """(sink_stop, local_start, local_stop): blocks 0..sink_stop-1 and local_start..local_stop-1 are always kept."""
        visible = self.visible_blocks(i)
        sink_stop = min(self.config.sink_blocks, visible)
        if not self.causal:
            return sink_stop, visible, visible
        diagonal = self.query_positions(i)[0] // self.config.block_size
        return sink_stop, max(0, diagonal - self.config.local_blocks), visible

    # ---- one rule of step 4 alone, where each reads composite tokens of its own ----
    def of_top_p(self) -> Problem:
        """The same problem with Top-P alone, over coarse composite tokens of top_p_compress tokens (which must be set)."""
        width = self.config.top_p_compress
        assert width is not None, "top_p_compress is off: both rules read the same composite tokens"
        config = replace(self.config, q_compress=width, k_compress=width, top_p_compress=None, row_threshold=None)
        return replace(self, config=config)

    def of_row_threshold(self) -> Problem:
        """The same problem with the row threshold alone, over composite tokens of q_compress and k_compress tokens."""
        return replace(self, config=replace(self.config, top_p=None, top_p_compress=None))

    # ---- parts ----
    def of_kv_heads(self, start: int, stop: int) -> Problem:
        """The same problem for KV heads start .. stop-1 and their query heads (whole composite heads only)."""
        first, last = (edge * self.num_composite_heads // self.num_kv_heads for edge in (start, stop))
        per_head: dict[str, Any] = {
            name: values[first:last] for name in ("top_p", "row_threshold") if isinstance(values := getattr(self.config, name), tuple)
        }
        return replace(
            self,
            num_q_heads=(stop - start) * self.group_size,
            num_kv_heads=stop - start,
            config=replace(self.config, **per_head) if per_head else self.config,
        )

    def of_query_blocks(self, start: int, stop: int) -> Problem:
        """The same problem for query blocks start .. stop-1; under causality the offset moves with them."""
        first_row, last_row = self.query_range(start)[0], self.query_range(stop - 1)[1]
        return replace(self, q_len=last_row - first_row, q_offset=self._offset + first_row if self.causal else None)

    @property
    def _offset(self) -> int:
        assert self.q_offset is not None, "positions exist under causality only"
        return self.q_offset


def ceil_div(a: int, b: int) -> int:
    """Smallest whole number not below a / b."""
    return -(-a // b)
