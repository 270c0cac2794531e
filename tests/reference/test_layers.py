"""The layers against their formulas in float64."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import UniSparseConfig
from unisparse_np.reference import RunningKeySummary, layers

RNG = np.random.default_rng(5)


def test_embedding_gathers_and_widens():
    table = RNG.standard_normal((10, 4)).astype(np.float16)
    out = layers.embedding(table, [3, 0, 3], np.dtype(np.float32))
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, table[[3, 0, 3]])


@pytest.mark.parametrize("held", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_linear_is_a_product_and_a_bias(held, monkeypatch):
    monkeypatch.setattr(layers, "WIDEN_AT_ONCE", 8 * 7)
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    weight, bias = RNG.standard_normal((30, 8)).astype(held), RNG.standard_normal(30).astype(np.float32)
    expected = x.astype(np.float64) @ weight.astype(np.float64).T + bias
    np.testing.assert_allclose(layers.linear(x, weight, bias), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(layers.linear(x, weight), expected - bias, rtol=1e-5, atol=1e-5)


def test_widening_is_exact_for_every_finite_float16_and_bfloat16(monkeypatch):
    monkeypatch.setattr(layers, "WIDEN_FLOAT16_AT_ONCE", 3 * 512)
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(128, 512)
    for held in (np.float16, ml_dtypes.bfloat16):
        numbers = np.where(np.isfinite(bits.view(held).astype(np.float32)), bits, 0).view(held)
        for dtype in (np.dtype(np.float32), np.dtype(np.float64)):
            wide = layers.widen(numbers, dtype)
            assert wide.dtype == dtype
            np.testing.assert_array_equal(wide, numbers.astype(dtype))
            np.testing.assert_array_equal(np.signbit(wide), np.signbit(numbers.astype(dtype)))


def test_rms_norm():
    x, weight = RNG.standard_normal((3, 2, 16)), RNG.standard_normal(16)
    expected = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * weight
    np.testing.assert_allclose(layers.rms_norm(x, weight, 1e-5, x.dtype), expected, rtol=1e-12)
    assert np.all(layers.rms_norm(np.zeros((1, 16)), weight, 1e-5, weight.dtype) == 0)


@pytest.mark.parametrize("rows", [1, 7, 300])  # one thread, and several
def test_rotary_turns_each_pair_by_its_angle(rows):
    x = RNG.standard_normal((rows, 3, 8))
    inv_freq = np.array([1.0, 0.3, 0.1, 0.01], dtype=np.float32)
    out = np.empty((3, rows, 8))
    layers.rotary(x, layers.rotary_table(inv_freq, 5, rows, 1.25, np.dtype(np.float64)), out)
    angles = (np.arange(5, 5 + rows, dtype=np.float32)[:, None] * inv_freq).astype(np.float64)[:, None, :]  # [T, 1, d/2]
    a, b = x[..., :4], x[..., 4:]
    expected = 1.25 * np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)], axis=-1)
    np.testing.assert_allclose(out, expected.transpose(1, 0, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_swiglu_also_where_the_exponential_overflows(rows):
    gate_up = RNG.standard_normal((rows, 20)).astype(np.float32) * 3
    gate_up[0, :2] = -200, 200
    gate, up = gate_up[:, :10].astype(np.float64), gate_up[:, 10:].astype(np.float64)
    expected = gate / (1 + np.exp(-gate)) * up
    with np.errstate(all="raise", under="ignore"):
        out = layers.swiglu(gate_up)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-30)


def test_add_linear_adds_the_product_in_place():
    x, y = RNG.standard_normal((3, 6)).astype(np.float32), RNG.standard_normal((3, 8)).astype(np.float32)
    weight, bias = RNG.standard_normal((6, 8)).astype(np.float16), RNG.standard_normal(6).astype(np.float32)
    expected = x.astype(np.float64) + y.astype(np.float64) @ weight.astype(np.float64).T + bias
    given = x
    layers.add_linear(x, y, weight, bias)
    assert given is x
    np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normed", [False, True])
def test_rotate_heads_fills_the_cache_and_the_summary(normed):
    """q, k and v of one product: normalised, turned, written into the cache's room, and pooled."""
    tokens, d = 20, 8
    qkv = RNG.standard_normal((tokens, 4 + 2 + 2, d))
    table = layers.rotary_table(np.array([1.0, 0.3, 0.1, 0.01], np.float32), 5, tokens, 1.25, np.dtype(np.float64))
    norms = (RNG.standard_normal(d), RNG.standard_normal(d), 1e-5) if normed else None
    config = UniSparseConfig(block_size=8, q_compress=2, k_compress=4)
    running, expected = (RunningKeySummary(config, 4, 2, d, 32, np.float64) for _ in range(2))
    k_room, v_room = np.empty((2, tokens, d)), np.empty((2, tokens, d))
    q, q_composites = layers.rotate_heads(qkv, table, norms, k_room, v_room, config, running)
    assert q_composites is None
    for found, heads, norm in ((q, qkv[:, :4], 0), (k_room, qkv[:, 4:6], 1)):
        wanted = np.empty_like(found)
        layers.rotary(layers.rms_norm(heads, norms[norm], 1e-5, heads.dtype) if normed else heads, table, wanted)
        np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(v_room, qkv[:, 6:].transpose(1, 0, 2))
    expected.extend(k_room)
    np.testing.assert_array_equal(running.summary().kc, expected.summary().kc)
    layers.rotate_heads(qkv, table, norms, k_room, v_room, "dense", None)


def test_merge_heads_puts_the_heads_of_a_token_side_by_side():
    out = RNG.standard_normal((3, 5, 4))
    merged = layers.merge_heads(out)
    assert merged.shape == (5, 12)
    np.testing.assert_array_equal(merged[2, 4:8], out[1, 2])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_every_number_that_is_not_finite_is_noticed_and_no_other(dtype):
    largest = ml_dtypes.finfo(dtype).max
    x = np.array([0, 1, -1, largest, -largest, ml_dtypes.finfo(dtype).tiny], dtype)
    assert not layers.holds_not_finite(x)
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        assert layers.holds_not_finite(np.append(x, np.array([bad], dtype)))
