"""unisparse-np bench: how long attention takes on this machine, sparse against dense, over lengths."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import click
import ml_dtypes
import numpy as np

from ..attention import load_backend, score_blocks
from ..config import UniSparseConfig
from ..problem import Problem
from .backend import choose_backend
from .options import SectionedCommand, Size, config_from_flags, config_options, flag, in_section, output_options

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

_shape_options = in_section(
    "Shape",
    flag("--length", "lengths", type=Size(), multiple=True, default=("1K", "2K", "4K"), show_default=True,
         help="Tokens of the prompt. Can be given several times."),
    flag("--heads", type=click.IntRange(1), default=32, show_default=True, help="Query heads."),
    flag("--kv-heads", type=click.IntRange(1), default=8, show_default=True, help="Key and value heads."),
    flag("--head-dim", type=click.IntRange(1), default=128, show_default=True, help="Width of a head."),
)  # fmt: skip
_run_options = in_section(
    "Running",
    flag("--backend", type=click.Choice(["auto", "reference", "numba", "cupy"]), default="auto", show_default=True,
         help="What computes. auto: cupy where CuPy and a GPU are present, else reference (NumPy)."),
    flag("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True,
         help="Type of q, k, v. auto: bfloat16 on cupy, float32 elsewhere."),
    flag("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Timed calls of each kind; the median counts."),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Seconds of one length. selection: steps 1-5; attention: step 6; whole: both as run_sparse fuses them; first: the first whole call,
    and compiling: what of it made kernels ready."""

    length: int
    density: float
    first: float
    compiling: float
    selection: float
    attention: float
    whole: float
    dense: float


@click.command(cls=SectionedCommand, short_help="Time selection and attention beside dense attention.")
@_shape_options
@config_options
@_run_options
@output_options
def bench(
    lengths: tuple[int, ...], heads: int, kv_heads: int, head_dim: int, backend: str, dtype: str, repeats: int, as_json: bool, quiet: bool,
    attention_flags: dict[str, Any],
) -> None:  # fmt: skip
    """Time one layer's attention on random data: selection, attention, the whole call, and dense beside it.

    Random data has no structure to find: --attn-top-p sets how many blocks are kept, nearly one for one. The first call
    compiles what has to be compiled and is shown apart.

    \b
    unisparse-np bench --length 4K --attn-top-p 0.5
    unisparse-np bench --backend cupy --length 8K --length 32K --length 128K --json
    """
    config = config_from_flags("", {"preset": "default"} | attention_flags)
    assert isinstance(config, UniSparseConfig), "a preset is one config for all layers"
    problems = [Problem(heads, kv_heads, length, length, head_dim, config) for length in lengths]
    name = choose_backend(backend, quiet)
    engine = load_backend(name)
    if dtype == "auto":
        dtype = "bfloat16" if name == "cupy" else "float32"
    rows = []
    for problem in problems:
        rows.append(measure(problem, engine, DTYPES[dtype], repeats))
        if not as_json:
            if len(rows) == 1:
                click.echo(f"{name}, {dtype}, q [{heads}, L, {head_dim}], k, v [{kv_heads}, L, {head_dim}], causal; milliseconds\n")
                click.echo(heading())
            click.echo(as_line(rows[-1]))
    if as_json:
        shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
        click.echo(json.dumps({"backend": name, "dtype": dtype, **shape, "config": asdict(config), "rows": [asdict(row) for row in rows]}))


def measure(problem: Problem, engine: Any, dtype: np.dtype, repeats: int) -> Row:
    """All times of one problem on random q, k, v."""
    rng = np.random.default_rng(0)
    shapes = [(problem.num_q_heads, problem.q_len), *2 * [(problem.num_kv_heads, problem.k_len)]]
    q, k, v = (
        engine.from_any("input", rng.standard_normal((*shape, problem.head_dim), dtype=np.float32).astype(dtype)) for shape in shapes
    )

    def select() -> Any:
        return engine.select_blocks(*score_blocks(q, k, problem, engine), problem)

    compile_seconds = getattr(engine, "compile_seconds", lambda: 0.0)
    compiled_before = compile_seconds()
    first = seconds(lambda: engine.run_sparse(q, k, v, problem)[0], engine)
    compiling = compile_seconds() - compiled_before
    mask, trace = select(), engine.run_sparse(q, k, v, problem)[1]
    kinds: dict[str, Callable[[], Any]] = {
        "selection": select,
        "attention": lambda: engine.sparse_attention(q, k, v, mask, problem)[0],
        "whole": lambda: engine.run_sparse(q, k, v, problem)[0],
        "dense": lambda: engine.run_dense(q, k, v, problem)[0],
    }
    for run in kinds.values():
        seconds(run, engine)  # compiles, and fills caches
    times = {kind: statistics.median(seconds(run, engine) for _ in range(repeats)) for kind, run in kinds.items()}
    return Row(problem.k_len, trace.density, first, compiling, **times)


def seconds(run: Callable[[], Any], engine: Any) -> float:
    """Wall time until a call's result [H, L, ...] is there: one number of it is brought to the host."""
    start = time.perf_counter()
    engine.as_numpy(run()[:1, :1, :1])
    return time.perf_counter() - start


def heading() -> str:
    """The table's first line; times in milliseconds."""
    columns = ("selection", "attention", "whole", "dense")
    return (
        f"{'L':>8} {'density':>8}" + "".join(f" {name:>10}" for name in columns) + f" {'speedup':>8} {'first call':>11} {'compiling':>10}"
    )


def as_line(row: Row) -> str:
    """One length's line of the table."""
    columns = f"{1e3 * row.selection:10.2f} {1e3 * row.attention:10.2f} {1e3 * row.whole:10.2f} {1e3 * row.dense:10.2f}"
    return f"{row.length:8d} {row.density:8.3f} {columns} {row.dense / row.whole:7.2f}x {1e3 * row.first:11.0f} {1e3 * row.compiling:10.0f}"
