"""The reference backend with every activation rounded to 16 bits: what a plain 16-bit run of a model gives.

ALGORITHM.md's rule for 16-bit outputs is measured against it: a fast path may be at most twice as far from float64.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from unisparse_np import reference

SAME = (
    "HELD_DTYPES", "compute_dtype", "from_host", "held_dtype", "holds_not_finite", "memory", "merge_heads", "new_pacer",
    "rotary_table", "to_host", "vector_dtype", "xp",
)  # fmt: skip


def rounded_backend(dtype: np.dtype) -> Any:
    """A backend whose layers compute in float32 and round every result, the residual stream included, to dtype."""

    def rounded(x: np.ndarray) -> np.ndarray:
        return x.astype(dtype).astype(np.float32)

    def rounding(function: Any) -> Any:
        return lambda *arguments: rounded(function(*arguments))

    layers = reference.layers

    def add_linear(x: np.ndarray, y: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> None:
        x[...] = rounded(x + rounded(layers.linear(y, weight, bias)))

    def norm_linear(x: np.ndarray, norm: np.ndarray, eps: float, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
        return rounded(layers.linear(rounded(layers.rms_norm(x, norm, eps, x.dtype)), weight, bias))

    def norm_linear_swiglu(*arguments: Any) -> np.ndarray:
        return rounded(layers.swiglu(norm_linear(*arguments)))

    def rotate_heads(qkv: np.ndarray, table: np.ndarray, norms: Any, k_room: np.ndarray, v_room: np.ndarray, *others: Any) -> Any:
        q, _ = layers.rotate_heads(qkv, table, norms, k_room, v_room, "dense", None)
        k_room[...] = rounded(k_room)
        if others[1] is not None:
            others[1].extend(k_room)
        return rounded(q), None

    def attention(run: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            out, trace = run(*arguments, **options)
            return rounded(out), trace

        return call

    same = {name: getattr(layers, name) for name in SAME}
    wrapped = {name: rounding(getattr(layers, name)) for name in ("embedding", "linear", "head", "rms_norm", "swiglu")}
    own = {"add_linear": add_linear, "norm_linear": norm_linear, "norm_linear_swiglu": norm_linear_swiglu, "rotate_heads": rotate_heads}
    return SimpleNamespace(
        layers=SimpleNamespace(**same, **wrapped, **own), name="rounded", xp=np, RunningKeySummary=reference.RunningKeySummary,
        run_dense=attention(reference.run_dense), run_sparse=attention(reference.run_sparse),
    )  # fmt: skip
