"""Arrays in and out: 16 bits, strides, arrays on the device, and the key summary of a growing cache."""

import ml_dtypes
import numpy as np
import pytest

from tests.numba.test_stages import SMALL, random_qkv
from tests.other_library import Tensor
from unisparse_np import InvalidInput, Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.gpu import numba_kernels
from unisparse_np.gpu.numba_kernels.device import computing, to_device

CONFIG = UniSparseConfig(**SMALL)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16])
def test_widening_on_the_device_is_exact(dtype):
    values = np.array([0, -0.0, 1, -2.5, 6e-5, 6e-8, 65504, np.inf, -np.inf], dtype).reshape(1, 3, 3)
    widened = computing(values).copy_to_host()
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(widened, values.astype(np.float32))


def test_rounding_to_bfloat16_is_to_nearest_ties_to_even():
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 500, dtype=np.uint32)
    ties = np.array([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800001, 0xFF800000, 0x80000000], np.uint32)
    values = np.concatenate([bits, ties]).view(np.float32).reshape(1, -1, 2)
    with np.errstate(invalid="ignore"):
        expected = values.astype(BFLOAT16)
    found = to_device(values).astype(BFLOAT16).copy_to_host()
    assert found.dtype == BFLOAT16
    nan = np.isnan(values)
    assert np.isnan(found[nan].astype(np.float32)).all()
    np.testing.assert_array_equal(found[~nan].view(np.uint16), expected[~nan].view(np.uint16))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_result_has_the_dtype_of_q(dtype):
    q, k, v = random_qkv(1, 1, 16, 16, 4, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    out = unisparse_attention(q, k, v, CONFIG, backend="numba")
    assert isinstance(out, np.ndarray) and out.dtype == q.dtype
    expected = unisparse_attention(q, k, v, CONFIG).astype(np.float32)
    np.testing.assert_allclose(out.astype(np.float32), expected, rtol=2**-7, atol=1e-5)


def test_arrays_on_the_device_stay_there():
    q, k, v = (to_device(x) for x in random_qkv(2, 1, 16, 16, 4))
    problem = Problem(2, 1, 16, 16, 4, CONFIG)
    out, trace = numba_kernels.run_sparse(q, k, v, problem)
    assert type(out) is type(q) and type(trace.mask) is type(q)
    expected, _ = numba_kernels.run_sparse(*(np.asarray(x) for x in (q, k, v)), problem)
    np.testing.assert_array_equal(numba_kernels.as_numpy(out), expected)


def test_strided_memory():
    q, k, v = random_qkv(2, 1, 16, 16, 4)
    expected = unisparse_attention(q, k, v, CONFIG, backend="numba")
    around = [np.full((x.shape[0], 2 * x.shape[1], x.shape[2] + 3), np.nan, x.dtype) for x in (q, k, v)]
    views = [big[:, ::2, 1:-2] for big in around]
    for view, x in zip(views, (q, k, v), strict=True):
        view[...] = x
    np.testing.assert_array_equal(unisparse_attention(*views, CONFIG, backend="numba"), expected)


def test_arrays_of_another_library_come_back_as_theirs():
    q, k, v = random_qkv(1, 1, 16, 16, 4)
    out = unisparse_attention(*(Tensor(x) for x in (q, k, v)), CONFIG, backend="numba")
    assert isinstance(out, Tensor)
    np.testing.assert_array_equal(out.to_array(), unisparse_attention(q, k, v, CONFIG, backend="numba"))


@pytest.mark.parametrize("pieces", [[29], [1] * 5 + [11, 8, 5], [8, 16, 5]])
def test_a_running_key_summary_has_the_bits_of_the_whole(pieces):
    config = UniSparseConfig(block_size=8, q_compress=2, k_compress=4, key_anchors=2)
    k = random_qkv(2, 2, 1, 29, 4)[1]
    running = numba_kernels.RunningKeySummary(config, 2, 2, 4, capacity=32)
    for start, count in zip(np.cumsum([0, *pieces]), pieces, strict=False):
        running.extend(k[:, start : start + count])
        seen = k[:, : start + count]
        problem = Problem(2, 2, 1, seen.shape[1], 4, config)
        kc, anchors = running.summary()
        np.testing.assert_array_equal(kc, numba_kernels.compress(seen[:, :1], seen, problem)[1])
        np.testing.assert_array_equal(anchors, numba_kernels.find_anchors(seen, 8, 2))
    np.testing.assert_array_equal(anchors, reference.find_anchors(k, 8, 2))
    with pytest.raises(InvalidInput, match="33 keys do not fit a key summary of capacity 32"):
        running.extend(k[:, :4])
