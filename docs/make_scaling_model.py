"""Write the tables of multi_gpu.md: prefill time on many GPUs, from times measured on one and from stated link speeds.

The model is the sum of what a rank does one after the other: nothing overlaps, and every rank has the same work.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "multi_gpu.md"
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- scaling: written by docs/make_scaling_model.py -->", "<!-- end of scaling -->"

# Stated, not measured here: bus bandwidth that NCCL reaches on 8 H100 of one host, and one 400 Gbit/s adapter a GPU between hosts.
NVLINK_BYTES_A_SECOND, NETWORK_BYTES_A_SECOND = 400e9, 50e9
LAUNCH_SECONDS = 20e-6  # of one exchange, whatever its size
GPUS_A_HOST, GPU_BYTES, RESERVED_BYTES = 8, 80e9, 6e9  # reserved: activations of a chunk, workspaces
MEMORY_BYTES_A_SECOND = 3.0e12  # a copy on one H100 (docs/kernels.md)
GPU_COUNTS = (1, 2, 4, 8, 16, 32, 64)
MEASURED_LENGTH, MEASURED_HEADS = 131072, 32
ITEM, STREAM = 2, 4  # bytes of bfloat16 and of the float32 residual stream


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes. head_dim is 128 in all."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    parameters: float

    def cache_bytes(self, tokens: int) -> float:
        return 2.0 * ITEM * self.layers * self.kv_heads * 128 * tokens

    def product_flop(self, tokens: int) -> float:
        """Of one layer's matrix products."""
        weights = self.hidden * (2 * self.heads + 2 * self.kv_heads) * 128 + 3 * self.hidden * self.intermediate
        return 2.0 * tokens * weights


SHAPES = (Shape("8B", 32, 4096, 14336, 32, 8, 8.0e9), Shape("70B", 80, 8192, 28672, 64, 8, 70.6e9))
LENGTHS = {"128K": 131072, "1M": 1048576}


@dataclass(frozen=True)
class OneGpu:
    """Measured on one GPU: seconds of attention at 128K tokens and 32 heads, fixed + per_density * density or dense; FLOP/s of products."""

    fixed: float
    per_density: float
    dense: float
    product_flop_a_second: float

    @classmethod
    def from_results(cls, result: dict[str, Any]) -> OneGpu:
        """result: as benchmarks/attention_gpu.py writes it."""
        rows = [row for row in result["rows"] if row["kernel"] in ("ours", "cuBLAS")]
        (a, b), *_ = pairwise(sorted((row["density"], row["ms"]) for row in rows if row["work"] == "whole call"))
        per_density = (b[1] - a[1]) / (b[0] - a[0])
        dense = next(row["ms"] for row in rows if (row["work"], row["length"]) == ("dense", MEASURED_LENGTH))
        product = next(row["tflops"] for row in rows if row["work"].startswith("matrix product"))
        return cls((a[1] - per_density * a[0]) / 1e3, per_density / 1e3, dense / 1e3, product * 1e12)

    def attention_seconds(self, shape: Shape, tokens: int, density: float | None) -> float:
        """One layer's, on one GPU; density None is dense."""
        at_128k = self.dense if density is None else self.fixed + self.per_density * density
        return at_128k * shape.heads / MEASURED_HEADS * (tokens / MEASURED_LENGTH) ** 2


@dataclass(frozen=True)
class Grid:
    """tensor x context ranks."""

    tensor: int
    context: int

    @property
    def size(self) -> int:
        return self.tensor * self.context

    def bytes_a_rank(self, shape: Shape, tokens: int) -> float:
        """Weights and cache: tensor ranks share them, context ranks hold them whole."""
        return (ITEM * shape.parameters + shape.cache_bytes(tokens)) / self.tensor


def compute_seconds(one: OneGpu, shape: Shape, tokens: int, density: float | None, grid: Grid) -> float:
    """One layer on one rank: products, attention, and the passes over memory of norms, rotary embedding, SwiGLU and sums."""
    stream = shape.hidden * (4 * STREAM + 2 * STREAM + 2 * ITEM)  # two sums read and write it, two norms read it and write 16 bits
    divided = 2 * ITEM * (shape.heads + 2 * shape.kv_heads) * 128 + 3 * ITEM * shape.intermediate
    passes = tokens * (stream + divided / grid.tensor) / MEMORY_BYTES_A_SECOND
    shared = (shape.product_flop(tokens) / one.product_flop_a_second + one.attention_seconds(shape, tokens, density)) / grid.tensor
    return (shared + passes) / grid.context


