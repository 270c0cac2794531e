"""unisparse_attention: the four stages on a backend, for arrays of any library."""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any, Literal

from .arrays import check_array, name_of_dtype, on_gpu
from .config import UniSparseConfig
from .errors import BackendUnavailable, InvalidInput
from .problem import KeySummary, Problem
from .trace import Trace

AttentionConfig = UniSparseConfig | Literal["dense"]
DEFAULT_CONFIG = UniSparseConfig()
NEEDS_NO_MORE = " (the reference backend needs no more)"
BACKENDS = {"reference": "unisparse_np.reference", "cupy": "unisparse_np.gpu.cupy_kernels", "numba": "unisparse_np.gpu.numba_kernels"}


def unisparse_attention(
    q: Any,
    k: Any,
    v: Any,
    config: AttentionConfig | None = None,
    *,
    causal: bool = True,
    q_offset: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
    key_summary: KeySummary | None = None,
    return_lse: bool = False,
    return_trace: bool = False,
) -> Any:
    """UniSparse attention (ALGORITHM.md, steps 1-6), or dense attention.

    Args:
        q: queries [Hq, Lq, d] or [batch, Hq, Lq, d], after rotary embedding; float16, bfloat16, float32 or float64.
        k, v: keys and values [Hkv, Lk, d], or with the same leading batch; dtype and library of q. Query head h reads
            KV head h // (Hq / Hkv). Items of a batch have equal length and are computed alone.
        config: a UniSparseConfig, None for its defaults, or "dense".
        causal: a query sees the keys up to its own position.
        q_offset: absolute position of the first query; None for Lk - Lq. Must be None without causality.
        scale: factor on the logits; None for 1 / sqrt(d).
        backend: "auto" (the arrays' own: NumPy and other CPU arrays go to the reference, GPU arrays to CuPy), "reference",
            "numba" or "cupy". Never falls back.
        key_summary: composite keys and anchors of k that a cache already holds (no batch), arrays of any library; k is then not
            pooled again.
        return_lse: also return the log-sum-exp [Hq, Lq] (natural log), for merging partial results.
        return_trace: also return the Trace of the call, scores included; a list of them, one an item, for a batch.

    Returns:
        out, shape and dtype and library of q; with return_lse `(out, lse)`, with return_trace `(out, trace)`, with both
        `(out, lse, trace)`. A query with nothing to attend (possible only without causality) has out 0 and lse -inf.

    Raises:
        InvalidInput: shapes, dtypes, offset or values that break a rule; non-finite numbers in what would be read.
        BackendUnavailable: the backend is not installed, or not part of this version.
    """
    config = DEFAULT_CONFIG if config is None else config
    _check_config(config)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_array(name, x)
    problem = problem_of(q, k, v, config, causal, q_offset, scale)
    batched = len(q.shape) == 4
    if batched and key_summary is not None:
        raise InvalidInput("key_summary goes with one item, but q, k, v have a batch axis: call once an item")
    if key_summary is not None:
        _check_key_summary(key_summary, problem)
    engine = load_backend(_backend_of(q) if backend == "auto" else backend)
    q_in, k_in, v_in = engine.from_any("q", q), engine.from_any("k", k), engine.from_any("v", v)
    if key_summary is not None:
        key_summary = KeySummary(*(engine.from_any(f"key_summary.{name}", x) for name, x in key_summary._asdict().items()))
    for item in zip(q_in, k_in, v_in, strict=True) if batched else [(q_in, k_in, v_in)]:
        engine.check_finite(*item, problem)
    trace: Any
    lse = None
    if batched:
        out, lse, trace = _run_batch(q_in, k_in, v_in, problem, config, engine, return_trace)
    else:
        out, trace = _run(q_in, k_in, v_in, problem, config, engine, key_summary, return_trace)
        out = out.astype(q_in.dtype, copy=False)
    out = engine.to_kind_of(out, q)
    answer: tuple[Any, ...] = (out,)
    if return_lse:
        answer += (engine.to_kind_of(lse if batched else trace.lse, q),)
    if return_trace:
        answer += (trace,)
    return answer if len(answer) > 1 else out


