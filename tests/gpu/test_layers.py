"""The model's layers on a real device, against the reference's in float64, and pooling to the bit."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import Problem, UniSparseConfig
from unisparse_np.reference import layers as reference

pytestmark = pytest.mark.gpu

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # of a result, relative: half a step, and the sums before it
OTHERS = (np.dtype(np.float16), np.dtype(np.float32))
DTYPES = pytest.mark.parametrize("dtype", [BFLOAT16, *OTHERS], ids=lambda x: x.name)


def engine():
    from unisparse_np.gpu import cupy_kernels

    return cupy_kernels


def normal(cupy, seed, *shape, dtype=np.float32):
    return cupy.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def wide(x):
    return np.asarray(x.get(), dtype=np.float64)


def assert_rounded(found, expected, dtype, size=1.0):
    """Within one rounding to dtype of the exact result; `size` bounds the terms of the sums behind it."""
    assert found.dtype == dtype
    error = np.abs(wide(found) - expected) - ROUNDING[np.dtype(dtype).name] * np.abs(expected)
    assert error.max() <= 2.0**-20 * size


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 77])
@pytest.mark.parametrize("width", [50, 576, 4096, 14336])
def test_layers_between_products(cupy, dtype, tokens, width):
    layers = engine().layers
    table, weight = normal(cupy, 0, 300, width, dtype=dtype), normal(cupy, 1, width)
    ids = np.random.default_rng(2).integers(0, 300, tokens).tolist()
    x = layers.embedding(table, ids, dtype)
    np.testing.assert_array_equal(x.get(), table.get()[ids].astype(np.float32))
    assert_rounded(layers.rms_norm(x, weight, 1e-5, dtype), reference.rms_norm(wide(x), wide(weight), 1e-5, np.float64), dtype)
    gate_up = normal(cupy, 3, tokens, 2 * width, dtype=dtype)
    assert_rounded(layers.swiglu(gate_up), reference.swiglu(wide(gate_up)), dtype)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 130])
@pytest.mark.parametrize(("inner", "rows"), [(50, 7), (576, 960), (4096, 1024), (14336, 259), (2304, 40000)])
def test_products(cupy, dtype, tokens, inner, rows):
    layers = engine().layers
    y, weight = normal(cupy, 3, tokens, inner, dtype=dtype), normal(cupy, 4, rows, inner, dtype=dtype)
    stream = normal(cupy, 6, tokens, rows)
    bias = cupy.asarray(normal(cupy, 5, rows, dtype=dtype).get().astype(np.float32))
    expected = wide(y) @ wide(weight).T
    assert_rounded(layers.linear(y, weight), expected, dtype, inner)
    twice = np.abs(expected).max() * (2 * ROUNDING[dtype.name] if tokens > 1 else 0)  # cuBLAS may round before it adds the bias
    assert_rounded(layers.linear(y, weight, bias), expected + wide(bias), dtype, inner + 2.0**20 * twice)
    assert_rounded(layers.head(y, weight), expected, np.float32, inner)
    for given in (None, bias):
        x = stream.copy()
        layers.add_linear(x, y, weight, given)
        assert_rounded(x, wide(stream) + expected + (0 if given is None else wide(given)), np.float32, inner)
        again = stream.copy()
        layers.add_linear(again, y, weight, given)
        np.testing.assert_array_equal(x.get(), again.get())


@DTYPES
@pytest.mark.parametrize("tokens", [1, 2, 130])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_behind_a_norm_are_those_of_its_result(cupy, dtype, tokens, with_bias):
    layers = engine().layers
    x, norm, weight = normal(cupy, 7, tokens, 576), normal(cupy, 8, 576), normal(cupy, 9, 3072, 576, dtype=dtype)
    bias = normal(cupy, 10, 3072) if with_bias else None
    expected = layers.linear(layers.rms_norm(x, norm, 1e-5, dtype), weight, bias)
    np.testing.assert_array_equal(layers.norm_linear(x, norm, 1e-5, weight, bias).get(), expected.get())
    np.testing.assert_array_equal(layers.norm_linear_swiglu(x, norm, 1e-5, weight, bias).get(), layers.swiglu(expected).get())


@DTYPES
@pytest.mark.parametrize(("inner", "rows"), [(50, 7), (576, 1536), (4096, 2048), (14336, 260)])
def test_fused_products_of_one_token(cupy, dtype, inner, rows):
    from unisparse_np.gpu.cupy_kernels import gemv, overlap

    stream, norm, weight = normal(cupy, 30, 1, inner), normal(cupy, 31, inner), normal(cupy, 32, 2 * rows, inner, dtype=dtype)
    bias = normal(cupy, 33, 2 * rows)
    normed = reference.rms_norm(wide(stream), wide(norm), 1e-5, np.float64)
    expected = normed @ wide(weight).T  # [1, 2 rows]
    slope = np.abs(expected).max() + 4
    results = []
    for overlaps in (False, True) if overlap.overlap_is_possible() else (False,):
        out, logits, gated = (cupy.empty((1, n), d) for n, d in ((2 * rows, dtype), (2 * rows, np.float32), (rows, dtype)))
        gemv.norm_gemv(weight, stream, norm, 1e-5, bias, out, overlaps)
        gemv.norm_gemv_float32(weight, stream, norm, 1e-5, logits, overlaps)
        gemv.norm_gemv_swiglu(weight, stream, norm, 1e-5, bias, gated, overlaps)
        total = stream[:, :rows].copy() if rows <= inner else cupy.zeros((1, rows), np.float32)
        gemv.gemv_add(weight[:rows], normal(cupy, 34, 1, inner, dtype=dtype), None, total, overlaps)
        results.append([x.get() for x in (out, logits, gated, total)])
        assert_rounded(out, expected + wide(bias), dtype, inner)
        assert_rounded(logits, expected, np.float32, inner)
        assert_rounded(gated, reference.swiglu(expected + wide(bias)), dtype, 2 * slope * inner)
    for found in results[1:]:
        for a, b in zip(found, results[0], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("dtype", "dim"),
    [*((BFLOAT16, dim) for dim in (6, 16, 32, 64, 80, 96, 100, 128, 256)), *((d, dim) for d in OTHERS for dim in (16, 100, 128))],
    ids=lambda x: getattr(x, "name", x),
)
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("q_heads", "kv_heads", "tokens", "start"), [(4, 4, 1, 1000), (6, 2, 203, 131000), (8, 1, 517, 0)])
def test_rotate_heads(cupy, dtype, normed, dim, q_heads, kv_heads, tokens, start):
    layers = engine().layers
    inv_freq = (1.0 / 500000 ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    qkv = normal(cupy, 0, tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
    norms = (normal(cupy, 1, dim), normal(cupy, 2, dim), 1e-6) if normed else None
    keys, values = (cupy.zeros((kv_heads, tokens + 9, dim), dtype) for _ in range(2))
    table = layers.rotary_table(inv_freq, start, tokens, 1.25, dtype)
    q, q_composites = layers.rotate_heads(qkv, table, norms, keys[:, 4 : 4 + tokens], values[:, 4 : 4 + tokens], "dense", None)
    assert q_composites is None
    k = np.empty((kv_heads, tokens, dim))
    v = np.empty_like(k)
    exact_table = reference.rotary_table(inv_freq, start, tokens, 1.25, np.dtype(np.float64))
    exact_norms = None if norms is None else (wide(norms[0]), wide(norms[1]), norms[2])
    expected, _ = reference.rotate_heads(wide(qkv), exact_table, exact_norms, k, v, "dense", None)
    assert_rounded(q, expected, dtype, 16)
    assert_rounded(keys[:, 4 : 4 + tokens], k, dtype, 16)
    np.testing.assert_array_equal(wide(values[:, 4 : 4 + tokens]), v)
    for x in (keys, values):
        assert not x[:, :4].get().any()
        assert not x[:, 4 + tokens :].get().any()


def configs():
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = int(rng.choice([64, 128, 256]))
        group, kv_heads = [(1, 1), (2, 1), (1, 3), (4, 2), (3, 2), (4, 8)][rng.integers(6)]
        heads = group * kv_heads
        legal = [c for c in range(1, heads + 1) if heads % c == 0 and (group % c == 0 or c % group == 0)]
        q, k = (int(2 ** rng.integers(0, 7)) for _ in range(2))
        config = UniSparseConfig(size, q, k, int(rng.choice(legal)), key_anchors=int(rng.integers(9)))
        yield config, heads, kv_heads, int(rng.choice([64, 80, 96, 128, 256])), int(rng.integers(1, 6 * size)), int(rng.integers(4))


@pytest.mark.parametrize(
    "case", list(configs()), ids=lambda x: f"{x[0].block_size}-{x[0].q_compress}-{x[0].k_compress}-{x[0].head_compress}-d{x[3]}"
)
def test_pooling_is_that_of_compress_to_the_bit(cupy, case):
    config, q_heads, kv_heads, dim, tokens, earlier_blocks = case
    dtype = OTHERS[0] if tokens % 4 == 0 else BFLOAT16
    backend = engine()
    start = earlier_blocks * config.block_size
    shape = (config, q_heads, kv_heads, dim, start + tokens + 64, dtype)
    running, whole = backend.RunningKeySummary(*shape), backend.RunningKeySummary(*shape)
    keys, values = (normal(cupy, seed, kv_heads, start + tokens + 64, dim, dtype=dtype) for seed in (1, 2))
    running.extend(keys[:, :start])
    qkv = normal(cupy, 0, tokens, q_heads + 2 * kv_heads, dim, dtype=dtype)
    inv_freq = (1.0 / 10000 ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    table = backend.layers.rotary_table(inv_freq, start, tokens, 1.0, dtype)
    room = slice(start, start + tokens)
    q, q_composites = backend.layers.rotate_heads(qkv, table, None, keys[:, room], values[:, room], config, running)
    whole.extend(keys[:, : start + tokens])
    problem = Problem(q_heads, kv_heads, tokens, start + tokens, dim, config)
    qc, _ = backend.compress(q, keys[:, : start + tokens], problem)
    np.testing.assert_array_equal(q_composites.get(), qc.astype(np.float16).get())
    for found, expected in zip(running.summary(), whole.summary(), strict=True):
        np.testing.assert_array_equal(found.get(), expected.get())
    for summary in (running, whole):  # what the open block holds is still known
        summary.extend(keys[:, start + tokens :])
    for found, expected in zip(running.summary(), whole.summary(), strict=True):
        np.testing.assert_array_equal(found.get(), expected.get())
