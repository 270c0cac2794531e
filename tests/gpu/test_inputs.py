"""Kinds of input on a real device: other libraries' arrays, key summaries of any kind, odd views, large batches, another GPU."""

import ml_dtypes
import numpy as np
import pytest

from unisparse_np import InvalidInput, UniSparseConfig, unisparse_attention
from unisparse_np.problem import KeySummary

pytestmark = pytest.mark.gpu
CONFIG = UniSparseConfig(64, top_p=0.5)


def random_qkv(q_heads, kv_heads, q_len, k_len, head_dim=64, dtype=np.float16, batch=()):
    rng = np.random.default_rng(q_len)
    shapes = ((*batch, q_heads, q_len, head_dim), *2 * [(*batch, kv_heads, k_len, head_dim)])
    return [rng.standard_normal(shape, dtype=np.float32).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_tensors_of_pytorch_come_back_as_pytorchs(dtype, cupy):
    torch = pytest.importorskip("torch")
    arrays = random_qkv(4, 2, 100, 200, dtype=getattr(ml_dtypes, dtype, dtype))
    given = [torch.from_numpy(x.astype(np.float32)).to("cuda", getattr(torch, dtype)) for x in arrays]
    out = unisparse_attention(*given, CONFIG)
    assert out.is_cuda and out.dtype == given[0].dtype
    expected = unisparse_attention(*arrays, CONFIG, backend="cupy").astype(np.float32)
    np.testing.assert_array_equal(out.float().cpu().numpy(), expected)
    with pytest.raises(InvalidInput, match="k requires a gradient"):
        unisparse_attention(given[0], given[1].clone().requires_grad_(), given[2], CONFIG)


@pytest.mark.parametrize("config", [CONFIG, UniSparseConfig.balanced()], ids=["one size", "two sizes"])
@pytest.mark.parametrize("q_len", [1, 100])
def test_a_key_summary_of_any_kind_and_strides(q_len, config, cupy):
    """NumPy's arrays, 64-bit positions, float16 composites whose rows are not side by side."""
    q, k, v = (cupy.asarray(x) for x in random_qkv(4, 2, q_len, 500))
    expected, trace = unisparse_attention(q, k, v, config, return_trace=True)
    kc, anchors = trace.kc, trace.anchors
    by_token = cupy.ascontiguousarray(kc.astype(np.float16).transpose(1, 0, 2)).transpose(1, 0, 2)
    for summary in ((kc, anchors), (cupy.asnumpy(kc), cupy.asnumpy(anchors)), (by_token, anchors.astype(np.int64))):
        found = unisparse_attention(q, k, v, config, key_summary=KeySummary(*summary))
        assert (cupy.asnumpy(found) == cupy.asnumpy(expected)).all()


def views(x, cupy):
    """The same numbers in odd places: backwards, off 16-byte boundaries, with columns or other rows in between."""
    heads, length, dim = x.shape
    yield "reversed", cupy.ascontiguousarray(x[:, ::-1])[:, ::-1]
    room = cupy.full((heads, length, dim + 3), np.nan, x.dtype)
    room[..., 1 : dim + 1] = x
    yield "unaligned rows", room[..., 1 : dim + 1]
    flat = cupy.full(heads * (length * dim + 5), np.nan, x.dtype)
    strided = cupy.lib.stride_tricks.as_strided(flat, x.shape, ((length * dim + 5) * x.itemsize, dim * x.itemsize, x.itemsize))
    strided[...] = x
    yield "unaligned heads", strided
    yield "columns first", cupy.ascontiguousarray(x.transpose(0, 2, 1)).transpose(0, 2, 1)
    yield "every other row", cupy.repeat(x, 2, axis=1)[:, ::2]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("q_len", [3, 130])
def test_views_with_odd_strides(q_len, dtype, cupy):
    q, k, v = (cupy.asarray(x) for x in random_qkv(4, 2, q_len, 333, dtype=dtype))
    expected = cupy.asnumpy(unisparse_attention(q, k, v, CONFIG))
    for (name, odd_q), (_, odd_k), (_, odd_v) in zip(views(q, cupy), views(k, cupy), views(v, cupy), strict=True):
        assert (cupy.asnumpy(unisparse_attention(odd_q, odd_k, odd_v, CONFIG)) == expected).all(), name
    one_head = cupy.broadcast_to(k[:1], k.shape), cupy.broadcast_to(v[:1], v.shape)
    copies = (cupy.ascontiguousarray(x) for x in one_head)
    assert (cupy.asnumpy(unisparse_attention(q, *one_head, CONFIG)) == cupy.asnumpy(unisparse_attention(q, *copies, CONFIG))).all()


@pytest.mark.parametrize("config", [CONFIG, UniSparseConfig.balanced(), "dense"], ids=["default", "balanced", "dense"])
@pytest.mark.parametrize(("batch", "q_len", "k_len"), [(400, 1, 70), (1700, 17, 17)])
def test_a_batch_of_thousands_of_heads(batch, q_len, k_len, config, cupy):
    """More groups of rows than a thread block's shared memory holds; more heads than a grid has rows."""
    q, k, v = (cupy.asarray(x) for x in random_qkv(20, 20, q_len, k_len, batch=(batch,)))
    out, lse = unisparse_attention(q, k, v, config, return_lse=True)
    assert lse.shape == (batch, 20, q_len)
    for n in (0, 1, batch // 2, batch - 1):
        alone, alone_lse = unisparse_attention(q[n], k[n], v[n], config, return_lse=True)
        np.testing.assert_allclose(cupy.asnumpy(out[n]).astype(np.float32), cupy.asnumpy(alone).astype(np.float32), atol=2e-3)
        np.testing.assert_allclose(cupy.asnumpy(lse[n]), cupy.asnumpy(alone_lse), atol=1e-3)


@pytest.mark.parametrize("config", [CONFIG, "dense"], ids=["sparse", "dense"])
@pytest.mark.parametrize(("q_len", "dtype"), [(1, np.float16), (200, np.float16), (200, np.float32)])
def test_a_stream_that_the_caller_captures(q_len, dtype, config, cupy):
    """Each kind of call, once it has run on the stream: what is captured reads the arrays' numbers of the replay."""
    q, k, v = (cupy.asarray(x) for x in random_qkv(4, 2, q_len, 300, dtype=dtype))
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        unisparse_attention(q, k, v, config)
        stream.begin_capture()
        out = unisparse_attention(q, k, v, config)
        graph = stream.end_capture()
        q *= dtype(0.5)
        expected = cupy.asnumpy(unisparse_attention(q, k, v, config))
        graph.launch(stream)
        stream.synchronize()
    assert (cupy.asnumpy(out) == expected).all()


def test_arrays_of_another_gpu_are_refused_and_each_gpu_computes_the_same(cupy):
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two GPUs")
    arrays = random_qkv(4, 2, 100, 200)
    results = []
    for device in (0, 1):
        with cupy.cuda.Device(device):
            given = [cupy.asarray(x) for x in arrays]
            for config in (CONFIG, "dense"):
                results.append(cupy.asnumpy(unisparse_attention(*given, config)))
            results.append(cupy.asnumpy(unisparse_attention(given[0][:, -1:], *given[1:], CONFIG)))
    for first, second in zip(results[:3], results[3:], strict=True):
        np.testing.assert_array_equal(first, second)
    with pytest.raises(InvalidInput, match="q lies on GPU 1, but the current device is GPU 0"):
        unisparse_attention(*given, CONFIG)