def attend(
    q: Any,
    k: Any,
    v: Any,
    config: AttentionConfig,
    *,
    backend: Any,
    causal: bool = True,
    q_offset: int | None = None,
    scale: float | None = None,
    key_summary: KeySummary | None = None,
    q_composites: Any = None,
) -> tuple[Any, Trace]:
    """One attention call between parts that trust each other: a loaded backend's own arrays, no batch, no look at the values.

    q [Hq, Lq, d], k, v [Hkv, Lk, d] -> out [Hq, Lq, d] in the backend's computing precision, and its Trace. q_composites:
    composite tokens of q in the backend's own form, where its `rotate_heads` has pooled them.
    """
    heads, q_len, head_dim = q.shape
    problem = _problem(heads, k.shape[0], q_len, k.shape[1], head_dim, config, causal, q_offset, scale)
    return _run(q, k, v, problem, config, backend, key_summary, keep_scores=False, q_composites=q_composites)


def score_blocks(q: Any, k: Any, problem: Problem, backend: Any) -> tuple[Any, Any]:
    """Steps 1-3 of a loaded backend in the precision of its run_sparse: q [Hq, Lq, d], k [Hkv, Lk, d] -> mean, peak [Hc, Nq, Nk]."""
    composites = (backend.as_composites(x, problem, q.dtype) for x in backend.compress(q, k, problem))
    return backend.score_blocks(*composites, problem)


def load_backend(name: str) -> Any:
    """The backend's module: its stages, run_sparse, run_dense, RunningKeySummary, xp and layers.

    Raises InvalidInput for an unknown name, BackendUnavailable when a piece of it is missing.
    """
    if name not in BACKENDS:
        raise InvalidInput(f"backend={name!r} is not known: give auto, {', '.join(BACKENDS)}")
    try:
        backend = importlib.import_module(BACKENDS[name])
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("unisparse_np"):
            raise BackendUnavailable(f"the {name} backend is not part of this version; backend='reference' is") from error
        raise BackendUnavailable(
            f"the {name} backend needs {error.name}, which is not installed: pip install 'unisparse-np[gpu]'{NEEDS_NO_MORE}"
        ) from error
    if backend.__file__ is None:  # a folder without code
        raise BackendUnavailable(f"the {name} backend is not part of this version; backend='reference' is")
    return backend


def load_model_backend(name: str) -> Any:
    """A backend that runs whole models here and now. Raises as load_backend does, and BackendUnavailable without the device it needs."""
    backend = load_backend(name)
    if hasattr(backend, "require_device"):
        backend.require_device()
    return backend


def choose_backend() -> tuple[str, str]:
    """What "auto" means for a whole model -> (name, reason): cupy where it and a GPU it can use are here, otherwise reference."""
    try:
        load_model_backend("cupy")
    except BackendUnavailable as error:
        return "reference", f"NumPy; {str(error).removesuffix(NEEDS_NO_MORE)}"
    return "cupy", "CuPy and a GPU are here"


def _run(
    q: Any, k: Any, v: Any, problem: Problem, config: AttentionConfig, backend: Any, key_summary: KeySummary | None, keep_scores: bool,
    q_composites: Any = None,
) -> tuple[Any, Trace]:  # fmt: skip
    if config == "dense":
        return backend.run_dense(q, k, v, problem)
    return backend.run_sparse(q, k, v, problem, key_summary, keep_scores, q_composites)


