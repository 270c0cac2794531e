"""The CuPy backend on a real device: golden vectors, random problems against the reference, and what must hold to the bit."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tests import golden
from unisparse_np import BackendUnavailable, InvalidInput, Problem, UniSparseConfig, audit, unisparse_attention
from unisparse_np.attention import score_blocks
from unisparse_np.comparison import TOLERANCES, compare_masks, compare_outputs, compare_scores

pytestmark = pytest.mark.gpu
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def fits(case):
    return case.problem.head_dim in (64, 128) and case.problem.config.block_size >= 64


GOLDEN = [path for path in golden.FILES if fits(golden.load(path))]


def backend():
    from unisparse_np.gpu import cupy_kernels

    return cupy_kernels


def random_inputs(rng, problem, dtype, cupy, spread=1.0):
    """q, k, v on the device, as [H, L, d] views of [L, H, d] memory half of the time."""
    arrays = []
    for heads, length in (
        (problem.num_q_heads, problem.q_len),
        (problem.num_kv_heads, problem.k_len),
        (problem.num_kv_heads, problem.k_len),
    ):
        x = rng.standard_normal((length, heads, problem.head_dim))
        x *= spread if not arrays else 1.0
        x = cupy.asarray(x.astype(dtype)).transpose(1, 0, 2)
        arrays.append(x if rng.integers(2) else cupy.ascontiguousarray(x))
    return arrays


def random_problem(rng, head_dims=(64, 128), block_sizes=(64, 128, 256)):
    group, num_kv_heads = [(1, 1), (2, 1), (1, 3), (2, 2), (4, 2), (3, 2)][rng.integers(6)]
    size = int(rng.choice(block_sizes))
    heads = group * num_kv_heads
    legal = [c for c in range(1, heads + 1) if heads % c == 0 and (group % c == 0 or c % group == 0)]
    rule = rng.integers(3)
    q_compress, k_compress = (int(rng.choice([2, 4, 8, 16, 32])) for _ in range(2))
    config = UniSparseConfig(
        block_size=size,
        q_compress=q_compress,
        k_compress=k_compress,
        top_p_compress=min(size, 2 * max(q_compress, k_compress))
        if rule == 2 and rng.integers(2)
        else None,  # composites of its own for Top-P
        head_compress=int(rng.choice(legal)),
        top_p=float(rng.choice([0.1, 0.5, 0.9, 1.0])) if rule != 1 else None,
        row_threshold=float(rng.choice([0.02, 0.1, 0.3])) if rule != 0 else None,
        key_anchors=int(rng.choice([0, 1, 1, 3, 8])),
        sink_blocks=int(rng.integers(3)),
        local_blocks=int(rng.integers(3)),
    )
    causal = bool(rng.integers(4))
    k_len = int(rng.integers(1, 12 * size))
    q_len = int(rng.integers(1, k_len + 1)) if causal else int(rng.integers(1, 6 * size))
    q_offset = int(rng.integers(0, k_len - q_len + 1)) if causal and rng.integers(2) else None
    return Problem(heads, num_kv_heads, q_len, k_len, int(rng.choice(head_dims)), config, causal, q_offset)


@pytest.mark.parametrize("file", GOLDEN, ids=lambda path: path.stem)
def test_golden_vectors(file, path, cupy):
    case = golden.load(file)
    problem, engine = case.problem, backend()
    q, k, v = (cupy.asarray(x) for x in (case.q, case.k, case.v))
    c_h = problem.config.head_compress
    mean, peak = case.scores[::c_h], case.peak[::c_h]
    _, trace = engine.run_sparse(q, k, v, problem, keep_scores=True)
    tolerance = TOLERANCES["float16"]
    found_peak = None if trace.peak is None else cupy.asnumpy(trace.peak)
    expected_peak = None if trace.peak is None else peak
    reports = [
        compare_scores(cupy.asnumpy(trace.mean), found_peak, mean, expected_peak, tolerance),
        compare_masks(cupy.asnumpy(trace.mask), case.mask, mean, peak, problem, tolerance.scores),
    ]
    given, lse = engine.sparse_attention(q, k, v, cupy.asarray(case.mask), problem)
    qkv = tuple(x.astype(np.float64) for x in (case.q, case.k, case.v))
    reports.append(compare_outputs(cupy.asnumpy(given), qkv, case.out, case.mask, problem, "float16"))
    assert all(report.ok for report in reports), reports
    np.testing.assert_allclose(cupy.asnumpy(lse), case.lse, atol=1e-3)


@pytest.mark.parametrize("seed", range(40))
def test_random_problems(seed, path, cupy):
    rng = np.random.default_rng(seed)
    problem = random_problem(rng)
    dtype = BFLOAT16 if rng.integers(2) else np.dtype(np.float16)
    q, k, v = random_inputs(rng, problem, dtype, cupy, spread=float(rng.choice([0.3, 1.0, 4.0])))
    report = audit(q, k, v, problem.config, backend="cupy", causal=problem.causal, q_offset=problem.q_offset)
    assert report.ok, str(report)
    assert_fused_equals_staged(q, k, v, problem, cupy)


@pytest.mark.parametrize(("head_dim", "block_size"), [(80, 64), (96, 128), (256, 64), (256, 128), (256, 256)])
def test_other_head_dims(head_dim, block_size, cupy):
    rng = np.random.default_rng(head_dim + block_size)
    problem = Problem(4, 2, 300, 1000, head_dim, UniSparseConfig(block_size=block_size, top_p=0.5))
    q, k, v = random_inputs(rng, problem, BFLOAT16, cupy)
    report = audit(q, k, v, problem.config, backend="cupy")
    assert report.ok, str(report)


def assert_fused_equals_staged(q, k, v, problem, cupy):
    """The staged calls agree with the fused one to the bit, and so does a second run."""
    engine = backend()
    out, trace = engine.run_sparse(q, k, v, problem)
    again, trace_again = engine.run_sparse(q, k, v, problem)
    assert (cupy.asnumpy(out).view(np.uint16) == cupy.asnumpy(again).view(np.uint16)).all()
    assert (cupy.asnumpy(trace.mask) == cupy.asnumpy(trace_again.mask)).all()
    mask = engine.select_blocks(*score_blocks(q, k, problem, engine), problem)
    assert (cupy.asnumpy(mask) == cupy.asnumpy(trace.mask)).all()
    staged, lse = engine.sparse_attention(q, k, v, mask, problem)
    assert (cupy.asnumpy(out).view(np.uint16) == cupy.asnumpy(staged).view(np.uint16)).all()
    np.testing.assert_array_equal(cupy.asnumpy(lse), cupy.asnumpy(trace.lse))


TWO_SIZES = UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.02, top_p_compress=8)


@pytest.mark.parametrize(
    "config",
    [
        UniSparseConfig(top_p=0.5),
        UniSparseConfig.precise(),
        UniSparseConfig(block_size=256, top_p=0.3),
        TWO_SIZES,
        UniSparseConfig.balanced(),
    ],
)
def test_chunks_give_the_same_masks_and_outputs(config, path, cupy):
    rng = np.random.default_rng(1)
    whole = Problem(4, 2, 2000, 2000, 128, config)
    q, k, v = random_inputs(rng, whole, BFLOAT16, cupy)
    engine = backend()
    out, trace = engine.run_sparse(q, k, v, whole)
    mask, size = cupy.asnumpy(trace.mask), config.block_size
    for start, stop in ((0, 512), (512, 1280), (1280, 2000)):
        part = Problem(4, 2, stop - start, stop, 128, config)
        part_out, part_trace = engine.run_sparse(q[:, start:stop], k[:, :stop], v[:, :stop], part)
        blocks = -(-stop // size)
        assert (cupy.asnumpy(part_trace.mask) == mask[:, start // size : blocks, :blocks]).all()
        assert (cupy.asnumpy(part_out).view(np.uint16) == cupy.asnumpy(out)[:, start:stop].view(np.uint16)).all()


@pytest.mark.parametrize("block_size", [64, 128, 256])
@pytest.mark.parametrize("key_anchors", [0, 2])
def test_poison_behind_a_query_does_not_reach_it(block_size, key_anchors, path, cupy):
    rng = np.random.default_rng(block_size + key_anchors)
    config = UniSparseConfig(block_size=block_size, top_p=0.3, key_anchors=key_anchors, sink_blocks=0, local_blocks=0)
    problem = Problem(2, 1, 700, 700, 64, config)
    q, k, v = random_inputs(rng, problem, BFLOAT16, cupy)
    engine = backend()
    mask = engine.select_blocks(*score_blocks(q, k, problem, engine), problem)
    clean = cupy.asnumpy(engine.sparse_attention(q, k, v, mask, problem)[0]).astype(np.float64)
    for p in (0, 63, 100, 383, 600):
        poisoned_k, poisoned_v = k.copy(), v.copy()
        poisoned_k[:, p + 1 :] = np.nan
        poisoned_v[:, p + 1 :] = np.nan
        found = cupy.asnumpy(engine.sparse_attention(q, poisoned_k, poisoned_v, mask, problem)[0]).astype(np.float64)
        assert np.abs(found[:, : p + 1] - clean[:, : p + 1]).max() <= 0.02, p  # repaired rows: float32 instead of 16-bit weights
        assert np.isnan(found[:, p + 1 :]).any(axis=-1).all()


@pytest.mark.parametrize("config", [UniSparseConfig(top_p=0.5), TWO_SIZES])
def test_neighbouring_memory_does_not_matter(config, path, cupy):
    rng = np.random.default_rng(5)
    problem = Problem(2, 1, 333, 333, 64, config)
    q, k, v = random_inputs(rng, problem, BFLOAT16, cupy)
    engine = backend()
    out, _ = engine.run_sparse(q, k, v, problem)
    padded = []
    for x in (q, k, v):
        room = cupy.full((x.shape[0], 512, x.shape[2]), np.nan, x.dtype)
        room[:, 100:433] = x
        padded.append(room[:, 100:433])
    again, _ = engine.run_sparse(*padded, problem)
    assert (cupy.asnumpy(out).view(np.uint16) == cupy.asnumpy(again).view(np.uint16)).all()


def test_numpy_in_numpy_out_and_batch(cupy):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((2, heads, 300, 64)).astype(np.float16) for heads in (4, 2, 2))
    out = unisparse_attention(q, k, v, UniSparseConfig(top_p=0.5), backend="cupy")
    assert isinstance(out, np.ndarray)
    for n in range(2):
        alone = unisparse_attention(q[n], k[n], v[n], UniSparseConfig(top_p=0.5), backend="cupy")
        assert (alone == out[n]).all()


def test_what_is_not_supported_is_said(cupy):
    x = cupy.zeros((1, 10, 64), np.float64)
    with pytest.raises(InvalidInput, match="float16, bfloat16 and float32"):
        unisparse_attention(x, x, x)
    x = cupy.zeros((1, 10, 264), np.float16)
    with pytest.raises(InvalidInput, match="head_dim=264"):
        unisparse_attention(x, x, x)


def test_memory_is_given_back_and_two_streams_do_not_disturb_each_other(cupy):
    rng = np.random.default_rng(6)
    problem = Problem(4, 2, 1000, 1000, 128, UniSparseConfig(top_p=0.5))
    engine = backend()
    inputs = [random_inputs(rng, problem, BFLOAT16, cupy) for _ in range(2)]
    expected = [cupy.asnumpy(engine.run_sparse(*x, problem)[0]).view(np.uint16) for x in inputs]
    pool = cupy.get_default_memory_pool()
    before = pool.used_bytes()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    cupy.cuda.Device().synchronize()
    for _ in range(100):
        outs = []
        for stream, x in zip(streams, inputs, strict=True):
            with stream:
                outs.append(engine.run_sparse(*x, problem)[0])
        for stream in streams:
            stream.synchronize()
        for out, want in zip(outs, expected, strict=True):
            assert (cupy.asnumpy(out).view(np.uint16) == want).all()
    del outs, out
    assert pool.used_bytes() == before


@pytest.mark.parametrize("config", [UniSparseConfig(top_p=0.5, key_anchors=2), replace(TWO_SIZES, key_anchors=2)])
def test_running_key_summary_is_the_summary_of_the_whole(config, path, cupy):
    problem = Problem(4, 2, 300, 1000, 128, config)
    q, k, v = random_inputs(np.random.default_rng(8), problem, BFLOAT16, cupy)
    engine = backend()
    running = engine.RunningKeySummary(problem.config, 4, 2, 128, capacity=1024)
    for start, stop in ((0, 512), (512, 700), (700, 701), (701, 702), (702, 1000)):
        running.extend(k[:, start:stop])
    kc, anchors = running.summary()
    composites = engine.as_composites(engine.compress(q, k, problem)[1], problem, q.dtype)
    assert (cupy.asnumpy(kc) == cupy.asnumpy(composites)).all()
    assert (cupy.asnumpy(anchors) == cupy.asnumpy(engine.find_anchors(k, config.block_size, 2))).all()
    cached, _ = engine.run_sparse(q, k, v, problem, running.summary())
    whole, _ = engine.run_sparse(q, k, v, problem)
    assert (cupy.asnumpy(cached).view(np.uint16) == cupy.asnumpy(whole).view(np.uint16)).all()


def test_out_of_memory_names_a_chunk_that_fits(cupy):
    q, k, v = random_inputs(np.random.default_rng(7), Problem(8, 2, 8192, 8192, 128), BFLOAT16, cupy)
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=pool.used_bytes() + (1 << 20))
    try:
        with pytest.raises(BackendUnavailable, match="chunks of"):
            backend().run_sparse(q, k, v, Problem(8, 2, 8192, 8192, 128))
    finally:
        pool.set_limit(size=0)
