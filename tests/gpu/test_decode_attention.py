"""Few queries and decode steps on a real device: against the reference, to the bit from run to run, and from a CUDA graph."""

import ml_dtypes
import numpy as np
import pytest

from tests.decoding import Decoding
from unisparse_np import Problem, UniSparseConfig, reference
from unisparse_np.comparison import TOLERANCES, compare_outputs

pytestmark = pytest.mark.gpu
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_decoding(rng):
    """A random shape and config, and positions to decode at."""
    size = int(rng.choice([64, 128, 256]))
    group, kv_heads = [(1, 2), (3, 1), (4, 2), (8, 1), (12, 1)][rng.integers(5)]
    heads = group * kv_heads
    legal = [c for c in range(1, heads + 1) if heads % c == 0 and (group % c == 0 or c % group == 0)]
    rule = rng.integers(3)
    q_compress, k_compress = int(rng.choice([2, 4, 8, 16])), int(rng.choice([1, 4, 8, 32]))
    coarse = max(q_compress, k_compress, 2 * k_compress)
    config = UniSparseConfig(
        size,
        q_compress,
        k_compress,
        int(rng.choice(legal)),
        top_p=float(rng.choice([0.1, 0.5, 0.9, 1.0])) if rule != 1 else None,
        row_threshold=float(rng.choice([0.02, 0.1])) if rule != 0 else None,
        key_anchors=int(rng.choice([0, 1, 1, 3])),
        sink_blocks=int(rng.integers(3)),
        local_blocks=int(rng.integers(3)),
        top_p_compress=coarse if rule == 2 and rng.integers(4) else None,
    )
    capacity = int(rng.integers(20, 20 * size))
    first = int(rng.integers(0, capacity - 4))
    head_dim = int(rng.choice([64, 80, 96, 128, 256]))
    dtype = BFLOAT16 if rng.integers(2) else np.dtype(np.float16)
    decoding = Decoding(config if rng.integers(4) else "dense", heads, kv_heads, head_dim, capacity, dtype, int(rng.integers(1 << 30)))
    return decoding, sorted({0, first, first + 1, first + 2, capacity - 1})


@pytest.mark.parametrize("seed", range(24))
def test_random_decode_steps(seed, cupy):
    decoding, positions = random_decoding(np.random.default_rng(seed))
    decoding.check(cupy, positions)


@pytest.mark.parametrize("seed", range(16))
def test_random_few_queries(seed, cupy):
    from unisparse_np.gpu import cupy_kernels
    from unisparse_np.gpu.cupy_kernels.decode_attention import attend_few
    from unisparse_np.gpu.cupy_kernels.plan import plan_of
    from unisparse_np.gpu.cupy_kernels.select import from_bool

    rng = np.random.default_rng(100 + seed)
    group, kv_heads = [(1, 2), (3, 1), (4, 2), (8, 1)][rng.integers(4)]
    k_len = int(rng.integers(20, 5000))
    config = UniSparseConfig(int(rng.choice([64, 128])), key_anchors=int(rng.integers(3)))
    causal, q_len = bool(rng.integers(3)), int(rng.integers(1, 17))
    offset = int(rng.integers(0, k_len - q_len + 1)) if causal and rng.integers(2) else None
    problem = Problem(group * kv_heads, kv_heads, q_len, k_len, int(rng.choice([64, 96, 128, 256])), config, causal, offset)
    dtype = BFLOAT16 if rng.integers(2) else np.dtype(np.float16)
    q = (2 * rng.standard_normal((problem.num_q_heads, q_len, problem.head_dim))).astype(dtype)
    k, v = (rng.standard_normal((kv_heads, k_len, problem.head_dim)).astype(dtype) for _ in range(2))
    mask = rng.random((problem.num_q_heads, 1, problem.num_k_blocks)) < float(rng.choice([0.1, 0.5, 1.0]))
    device = tuple(cupy.asarray(x) for x in (q, k, v))
    anchors = cupy_kernels.find_anchors(device[1], config.block_size, config.key_anchors) if config.key_anchors else None
    words = from_bool(cupy.asarray(mask))
    out, lse, _ = attend_few(*device, words, anchors, plan_of(problem))
    again, _, _ = attend_few(*device, words, anchors, plan_of(problem))
    assert (cupy.asnumpy(out).view(np.uint16) == cupy.asnumpy(again).view(np.uint16)).all()
    qkv = tuple(x.astype(np.float64) for x in (q, k, v))
    expected, expected_lse = reference.sparse_attention(*qkv, mask, problem)
    report = compare_outputs(cupy.asnumpy(out), qkv, expected, mask, problem, dtype.name)
    assert report.ok, report
    np.testing.assert_allclose(cupy.asnumpy(lse), expected_lse, atol=TOLERANCES["float16"].scores)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlapping"])
@pytest.mark.parametrize("config", ["dense", UniSparseConfig(top_p=0.5)], ids=["dense", "sparse"])
def test_a_graph_captured_once_replays_at_growing_lengths(config, overlap, cupy):
    from unisparse_np.gpu.cupy_kernels import RunningKeySummary
    from unisparse_np.gpu.cupy_kernels.decode_attention import DecodeAttention
    from unisparse_np.gpu.cupy_kernels.overlap import overlap_is_possible

    if overlap and not overlap_is_possible():
        pytest.skip("this device or driver starts launches one after the other")
    decoding = Decoding(config, 8, 2, 128, 3000, BFLOAT16, seed=9)
    p = decoding.problem
    k, v, q = (cupy.asarray(x) for x in (decoding.k, decoding.v, decoding.q))
    keys, values, prompt = cupy.full_like(k, np.nan), cupy.full_like(v, np.nan), 2040
    keys[:, :prompt], values[:, :prompt] = k[:, :prompt], v[:, :prompt]
    query, position = cupy.empty_like(q[0]), cupy.zeros(1, np.int32)
    summary = None
    if config != "dense":
        running = RunningKeySummary(config, 8, 2, 128, 3000, BFLOAT16)
        running.extend(k[:, :prompt])
        summary = running.whole()
    attention = DecodeAttention(8, 2, 128, p.k_len, config, BFLOAT16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        out = attention.launch(query, keys, values, position, summary, overlap=overlap)
        graph = stream.end_capture()
        positions = range(prompt, prompt + 12)
        found = []
        for at in positions:
            keys[:, at], values[:, at], query[...], position[...] = k[:, at], v[:, at], q[at], at
            graph.launch(stream)
            found.append(cupy.asnumpy(out).view(np.uint16))
    stream.synchronize()
    for outs, (expected, _, _) in zip(found, decoding.run(cupy, positions), strict=True):
        np.testing.assert_array_equal(outs, expected.view(np.uint16))