def _run_batch(
    q: Any, k: Any, v: Any, problem: Problem, config: AttentionConfig, backend: Any, keep_scores: bool
) -> tuple[Any, Any, list[Trace]]:
    """q [batch, Hq, Lq, d], k, v [batch, Hkv, Lk, d], problem that of one item -> out in the dtype of q, lse [batch, Hq, Lq], traces."""
    if hasattr(backend, "run_batch"):
        return backend.run_batch(q, k, v, problem, dense=config == "dense", keep_scores=keep_scores)
    results = [_run(*item, problem, config, backend, None, keep_scores) for item in zip(q, k, v, strict=True)]
    outs, traces = [out.astype(q.dtype, copy=False) for out, _ in results], [trace for _, trace in results]
    return backend.xp.stack(outs), backend.xp.stack([trace.lse for trace in traces]), traces


def _check_config(config: object) -> None:
    if not isinstance(config, UniSparseConfig) and config != "dense":
        raise InvalidInput(f"config={config!r} is neither a UniSparseConfig nor 'dense': give one of the two")


def problem_of(q: Any, k: Any, v: Any, config: AttentionConfig, causal: bool, q_offset: int | None, scale: float | None) -> Problem:
    """The Problem that the shapes of q, k, v make. Raises InvalidInput when they do not fit together."""
    kinds = (type(q), q.dtype), (type(k), k.dtype), (type(v), v.dtype)
    shapes = q.shape, k.shape, v.shape
    return _fitting_problem(kinds, shapes, config, causal, q_offset, None if scale is None else float(scale))


@lru_cache(maxsize=1024)
def _fitting_problem(
    kinds: tuple[tuple[type, Any], ...], shapes: tuple[tuple[int, ...], ...], config: AttentionConfig, causal: bool, q_offset: int | None,
    scale: float | None,
) -> Problem:  # fmt: skip
    """Checked once for equal calls."""
    if len(set(kinds)) > 1:
        named = ", ".join(f"{name} {kind.__name__} {name_of_dtype(dtype)}" for name, (kind, dtype) in zip("qkv", kinds, strict=True))
        raise InvalidInput(f"q, k and v differ in kind ({named}): give all three in one dtype from one library")
    q, k, v = map(tuple, shapes)
    if len(q) not in (3, 4) or len(k) != len(q) or len(v) != len(q):
        raise InvalidInput(f"q {q}, k {k}, v {v}: give q [Hq, Lq, d] and k, v [Hkv, Lk, d], all or none with a batch axis")
    if k != v:
        raise InvalidInput(f"k {k} and v {v} differ in shape: both are [Hkv, Lk, d]")
    if q[-1] != k[-1]:
        raise InvalidInput(f"q has head_dim {q[-1]} and k has {k[-1]}: they must be equal")
    if q[:-3] != k[:-3]:
        raise InvalidInput(f"q has batch {q[0]} and k, v have {k[0]}: they must be equal")
    if 0 in q[:-3]:
        raise InvalidInput(f"q {q} has an empty batch: give at least one item")
    return _problem(q[-3], k[-3], q[-2], k[-2], q[-1], config, causal, q_offset, scale)


@lru_cache(maxsize=1024)
def _problem(
    num_q_heads: int, num_kv_heads: int, q_len: int, k_len: int, head_dim: int, config: AttentionConfig, causal: bool, q_offset: int | None,
    scale: float | None,
) -> Problem:  # fmt: skip
    """Made and checked once for the layers of a model, which all have the same one."""
    sparse = DEFAULT_CONFIG if config == "dense" else config
    return Problem(num_q_heads, num_kv_heads, q_len, k_len, head_dim, sparse, causal, q_offset, scale)


def _check_key_summary(key_summary: KeySummary, problem: Problem) -> None:
    expected = {
        "kc": (problem.num_composite_kv_heads, problem.num_k_composites, problem.head_dim),
        "anchors": (problem.num_kv_heads, problem.num_k_blocks, problem.config.key_anchors),
    }
    for name, shape in expected.items():
        given = tuple(getattr(key_summary, name).shape)
        if given != shape:
            raise InvalidInput(
                f"key_summary.{name} has shape {given}, but these keys and this config make it {shape}: summarise the same k"
            )


def _backend_of(x: Any) -> str:
    return "cupy" if on_gpu(x) else "reference"
