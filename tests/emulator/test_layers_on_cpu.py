"""The CuPy backend's layers, run on the CPU by the emulator and compared with the reference's in float64."""

import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.emulator.planted_bugs import assert_caught
from unisparse_np import Problem, UniSparseConfig
from unisparse_np.reference import RunningKeySummary
from unisparse_np.reference import layers as reference

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a result, relative: half a step, and the sums before it
DTYPES = [BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)]


def every_dtype(names, cases, often):
    """Parametrise by dtype and case: the first `often` cases in bfloat16, and the first one in every dtype; the others are slow."""
    rows = []
    for place, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        for dtype in DTYPES:
            quick = place == 0 or (place < often and dtype == BFLOAT16)
            marks = () if quick else pytest.mark.slow
            rows.append(pytest.param(dtype, *values, marks=marks, id="-".join(map(str, (dtype.name, *values)))))
    return pytest.mark.parametrize(f"dtype,{names}", rows)


@pytest.fixture
def engine():
    cupy_on_cpu.Kernel.seed = 0
    with cupy_on_cpu.installed("80") as backend:
        from unisparse_np.gpu.cupy_kernels import layers

        layers.backend = backend
        yield layers


def on_device(x, dtype=None):
    return sys.modules["cupy"].asarray(np.ascontiguousarray(x if dtype is None else x.astype(dtype)))


def normal(seed, *shape, dtype=np.float32):
    return on_device(np.random.default_rng(seed).standard_normal(shape), dtype)


def wide(x):
    return np.asarray(x, dtype=np.float64)


def assert_rounded(found, expected, dtype, size=1.0):
    """Within one rounding to dtype of the exact result; `size` bounds the terms of the sums behind it."""
    limit = ROUNDING[dtype.name] * np.abs(expected) + 2.0**-20 * size
    assert found.dtype == dtype
    assert (np.abs(wide(found) - expected) <= limit).all(), np.abs(wide(found) - expected).max()


@every_dtype("width", [64, 2312, 50], often=2)
def test_embedding_and_rms_norm(engine, dtype, width):
    table, weight = normal(0, 9, width, dtype=dtype), normal(1, width)
    x = engine.embedding(table, [3, 8, 0], dtype)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, table[[3, 8, 0]].astype(np.float32))
    expected = reference.rms_norm(wide(x), wide(weight), 1e-5, np.float64)
    assert_rounded(engine.rms_norm(x, weight, 1e-5, dtype), expected, dtype)


@every_dtype("width", [50, 2056, 24], often=2)
def test_swiglu(engine, dtype, width):
    gate_up = normal(2, 3, 2 * width, dtype=dtype)
    gate_up[0, :4] = [100, -100, 0, 30]
    assert_rounded(engine.swiglu(gate_up), reference.swiglu(wide(gate_up)), dtype)


@every_dtype("tokens,inner,rows", [(3, 64, 40), (1, 2312, 33), (1, 64, 40), (1, 50, 7), (3, 50, 7), (3, 2312, 33)], often=2)
def test_products(engine, dtype, tokens, inner, rows):
    y, weight = normal(3, tokens, inner, dtype=dtype), normal(4, rows, inner, dtype=dtype)
    bias, stream = normal(5, rows, dtype=dtype).astype(np.float32), normal(6, tokens, rows)
    expected = wide(y) @ wide(weight).T
    assert_rounded(engine.linear(y, weight), expected, dtype, inner)
    assert_rounded(engine.linear(y, weight, bias), expected + wide(bias), dtype, inner)
    assert_rounded(engine.head(y, weight), expected, np.dtype(np.float32), inner)
    for given in (None, bias):
        x = stream.copy()
        engine.add_linear(x, y, weight, given)
        assert_rounded(x, wide(stream) + expected + (0 if given is None else wide(given)), np.dtype(np.float32), inner)


@pytest.mark.parametrize("with_bias", [False, True])
@every_dtype("tokens", [1, 3], often=2)
def test_products_behind_a_norm_are_those_of_its_result(engine, dtype, tokens, with_bias):
    x, norm, weight = normal(7, tokens, 64), normal(8, 64), normal(9, 48, 64, dtype=dtype)
    bias = normal(10, 48) if with_bias else None
    expected = engine.linear(engine.rms_norm(x, norm, 1e-5, dtype), weight, bias)
    np.testing.assert_array_equal(engine.norm_linear(x, norm, 1e-5, weight, bias), expected)
    np.testing.assert_array_equal(engine.norm_linear_swiglu(x, norm, 1e-5, weight, bias), engine.swiglu(expected))


