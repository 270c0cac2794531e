"""On a GPU: arrays of CuPy, PyTorch and Numba go in without a copy and come out as their own kind."""

import ml_dtypes
import numpy as np
import pytest

from tests.numba.test_stages import SMALL, random_qkv
from unisparse_np import UniSparseConfig, unisparse_attention

CONFIG = UniSparseConfig(**SMALL)
pytestmark = pytest.mark.gpu


def expected(arrays):
    return unisparse_attention(*arrays, CONFIG).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_cupy(dtype):
    cupy = pytest.importorskip("cupy")
    arrays = random_qkv(4, 2, 40, 40, 16, np.dtype(dtype))
    out = unisparse_attention(*(cupy.asarray(x) for x in arrays), CONFIG, backend="numba")
    assert isinstance(out, cupy.ndarray) and out.dtype == dtype
    np.testing.assert_allclose(cupy.asnumpy(out).astype(np.float32), expected(arrays), rtol=2**-7, atol=1e-5)


def test_a_batch_of_strided_cupy_arrays():
    cupy = pytest.importorskip("cupy")
    arrays = [np.stack([x, -x]) for x in random_qkv(4, 2, 40, 40, 16)]
    strided = [cupy.asarray(np.repeat(x, 2, axis=2))[:, :, ::2] for x in arrays]
    out = unisparse_attention(*strided, CONFIG, backend="numba")
    np.testing.assert_allclose(cupy.asnumpy(out), unisparse_attention(*arrays, CONFIG), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pytorch(dtype):
    torch = pytest.importorskip("torch")
    arrays = random_qkv(4, 2, 40, 40, 16, np.dtype(getattr(ml_dtypes, dtype, dtype)))
    tensors = [torch.from_numpy(x.astype(np.float32)).to("cuda", getattr(torch, dtype)) for x in arrays]
    out = unisparse_attention(*tensors, CONFIG, backend="numba")
    assert isinstance(out, torch.Tensor) and out.is_cuda and out.dtype == getattr(torch, dtype)
    np.testing.assert_allclose(out.float().cpu().numpy(), expected(arrays), rtol=2**-7, atol=1e-5)


def test_numba():
    from numba import cuda

    arrays = random_qkv(4, 2, 40, 40, 16)
    out = unisparse_attention(*(cuda.to_device(x) for x in arrays), CONFIG, backend="numba")
    assert cuda.is_cuda_array(out)
    np.testing.assert_allclose(out.copy_to_host(), expected(arrays), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["auto", "cupy"])
def test_numba_arrays_on_the_cupy_backend(backend):
    from numba import cuda

    pytest.importorskip("cupy")
    arrays = random_qkv(4, 2, 40, 40, 16)
    out, lse = unisparse_attention(*(cuda.to_device(x) for x in arrays), CONFIG, backend=backend, return_lse=True)
    assert cuda.is_cuda_array(out) and cuda.is_cuda_array(lse) and hasattr(out, "copy_to_host")
    np.testing.assert_allclose(out.copy_to_host(), expected(arrays), rtol=0, atol=1e-5)
