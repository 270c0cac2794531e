"""unisparse_attention's surface: kinds of arrays, what is returned, backends by name, scale and offset."""

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from tests.other_library import Tensor
from unisparse_np import BackendUnavailable, InvalidInput, UniSparseConfig, unisparse_attention
from unisparse_np.attention import choose_backend, load_backend, load_model_backend
from unisparse_np.problem import KeySummary

CONFIG = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)


@pytest.fixture
def qkv():
    rng = np.random.default_rng(3)
    return [rng.standard_normal(shape, dtype=np.float32) for shape in ((4, 50, 8), (2, 70, 8), (2, 70, 8))]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("config", [CONFIG, "dense"], ids=["sparse", "dense"])
def test_another_librarys_arrays_come_back_as_their_own_kind(qkv, dtype, config):
    arrays = [x.astype(dtype) for x in qkv]
    expected, expected_lse = unisparse_attention(*arrays, config, return_lse=True)
    out, lse = unisparse_attention(*map(Tensor, arrays), config, return_lse=True)
    assert type(out) is Tensor and type(lse) is Tensor and out.dtype == dtype
    np.testing.assert_array_equal(out.to_array(), expected)
    np.testing.assert_array_equal(lse.to_array(), expected_lse)


def test_a_key_summary_of_another_library(qkv):
    expected, trace = unisparse_attention(*qkv, CONFIG, return_trace=True)
    out = unisparse_attention(*map(Tensor, qkv), CONFIG, key_summary=KeySummary(Tensor(trace.kc), Tensor(trace.anchors)))
    np.testing.assert_array_equal(out.to_array(), expected)


def test_a_batch_of_another_library(qkv):
    batch = [np.stack([x, x[::-1]]) for x in qkv]
    out = unisparse_attention(*map(Tensor, batch), CONFIG)
    assert type(out) is Tensor and out.shape == (2, 4, 50, 8)
    np.testing.assert_array_equal(out.to_array(), unisparse_attention(*batch, CONFIG))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_torch_tensors(qkv, dtype):
    torch = pytest.importorskip("torch")
    tensors = [torch.from_numpy(x).to(getattr(torch, dtype)) for x in qkv]
    out = unisparse_attention(*tensors, CONFIG)
    assert isinstance(out, torch.Tensor) and out.dtype == tensors[0].dtype
    expected = unisparse_attention(*(x.float().numpy() for x in tensors), CONFIG)
    torch.testing.assert_close(out, torch.from_numpy(expected).to(out.dtype))
    with pytest.raises(InvalidInput, match="q requires a gradient"):
        unisparse_attention(tensors[0].requires_grad_(), *tensors[1:], CONFIG)


def test_what_is_returned(qkv):
    out = unisparse_attention(*qkv, CONFIG)
    pair = unisparse_attention(*qkv, CONFIG, return_lse=True)
    with_trace = unisparse_attention(*qkv, CONFIG, return_trace=True)
    everything = unisparse_attention(*qkv, CONFIG, return_lse=True, return_trace=True)
    assert isinstance(out, np.ndarray) and (len(pair), len(with_trace), len(everything)) == (2, 2, 3)
    np.testing.assert_array_equal(pair[1], everything[2].lse)
    trace = with_trace[1]
    assert trace.qc.shape == (4, 13, 8) and trace.kc.shape == (2, 18, 8) and trace.anchors.shape == (2, 5, 1)
    assert trace.mean.shape == trace.mask.shape == (4, 4, 5) and trace.peak is None and "reference" in trace.kernel


def test_the_default_config_and_none_are_the_same(qkv):
    np.testing.assert_array_equal(unisparse_attention(*qkv), unisparse_attention(*qkv, UniSparseConfig()))


def test_scale_is_a_factor_on_the_logits(qkv):
    q, k, v = qkv
    expected = unisparse_attention(q, k, v, CONFIG, scale=1.0)
    np.testing.assert_allclose(unisparse_attention(2 * q, k, v, CONFIG, scale=0.5), expected, rtol=0, atol=1e-6)


def test_queries_sit_at_the_end_unless_an_offset_is_given(qkv):
    np.testing.assert_array_equal(unisparse_attention(*qkv, CONFIG), unisparse_attention(*qkv, CONFIG, q_offset=20))
    assert not np.array_equal(unisparse_attention(*qkv, CONFIG), unisparse_attention(*qkv, CONFIG, q_offset=0))


def test_two_runs_are_equal_to_the_bit(qkv):
    np.testing.assert_array_equal(unisparse_attention(*qkv, CONFIG), unisparse_attention(*qkv, CONFIG))


def test_inputs_are_left_alone(qkv):
    before = [x.copy() for x in qkv]
    unisparse_attention(*qkv, CONFIG)
    for x, original in zip(qkv, before, strict=True):
        np.testing.assert_array_equal(x, original)


def test_an_unknown_backend_is_named(qkv):
    with pytest.raises(InvalidInput, match="backend='gpu' is not known"):
        unisparse_attention(*qkv, CONFIG, backend="gpu")


def test_a_missing_backend_never_falls_back(qkv, monkeypatch):
    monkeypatch.setitem(__import__("unisparse_np.attention").attention.BACKENDS, "numba", "unisparse_np.gpu.no_such_backend")
    with pytest.raises(BackendUnavailable, match="numba backend is not part of this version"):
        unisparse_attention(*qkv, CONFIG, backend="numba")
    monkeypatch.setitem(__import__("unisparse_np.attention").attention.BACKENDS, "numba", "no_such_package")
    with pytest.raises(BackendUnavailable, match="needs no_such_package, which is not installed"):
        load_backend("numba")


def test_gpu_memory_is_refused_by_the_reference(qkv):
    with pytest.raises(InvalidInput, match="q lives on a GPU"):
        unisparse_attention(*(Tensor(x, device=2) for x in qkv), CONFIG, backend="reference")


def test_a_backend_without_its_device_runs_no_model(monkeypatch):
    def no_device():
        raise BackendUnavailable("CuPy finds no usable CUDA device")

    monkeypatch.setattr("unisparse_np.attention.load_backend", lambda name: SimpleNamespace(require_device=no_device))
    with pytest.raises(BackendUnavailable, match="no usable CUDA device"):
        load_model_backend("cupy")
    assert choose_backend()[0] == "reference"
