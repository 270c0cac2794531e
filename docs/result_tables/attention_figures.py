"""Figures of the attention kernels beside what was asked of them: q [32, L, 128], k, v [8, L, 128], bfloat16, causal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from result_tables.figures import Figure, Values, ratio, value
from result_tables.tables import GPU

LENGTHS = (8192, 32768, 131072)
SOURCES = (f"attention_gpu_{GPU}",)


def dense_over(peer: str, kernel: str = "ours", lengths: tuple[int, ...] = LENGTHS) -> Callable[[dict[str, Any]], Values]:
    """How many times faster than a peer dense attention is."""
    return lambda result: tuple(
        ratio(value(result, "ms", work="dense", length=n, kernel=peer), value(result, "ms", work="dense", length=n, kernel=kernel))
        for n in lengths
    )


def sparse_rate(result: dict[str, Any], density: float, kernel: str = "ours", dim: int = 128, size: int = 128) -> float | None:
    """TFLOP/s on listed blocks at 32K tokens."""
    shape = {"head_dim": dim, "block_size": size}
    return value(result, "tflops", work="sparse", length=32768, kernel=kernel, density=density, **shape)


def share_of_dense_rate(result: dict[str, Any]) -> Values:
    """At 25% and 50% of the blocks: TFLOP/s on listed blocks over those of dense attention."""
    dense = value(result, "tflops", work="dense", length=32768, kernel="ours")
    return tuple(ratio(sparse_rate(result, density), dense) for density in (0.25, 0.5))


def over_flex(result: dict[str, Any]) -> Values:
    """At 25% and 50% of the blocks: times faster than FlexAttention."""
    return tuple(ratio(sparse_rate(result, density), sparse_rate(result, density, "flex")) for density in (0.25, 0.5))


def selection_ms(*cases: tuple[str, int]) -> Callable[[dict[str, Any]], Values]:
    """Milliseconds of choosing the blocks."""
    return lambda result: tuple(value(result, "ms", work=f"selection, {name}", length=length, kernel="all") for name, length in cases)


def whole_call_over(density: float, *peers: str) -> Callable[[dict[str, Any]], Values]:
    """How many times faster than dense peers a whole call at 128K and about this density is, selection and anchors included."""

    def measured(result: dict[str, Any]) -> Values:
        calls = [row for row in result["rows"] if row["work"] == "whole call" and abs(row["density"] - density) < 0.05]
        ours = calls[0]["ms"] if calls else None
        return tuple(ratio(value(result, "ms", work="dense", length=131072, kernel=peer), ours) for peer in peers)

    return measured


def anchors_share(result: dict[str, Any]) -> Values:
    """What one anchor a block costs, of dense attention's time."""
    bare, anchored = (value(result, "ms", work="sparse", length=131072, kernel=f"{kind} anchors") for kind in ("without", "with"))
    dense = value(result, "ms", work="dense", length=131072, kernel="ours")
    return (None if bare is None or anchored is None or dense is None else (anchored - bare) / dense,)


def host_microseconds(result: dict[str, Any]) -> Values:
    """Until a call returns, the GPU left behind: alone, and once its launches are graphs."""
    works = ("host time of one call", "host time of one call, as graphs")
    return tuple(None if ms is None else 1e3 * ms for ms in (value(result, "ms", work=work, kernel="ours") for work in works))


ATTENTION_FIGURES = [
    Figure("dense at 8K / 32K / 128K tokens, times cuDNN's speed", SOURCES, dense_over("cudnn"), asked=(1.07,) * 3, goal=(1.2,) * 3),
    Figure("25% / 50% of the blocks at 32K, rate beside that of dense", SOURCES, share_of_dense_rate, asked=(0.95,) * 2, goal=(0.97,) * 2),
    Figure("the same, times FlexAttention's speed on the same mask", SOURCES, over_flex, asked=(1.4,) * 2, goal=(1.6,) * 2),
    Figure(
        "choosing blocks with the default preset, 8K / 32K / 128K, ms",
        SOURCES,
        selection_ms(*(("c = 8", length) for length in LENGTHS)),
        asked=(0.2, 0.5, 4.0),
        goal=(0.15, 0.4, 2.6),
        form="{:.3g}",
        less_is_better=True,
    ),
    Figure(
        "choosing at 128K: head_compress 4 / composites of 32, ms",
        SOURCES,
        selection_ms(("head_compress = 4", 131072), ("c = 32", 131072)),
        asked=(1.5, 0.9),
        goal=(1.1, 0.7),
        form="{:.3g}",
        less_is_better=True,
    ),
    Figure(
        "choosing with `precise`, 32K / 128K, ms",
        SOURCES,
        selection_ms(("precise", 32768), ("precise", 131072)),
        asked=(2.3, 33),
        goal=(1.7, 26),
        form="{:.3g}",
        less_is_better=True,
    ),
    Figure(
        "whole call at 128K, half of the blocks, times dense cuDNN / FlashAttention 2",
        SOURCES,
        whole_call_over(0.5, "cudnn", "flash"),
        asked=(1.95, 3.5),
        goal=(2.3, 4.0),
    ),
    Figure(
        "whole call at 128K, a tenth of the blocks, times dense cuDNN", SOURCES, whole_call_over(0.1, "cudnn"), asked=(8.0,), goal=(10.0,)
    ),
    Figure(
        "anchor keys at 128K, share of dense attention's time",
        SOURCES,
        anchors_share,
        asked=(0.015,),
        goal=(1 / 128,),
        form="{:.1%}",
        less_is_better=True,
    ),
    Figure(
        "portable kernel (compute capability 8.0) on this card, dense at 32K, times FlashAttention 2",
        SOURCES,
        dense_over("flash", "ours sm80", (32768,)),
        asked=(0.95,),
        goal=(1.05,),
    ),
    Figure(
        "head_dim 64 in blocks of 64, 25% at 32K, rate beside head_dim 128 in blocks of 128",
        SOURCES,
        lambda result: (ratio(sparse_rate(result, 0.25, dim=64, size=64), sparse_rate(result, 0.25)),),
        asked=(0.8,),
        goal=(0.9,),
    ),
    Figure(
        "host time of a call at 1K tokens, alone / as CUDA graphs, µs",
        SOURCES,
        host_microseconds,
        asked=(60, 60),
        goal=(30, 30),
        form="{:.0f}",
        less_is_better=True,
    ),
]