@every_dtype("inner,rows", [(576, 21), (50, 7), (2312, 33), (14336, 3)], often=1)
def test_fused_products_of_one_token(engine, dtype, inner, rows):
    from unisparse_np.gpu.cupy_kernels import gemv

    stream, norm, weight = normal(30, 1, inner), normal(31, inner), normal(32, 2 * rows, inner, dtype=dtype)
    bias = normal(33, 2 * rows)
    normed = reference.rms_norm(wide(stream), wide(norm), 1e-5, np.float64)
    expected = normed @ wide(weight).T  # [1, 2 rows]
    empty = sys.modules["cupy"].empty
    out, logits, gated = empty((1, 2 * rows), dtype), empty((1, 2 * rows), np.float32), empty((1, rows), dtype)
    gemv.norm_gemv(weight, stream, norm, 1e-5, bias, out)
    assert_rounded(out, expected + wide(bias), dtype, inner)
    gemv.norm_gemv_float32(weight, stream, norm, 1e-5, logits)
    assert_rounded(logits, expected, np.dtype(np.float32), inner)
    gemv.norm_gemv_swiglu(weight, stream, norm, 1e-5, bias, gated)
    slope = np.abs(expected + wide(bias)).max()  # of one factor's error in the product of two
    assert_rounded(gated, reference.swiglu(expected + wide(bias)), dtype, 2 * slope * inner)


@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_add(engine, dtype):
    x, y = normal(7, 3, 40), normal(8, 3, 40, dtype=dtype)
    expected = x + y.astype(np.float32)
    engine.add(x, y)
    np.testing.assert_array_equal(x, expected)


