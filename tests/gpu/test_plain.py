"""The plain kernels on a real device: float32, head dims and block sizes that the tensor cores do not take, any scale."""

import ml_dtypes
import numpy as np
import pytest

from tests import golden
from tests.gpu.test_backend import backend, random_inputs, random_problem
from unisparse_np import Problem, UniSparseConfig, audit, unisparse_attention
from unisparse_np.attention import score_blocks

pytestmark = pytest.mark.gpu
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def check(q, k, v, problem, kernel, cupy):
    """Every stage by the tolerance table, the kernel that ran, and the staged calls equal to the fused one to the bit."""
    engine = backend()
    report = audit(q, k, v, problem.config, backend="cupy", causal=problem.causal, q_offset=problem.q_offset, scale=problem.scale)
    assert report.ok, str(report)
    out, trace = engine.run_sparse(q, k, v, problem)
    assert trace.kernel.startswith(kernel)
    mask = engine.select_blocks(*score_blocks(q, k, problem, engine), problem)
    assert (mask == trace.mask).all()
    staged, lse = engine.sparse_attention(q, k, v, mask, problem)
    assert (staged == out).all()
    assert (lse == trace.lse).all()
    np.testing.assert_array_equal(cupy.asnumpy(engine.run_sparse(q, k, v, problem)[0]), cupy.asnumpy(out))


@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["float32", "float16"])
def test_golden_vectors(path, dtype, cupy):
    case = golden.load(path)
    problem = case.problem
    q, k, v = (cupy.asarray(x.astype(dtype)) for x in (case.q, case.k, case.v))
    report = audit(q, k, v, problem.config, backend="cupy", causal=problem.causal, q_offset=problem.q_offset)
    assert report.ok, str(report)


@pytest.mark.parametrize("seed", range(20))
def test_random_float32_problems(seed, cupy):
    rng = np.random.default_rng(1000 + seed)
    problem = random_problem(rng, head_dims=(16, 32, 50, 64, 128, 160, 256), block_sizes=(32, 64, 96, 128))
    q, k, v = random_inputs(rng, problem, np.float32, cupy, spread=float(rng.choice([0.3, 1.0, 4.0])))
    check(q, k, v, problem, "attend_plain", cupy)


@pytest.mark.parametrize("seed", range(10))
def test_random_sixteen_bit_problems_of_other_shapes(seed, cupy):
    rng = np.random.default_rng(2000 + seed)
    problem = random_problem(rng, head_dims=(2, 16, 32, 72, 200), block_sizes=(32, 96))
    q, k, v = random_inputs(rng, problem, [BFLOAT16, np.dtype(np.float16)][seed % 2], cupy)
    check(q, k, v, problem, "attend_plain", cupy)


@pytest.mark.parametrize("scale", [-0.2, 0.0, 3.0])
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16], ids=["float32", "bfloat16"])
def test_any_scale(scale, dtype, cupy):
    problem = Problem(4, 2, 300, 700, 64, UniSparseConfig(top_p=0.5), scale=scale)
    q, k, v = random_inputs(np.random.default_rng(1), problem, dtype, cupy, spread=0.3)
    check(q, k, v, problem, "attend_sm" if scale > 0 and dtype != np.float32 else "attend_plain", cupy)


@pytest.mark.parametrize(
    "config",
    [
        UniSparseConfig(32, 4, 4, top_p=0.5),
        UniSparseConfig.precise(),
        UniSparseConfig(32, 4, 2, top_p=0.5, row_threshold=0.05, top_p_compress=16),
    ],
)
def test_chunks_give_the_same_masks_and_outputs(config, cupy):
    whole = Problem(4, 2, 2000, 2000, 64, config)
    q, k, v = random_inputs(np.random.default_rng(2), whole, np.float32, cupy)
    engine = backend()
    out, trace = engine.run_sparse(q, k, v, whole)
    mask, size = cupy.asnumpy(trace.mask), config.block_size
    for start, stop in ((0, 512), (512, 1280), (1280, 2000)):
        part = Problem(4, 2, stop - start, stop, 64, config)
        part_out, part_trace = engine.run_sparse(q[:, start:stop], k[:, :stop], v[:, :stop], part)
        blocks = -(-stop // size)
        assert (cupy.asnumpy(part_trace.mask) == mask[:, start // size : blocks, :blocks]).all()
        assert (part_out == out[:, start:stop]).all()


def test_poison_behind_a_query_does_not_reach_it(cupy):
    problem = Problem(2, 1, 300, 300, 32, UniSparseConfig(32, 4, 4, top_p=0.3, key_anchors=2, sink_blocks=0, local_blocks=0))
    q, k, v = random_inputs(np.random.default_rng(3), problem, np.float32, cupy)
    engine = backend()
    mask = engine.select_blocks(*score_blocks(q, k, problem, engine), problem)
    clean = engine.sparse_attention(q, k, v, mask, problem)[0]
    for p in (0, 31, 100, 255):
        poisoned_k, poisoned_v = k.copy(), v.copy()
        poisoned_k[:, p + 1 :] = np.nan
        poisoned_v[:, p + 1 :] = np.nan
        found = engine.sparse_attention(q, poisoned_k, poisoned_v, mask, problem)[0]
        assert (found[:, : p + 1] == clean[:, : p + 1]).all()
        assert cupy.isnan(found[:, p + 1 :]).any(axis=-1).all()


def test_extreme_logits_stay_finite(cupy):
    problem = Problem(1, 1, 8192, 8192, 64, UniSparseConfig(top_p=0.5))
    for low in (False, True):
        q, k, v = random_inputs(np.random.default_rng(4), problem, np.float32, cupy)
        q[...] = 1e4 if low else 1.0
        k[:, 1000:] = -1e4 if low else 3e4
        out, trace = backend().run_sparse(q, k, v, problem)
        assert cupy.isfinite(out).all()
        assert cupy.isfinite(trace.lse).all()


def test_numpy_float32_in_and_out(cupy):
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((2, heads, 300, 16), dtype=np.float32) for heads in (4, 2, 2))
    config = UniSparseConfig(16, 4, 4, top_p=0.5)
    found = unisparse_attention(q, k, v, config, backend="cupy")
    assert isinstance(found, np.ndarray)
    np.testing.assert_allclose(found, unisparse_attention(q, k, v, config), atol=2e-5)