def tensor_bytes(shape: Shape, tokens: int) -> float:
    """What one layer's two sums move, before it is shared out over links: [tokens, hidden] twice."""
    return 2.0 * tokens * shape.hidden * ITEM


def context_bytes(shape: Shape, tokens: int) -> float:
    """Keys and values of one layer."""
    return 2.0 * tokens * shape.kv_heads * 128 * ITEM


def exchange_seconds(shape: Shape, tokens: int, grid: Grid) -> float:
    """One layer's exchanges: a ring moves 2 (N-1)/N of what is summed and (N-1)/N of what is gathered through each link."""
    seconds = 0.0
    if grid.tensor > 1:
        moved = 2 * (grid.tensor - 1) / grid.tensor * tensor_bytes(shape, tokens) / grid.context
        seconds += moved / link(grid.tensor) + 2 * LAUNCH_SECONDS
    if grid.context > 1:
        gathered = context_bytes(shape, tokens) / grid.tensor
        moved = (grid.context - 1) / grid.context * gathered
        seconds += moved / link(grid.size) + LAUNCH_SECONDS
        seconds += 3 * gathered / MEMORY_BYTES_A_SECOND  # put in order in the cache, pooled again by every rank
    return seconds


def link(ranks: int) -> float:
    """Bytes a second between ranks of a group that spans so many GPUs in a row."""
    return NVLINK_BYTES_A_SECOND if ranks <= GPUS_A_HOST else NETWORK_BYTES_A_SECOND


