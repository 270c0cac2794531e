"""Attention of a few queries by split keys, and the decode step: the kernels' own source on the CPU, compared with the reference."""

import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from unisparse_np import Problem, UniSparseConfig, reference
from unisparse_np.comparison import TOLERANCES, compare_outputs

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_arrays(problem, dtype, seed):
    """q [Hq, Lq, d], k, v [Hkv, Lk, d]."""
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((problem.num_q_heads, problem.q_len, problem.head_dim))
    k, v = (rng.standard_normal((problem.num_kv_heads, problem.k_len, problem.head_dim)) for _ in range(2))
    return tuple(x.astype(dtype) for x in (q, k, v))


def attend_few(q, k, v, mask, problem, seed=0):
    """out, lse of attend_few on the emulator; mask [Hq, 1, Nk] bool, or None for dense."""
    cupy_on_cpu.Kernel.seed = seed
    with cupy_on_cpu.installed("90") as backend:
        cupy = sys.modules["cupy"]
        from unisparse_np.gpu.cupy_kernels.decode_attention import attend_few, splits_keys
        from unisparse_np.gpu.cupy_kernels.plan import plan_of
        from unisparse_np.gpu.cupy_kernels.select import from_bool

        q, k, v = (cupy.asarray(x) for x in (q, k, v))
        assert splits_keys(problem, q.dtype)
        anchors, words = None, None
        if mask is not None:
            words = from_bool(mask)
            if problem.config.key_anchors:
                anchors = backend.find_anchors(k, problem.config.block_size, problem.config.key_anchors)
        out, lse, name = attend_few(q, k, v, words, anchors, plan_of(problem))
        assert name.startswith("decode_attention")
        return np.asarray(out), np.asarray(lse)


def check_few(problem, dtype, density, seed):
    """density: share of selected blocks, None for dense."""
    q, k, v = random_arrays(problem, dtype, seed)
    mask = None
    if density is not None:
        mask = np.random.default_rng(seed).random((problem.num_q_heads, 1, problem.num_k_blocks)) < density
    out, lse = attend_few(q, k, v, mask, problem, seed)
    qkv = tuple(x.astype(np.float64) for x in (q, k, v))
    everything = np.ones((problem.num_q_heads, 1, problem.num_k_blocks), bool)
    given = everything if mask is None else mask
    expected, expected_lse = reference.sparse_attention(*qkv, given, problem)
    report = compare_outputs(out, qkv, expected, given, problem, np.dtype(dtype).name)
    assert report.ok, report
    np.testing.assert_allclose(lse, expected_lse, atol=TOLERANCES["float16"].scores)


FEW = {
    "decode": (Problem(4, 1, 1, 333, 64, UniSparseConfig(64)), BFLOAT16, None),
    "one key": (Problem(2, 2, 1, 1, 64, UniSparseConfig(64)), np.float16, None),
    "group of 3, d 80": (Problem(6, 2, 2, 150, 80, UniSparseConfig(64)), np.float16, None),
    "an offset before the end": (Problem(2, 1, 3, 400, 48, UniSparseConfig(64), q_offset=200), np.float16, None),
    "not causal, 16 queries": (Problem(1, 1, 16, 100, 32, UniSparseConfig(64), causal=False), BFLOAT16, None),
    "two groups of rows": (Problem(8, 1, 3, 130, 128, UniSparseConfig(64)), BFLOAT16, None),
    "sparse": (Problem(4, 2, 1, 700, 64, UniSparseConfig(64, key_anchors=1)), BFLOAT16, 0.3),
    "sparse, 3 anchors, d 256": (Problem(3, 1, 5, 300, 256, UniSparseConfig(64, key_anchors=3)), np.float16, 0.4),
    "sparse, no anchors, few blocks": (Problem(2, 1, 2, 500, 64, UniSparseConfig(64, key_anchors=0)), np.float16, 0.1),
    "sparse, not causal": (Problem(2, 1, 7, 520, 64, UniSparseConfig(128, key_anchors=8), causal=False), np.float16, 0.5),
}


@pytest.mark.parametrize("name", FEW)
def test_a_few_queries(name):
    check_few(*FEW[name], seed=len(name))