class Heads:
    """One layer's q, k and v before and after `rotate_heads`, and the same from the reference in float64."""

    def __init__(self, engine, dtype, q_heads, kv_heads, tokens, dim, start=0, normed=False, config="dense", summary=None, seed=0):
        inv_freq = (1.0 / 10000 ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
        qkv = normal(seed, tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
        norms = (normal(seed + 1, dim), normal(seed + 2, dim), 1e-6) if normed else None
        keys, values = (normal(seed + 3, kv_heads, start + tokens + 5, dim, dtype=dtype) for _ in range(2))
        self.k, self.v = keys[:, start : start + tokens], values[:, start : start + tokens]
        before = keys.copy()
        table = engine.rotary_table(inv_freq, start, tokens, 1.25, dtype)
        self.q, self.q_composites = engine.rotate_heads(qkv, table, norms, self.k, self.v, config, summary)
        outside = np.ones(keys.shape[1], bool)
        outside[start : start + tokens] = False
        np.testing.assert_array_equal(keys[:, outside], before[:, outside])
        np.testing.assert_array_equal(self.v, qkv[:, q_heads + kv_heads :].transpose(1, 0, 2))
        self.expected_k = np.empty((kv_heads, tokens, dim))
        exact_table = reference.rotary_table(inv_freq, start, tokens, 1.25, np.dtype(np.float64))
        exact_norms = None if norms is None else (wide(norms[0]), wide(norms[1]), norms[2])
        self.expected_q, _ = reference.rotate_heads(
            wide(qkv), exact_table, exact_norms, self.expected_k, np.empty_like(self.expected_k), "dense", None
        )


@every_dtype(
    "dim,q_heads,kv_heads,tokens,start,normed",
    [
        (64, 3, 1, 5, 7, True),
        (128, 4, 2, 1, 100, True),
        (6, 2, 1, 4, 3, True),
        (96, 1, 1, 3, 1, False),
        (16, 2, 2, 9, 0, True),
        (256, 1, 1, 2, 0, False),
    ],
    often=4,
)
def test_rotate_heads(engine, dtype, dim, q_heads, kv_heads, tokens, start, normed):
    heads = Heads(engine, dtype, q_heads, kv_heads, tokens, dim, start, normed)
    assert heads.q_composites is None
    assert_rounded(heads.q, heads.expected_q, dtype, 16)
    assert_rounded(heads.k, heads.expected_k, dtype, 16)


@pytest.mark.parametrize(
    ("config", "q_heads", "kv_heads", "dim", "tokens"),
    [
        (UniSparseConfig(64, 2, 16, 4, key_anchors=2), 4, 2, 80, 71),
        pytest.param(UniSparseConfig(64, 8, 8, key_anchors=1), 2, 1, 64, 141, marks=pytest.mark.slow),
        pytest.param(UniSparseConfig(128, 8, 4, 2, key_anchors=0), 4, 1, 128, 131, marks=pytest.mark.slow),
        pytest.param(UniSparseConfig(256, 64, 8, key_anchors=8), 1, 1, 64, 300, marks=pytest.mark.slow),
    ],
    ids=lambda x: f"S{x.block_size}" if isinstance(x, UniSparseConfig) else None,
)
def test_pooling_is_that_of_compress_to_the_bit(engine, config, q_heads, kv_heads, dim, tokens):
    backend = engine.backend
    capacity = 4 * config.block_size + tokens
    summary = backend.RunningKeySummary(config, q_heads, kv_heads, dim, capacity, BFLOAT16)
    earlier = normal(9, kv_heads, config.block_size, dim, dtype=BFLOAT16)
    summary.extend(earlier)
    heads = Heads(engine, BFLOAT16, q_heads, kv_heads, tokens, dim, config.block_size, True, config, summary, seed=10)
    pooled = cupy_on_cpu.Kernel.launched.count("compress")
    whole = backend.RunningKeySummary(config, q_heads, kv_heads, dim, capacity, BFLOAT16)
    keys = np.concatenate([earlier, heads.k], axis=1).view(type(heads.k))
    whole.extend(keys)
    assert cupy_on_cpu.Kernel.launched.count("compress") == pooled + 1
    for found, expected in zip(summary.summary(), whole.summary(), strict=True):
        np.testing.assert_array_equal(found, expected)
    problem = Problem(q_heads, kv_heads, tokens, keys.shape[1], dim, config)
    qc, _ = backend.compress(heads.q, keys, problem)
    np.testing.assert_array_equal(heads.q_composites, qc.astype(np.float16))
    exact = RunningKeySummary(config, q_heads, kv_heads, dim, capacity)
    exact.extend(keys.astype(np.float32))
    np.testing.assert_allclose(wide(summary.summary().kc), exact.summary().kc, atol=2e-3)
    more = normal(20, kv_heads, 37, dim, dtype=BFLOAT16)  # what the open block holds is still known
    summary.extend(more)
    whole.extend(more)
    for found, expected in zip(summary.summary(), whole.summary(), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_start_inside_a_block_pools_queries_alone(engine):
    config = UniSparseConfig(64, 8, 8)
    summary = engine.backend.RunningKeySummary(config, 2, 1, 64, 200, BFLOAT16)
    summary.extend(normal(1, 1, 10, 64, dtype=BFLOAT16))
    heads = Heads(engine, BFLOAT16, 2, 1, 90, 64, 10, False, config, summary)
    assert summary.length == 100
    assert heads.q_composites.shape == (2, 12, 64)


PLANTED = {
    "the wrong half is subtracted": (
        "rotary.cu",
        "const float sign = column < HALF ? -1.f : 1.f;",
        "const float sign = column < HALF ? 1.f : -1.f;",
        "rotate",
    ),
    "what is pooled was not rounded": ("rotary.cu", "      widen(own, rotated);  // what was written is what is pooled\n", "", "pooling"),
    "anchors count from the chunk": ("rotary.cu", "first_key + first_token, last_token", "first_token, last_token", "pooling"),
    "a row past the end is pooled": ("rotary.cu", "const bool exists = token < stop && column", "const bool exists = column", "pooling"),
    "one warp's part is lost": (
        "gemv.cu",
        "for (int w = 0; w < WARPS; ++w) sums[g] +=",
        "for (int w = 1; w < WARPS; ++w) sums[g] +=",
        "one_token",
    ),
    "gate and up change places": (
        "gemv.cu",
        "silu(sums[0] + bias_of(bias, o)) * (sums[1]",
        "silu(sums[1] + bias_of(bias, o)) * (sums[0]",
        "one_token",
    ),
    "the next rows overwrite these": (
        "gemv.cu",
        "load_batch(next, batch + 1, batch + 1 < batches);",
        "load_batch(now, batch + 1, batch + 1 < batches);",
        "products",
    ),
    "no eps": ("layers.cu", "rsqrtf(sum * (1.f / WIDTH) + eps)", "rsqrtf(sum * (1.f / WIDTH))", "rms_norm"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name, tmp_path):
    *planted, tests = PLANTED[name]
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "-k", tests, __file__]
    result = assert_caught(planted, f"import pytest\nsys.exit(pytest.main({options!r}))\n", tmp_path)
    assert "1 error" not in result.stdout, result.stdout