def best(one: OneGpu, shape: Shape, tokens: int, density: float | None, gpus: int) -> tuple[Grid, float, float] | None:
    """(grid, seconds of a prefill, share of it in exchanges) of the fastest grid whose ranks have room; None where none has."""
    found = []
    for tensor in (1, 2, 4, 8):
        grid = Grid(tensor, gpus // tensor)
        if gpus % tensor or grid.bytes_a_rank(shape, tokens) > GPU_BYTES - RESERVED_BYTES:
            continue
        exchange = exchange_seconds(shape, tokens, grid)
        layer = compute_seconds(one, shape, tokens, density, grid) + exchange
        found.append((shape.layers * layer, exchange / layer, grid))
    if not found:
        return None
    seconds, share, grid = min(found, key=lambda item: item[0])
    return grid, seconds, share


def layer_table(one: OneGpu) -> list[str]:
    """Communication beside computing, a layer."""
    lines = [
        "| model, tokens | computing on 1 GPU: dense / 25 % / 10 % | tensor: summed | context: gathered "
        "| tensor on 8, NVLink | context on 8, NVLink / network |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for shape in SHAPES:
        for label, tokens in LENGTHS.items():
            alone = " / ".join(f"{1e3 * compute_seconds(one, shape, tokens, d, Grid(1, 1)):,.0f}" for d in (None, 0.25, 0.1))
            tensor = exchange_seconds(shape, tokens, Grid(8, 1))
            context = exchange_seconds(shape, tokens, Grid(1, 8))
            far = context + 7 / 8 * context_bytes(shape, tokens) * (1 / NETWORK_BYTES_A_SECOND - 1 / NVLINK_BYTES_A_SECOND)
            lines.append(
                f"| {shape.name} {label} | {alone} ms | 2 x {tensor_bytes(shape, tokens) / 2e9:.2f} GB "
                f"| {context_bytes(shape, tokens) / 1e9:.2f} GB | {1e3 * tensor:.1f} ms | {1e3 * context:.1f} / {1e3 * far:.1f} ms |"
            )
    return lines


def prefill_table(one: OneGpu, density: float | None) -> list[str]:
    """Seconds of a prefill on the best grid, with its efficiency and the share of time in exchanges."""
    lines = [
        "| model, tokens | " + " | ".join(f"{gpus} GPU{'s' if gpus > 1 else ''}" for gpus in GPU_COUNTS) + " |",
        "| --- |" + " --- |" * len(GPU_COUNTS),
    ]
    for shape in SHAPES:
        for label, tokens in LENGTHS.items():
            alone = shape.layers * compute_seconds(one, shape, tokens, density, Grid(1, 1))
            cells = []
            for gpus in GPU_COUNTS:
                found = best(one, shape, tokens, density, gpus)
                if found is None:
                    cells.append("no room")
                    continue
                grid, seconds, share = found
                cells.append(f"{grid.tensor} x {grid.context}: {seconds:.3g} s ({alone / gpus / seconds:.0%}, {share:.0%})")
            lines.append(f"| {shape.name} {label} | " + " | ".join(cells) + " |")
    return lines


def checks(one: OneGpu, device: str) -> list[str]:
    """The model beside whole prefills that were measured on a GPU of the same kind; nothing where there are none yet."""
    lines = []
    for path in sorted(RESULTS.glob("llama_gpu_*.json")):
        result = json.loads(path.read_text())
        for row in result["rows"] if result["device"] == device else []:
            if (row["work"], row["kernel"], row.get("tokens")) == ("prefill", "ours", MEASURED_LENGTH) and "aside" not in row:
                density = row.get("given_density")
                predicted = SHAPES[0].layers * compute_seconds(one, SHAPES[0], row["tokens"], density, Grid(1, 1))
                name = "dense" if density is None else f"{density:.0%} density"
                lines.append(
                    f"| 8B 128K, {name} | {predicted:.2f} s | {row['seconds']:.2f} s | [{path.name}](../benchmarks/results/{path.name}) |"
                )
    header = ["", "A whole prefill on one GPU:", "", "| | by the model | measured | |", "| --- | --- | --- | --- |"]
    return header + lines if lines else []


def checks_on_several(one: OneGpu, device: str) -> list[str]:
    """The model beside whole prefills that were measured on several GPUs of that kind, each with its speedup and share of exchanges."""
    shapes, lines = {shape.name: shape for shape in SHAPES}, []
    for path in sorted(RESULTS.glob("llama_multi_gpu_*.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["device"] != device or row["tensor"] * row["context"] == 1:
                continue
            shape, grid, density = shapes[row["shape"]], Grid(row["tensor"], row["context"]), row["given_density"]
            exchange = shape.layers * exchange_seconds(shape, row["tokens"], grid)
            seconds = shape.layers * compute_seconds(one, shape, row["tokens"], density, grid) + exchange
            label = next(label for label, tokens in LENGTHS.items() if tokens == row["tokens"])
            alone = f"{row['speedup']:.2f}" if "speedup" in row else "does not fit one"
            lines.append(
                f"| {shape.name} {label}, {'dense' if density is None else f'{density:.0%} density'} | {grid.tensor} x {grid.context} "
                f"| {seconds:.2f} s, {exchange / seconds:.1%} | {row['seconds']:.2f} s, {row['exchange_share']:.1%} | {alone} "
                f"| [{path.name}](../benchmarks/results/{path.name}) |"
            )
    header = [
        "", f"And on several {device}, seconds and the share of exchanges in them; speedup over one GPU in the same run:", "",
        "| | tensor x context | by the model | measured | speedup | |", "| --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    return header + lines if lines else []


def tables() -> str:
    """Everything between the page's markers, from the last of the GPUs that attention was measured on."""
    path = max(RESULTS.glob("attention_gpu_*.json"))
    result = json.loads(path.read_text())
    one, device = OneGpu.from_results(result), result["stamp"]["device"]
    return "\n".join(
        [
            f"Measured on one {device} ([{path.name}](../benchmarks/results/{path.name})), a layer of 32 heads at 128K tokens: "
            f"attention {1e3 * one.dense:.0f} ms dense, {1e3 * one.fixed:.1f} ms + density x {1e3 * one.per_density:.0f} ms sparse "
            f"(selection and anchors included); products {one.product_flop_a_second / 1e12:.0f} TFLOP/s.",
            "",
            "A layer:",
            "",
            *layer_table(one),
            "",
            "A prefill at 25 % density, as tensor x context ranks: seconds (efficiency against one GPU with room for everything, share "
            "of the time in exchanges):",
            "",
            *prefill_table(one, 0.25),
            "",
            "The same, dense:",
            "",
            *prefill_table(one, None),
            *checks(one, device),
            *checks_on_several(one, device),
        ]
    )


def page_with(tables: str, page: str) -> str:
    """The page with new tables between its markers."""
    before, rest = page.split(START)
    return f"{before}{START}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(tables(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
