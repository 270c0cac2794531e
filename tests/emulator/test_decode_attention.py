"""Attention of a few queries by split keys, and the decode step: the kernels' own source on the CPU, compared with the reference."""

import shutil
import sys

import ml_dtypes
import numpy as np
import pytest

from tests.decoding import Decoding
from tests.emulator import cupy_on_cpu
from tests.emulator.planted_bugs import assert_caught
from tests.emulator.test_backend_on_cpu import check as check_backend
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
    "an offset before the end": (Problem(2, 1, 3, 400, 80, UniSparseConfig(64), q_offset=200), np.float16, None),
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


def test_a_call_with_few_queries_takes_these_kernels():
    launched = check_backend(Problem(4, 2, 1, 300, 64, UniSparseConfig(64, top_p=0.5)), "90")
    assert launched == ["compress", "score_tiles", "merge_scores", "decode_attention"]


@pytest.mark.parametrize("dense", [True, False])
def test_a_large_batch_of_single_queries_takes_as_many_items_at_once_as_the_device_has_room_for(dense):
    """Four groups of rows on the stand-in's two multiprocessors: two items of two KV heads."""
    problem = Problem(4, 2, 1, 150, 64, UniSparseConfig(64, top_p=0.5))
    items = [random_arrays(problem, np.float16, seed) for seed in range(5)]
    with cupy_on_cpu.installed("90") as backend:
        q, k, v = (sys.modules["cupy"].stack([item[n] for item in items]) for n in range(3))
        cupy_on_cpu.Kernel.launched.clear()
        out, lse, traces = backend.run_batch(q, k, v, problem, dense=dense, keep_scores=False)
        assert cupy_on_cpu.Kernel.launched.count("decode_attention") == 3
        assert out.shape == q.shape and lse.shape == (5, 4, 1) and len(traces) == 5
        for n, item in enumerate(items):
            run = backend.run_dense if dense else backend.run_sparse
            alone, trace = run(*map(sys.modules["cupy"].asarray, item), problem)
            np.testing.assert_allclose(out[n].astype(np.float32), alone.astype(np.float32), atol=2e-3)
            np.testing.assert_allclose(lse[n], trace.lse, atol=1e-3)
            assert dense or (traces[n].mask == trace.mask).all()


STEPS = {
    "dense": (Decoding("dense", 4, 2, 64, 300, BFLOAT16), (100, 101, 150, 299)),
    "dense from the first token": (Decoding("dense", 8, 1, 64, 100, np.float16), (0, 1, 17)),
    "default, blocks of 64": (Decoding(UniSparseConfig(64, top_p=0.6), 4, 2, 64, 512, BFLOAT16), (255, 256, 300, 447)),
    "from the first token": (
        Decoding(UniSparseConfig(64, 8, 8, 2, top_p=0.5, key_anchors=3), 2, 1, 64, 200, np.float16), (0, 1, 9, 64, 70),
    ),
    "heads of two groups together": (
        Decoding(UniSparseConfig(64, 8, 4, 4, top_p=0.4, key_anchors=0), 4, 2, 64, 400, np.float16), (131, 399),
    ),
    "row threshold, wide group": (
        Decoding(UniSparseConfig(64, 2, 4, 1, None, 0.05, 1, 0, 0), 12, 1, 64, 700, np.float16), (600, 699),
    ),
    "Top-P with composites of its own": (
        Decoding(UniSparseConfig(64, 4, 2, 1, 0.5, 0.4, 1, 0, 0, top_p_compress=8), 4, 2, 64, 512, BFLOAT16), (255, 256, 301, 448),
    ),
    "such composites, in a block of four keys": (
        Decoding(UniSparseConfig(64, 16, 16, 2, 0.5, 0.3, top_p_compress=32), 4, 2, 64, 512, np.float16), (3, 130, 335),
    ),
    "such composites of a whole tile": (
        Decoding(UniSparseConfig(64, 1, 1, 1, 0.3, 0.05, top_p_compress=16), 2, 1, 64, 300, BFLOAT16), (90, 255),
    ),
    "both rules, blocks of 128": (Decoding(UniSparseConfig(128, 8, 32, 1, 0.3, 0.2, 2), 3, 1, 64, 900, BFLOAT16), (801, 895, 896)),
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_decode_steps(name):
    decoding, positions = STEPS[name]
    with cupy_on_cpu.installed("90"):
        decoding.check(sys.modules["cupy"], positions)


@pytest.mark.parametrize(("q_heads", "kv_heads", "head_compress", "key_anchors"), [(2, 2, 2, 2), (20, 1, 1, 3)])
def test_keys_pooled_one_by_one_are_those_of_the_whole(q_heads, kv_heads, head_compress, key_anchors):
    """Composites and anchors to the bit, past the ends of composites and blocks; also where a KV head has more rows than one group."""
    config = UniSparseConfig(64, 8, 8, head_compress, top_p=0.5, key_anchors=key_anchors)
    decoding = Decoding(config, q_heads, kv_heads, 64, 200, BFLOAT16, seed=3)
    with cupy_on_cpu.installed("90") as backend:
        _, _, (kc, anchors) = decoding.run(sys.modules["cupy"], range(118, 132))[-1]
        running = backend.RunningKeySummary(config, q_heads, kv_heads, 64, 200, BFLOAT16)
        running.extend(sys.modules["cupy"].asarray(decoding.k[:, :132]))
        whole = running.summary()
        np.testing.assert_array_equal(kc[:, : whole.kc.shape[1]].view(np.uint16), np.asarray(whole.kc).view(np.uint16))
        np.testing.assert_array_equal(anchors[:, : whole.anchors.shape[1]], whole.anchors)


def test_steps_are_the_same_to_the_bit_in_every_run():
    decoding, positions = STEPS["default, blocks of 64"]
    with cupy_on_cpu.installed("90"):
        first = decoding.run(sys.modules["cupy"], positions)
        cupy_on_cpu.Kernel.seed = 1
        second = decoding.run(sys.modules["cupy"], positions, poison=False)
    for (out, mask, _), (again, mask_again, _) in zip(first, second, strict=True):
        np.testing.assert_array_equal(out.view(np.uint16), again.view(np.uint16))
        np.testing.assert_array_equal(mask, mask_again)


def test_equal_blocks_are_kept_in_index_order():
    """Past the first word of the mask: keys that are all the same tie everywhere."""
    decoding = Decoding(
        UniSparseConfig(64, 8, 32, top_p=0.875, key_anchors=0, sink_blocks=0, local_blocks=0), 1, 1, 64, 40 * 64, np.float16
    )
    decoding.k[...] = 1
    with cupy_on_cpu.installed("90"):
        ((_, mask, _),) = decoding.run(sys.modules["cupy"], [40 * 64 - 1])
    np.testing.assert_array_equal(mask[0, 0], [*[True] * 35, *[False] * 4, True])  # the diagonal is always kept


@pytest.mark.parametrize("dense", [True, False])
def test_poison_a_query_may_not_see_does_not_reach_it(dense):
    """Later keys for queries before them, and whole blocks that only the other heads of the group selected."""
    problem = Problem(2, 1, 4, 300, 64, UniSparseConfig(64, key_anchors=0))
    q, k, v = random_arrays(problem, np.float16, 5)
    mask = None
    k[:, 298:], v[:, 298:] = np.nan, np.nan
    if not dense:
        mask = np.ones((2, 1, 5), bool)
        mask[0, 0, 2] = mask[:, 0, 1] = False
        k[:, 64:192], v[:, 64:192] = np.nan, np.nan
    out, _ = attend_few(q, k, v, mask, problem)
    broken = np.isnan(out.astype(np.float32))
    expected = np.zeros((2, 4), bool)
    expected[:, 2:] = True
    if not dense:
        expected[1] = True
    np.testing.assert_array_equal(broken.all(axis=-1), expected)
    np.testing.assert_array_equal(broken.any(axis=-1), expected)


PLANTED = {
    "a key too many is visible": ("decode_attention.cu", "position[k] <= last[n][e]", "position[k] <= last[n][e] + 1"),
    "another head's blocks": ("decode_work.cuh", "TILE + lane, (uint32_t)entry.y}", "TILE + lane, 0xffffffffu}"),
    "anchors of selected blocks": ("decode_work.cuh", "key.rows = ~mask.rows_that_selected", "key.rows = mask.rows_that_selected"),
    "a split is left out": (
        "decode_merge.cuh",
        "i = warp; i < count; i += WARPS) {\n      const float4*",
        "i = warp + 1; i < count; i += WARPS) {\n      const float4*",
    ),
    "an old maximum": ("decode_attention.cu", "        max[n][e] = highest;\n", ""),
    "values of other keys": ("few_rows.cuh", "high_halves(r0, r1), low_halves(r2, r3)", "high_halves(r0, r1), low_halves(r3, r2)"),
    "the newest key is not pooled": ("decode_select.cu", "    pool_newest({", "    if (false) pool_newest({"),
    "an anchor of larger norm": ("decode_select.cu", "mine, i)) <= norm", "mine, i)) >= norm"),
    "the open block is not scored": ("decode_select.cu", "stop = opens ? composites : closed", "stop = opens ? closed : closed"),
    "a cell of other composites": (
        "decode_cells.cuh", "float sum = exp2_fast(logits[2 * k + e] - base)", "float sum = exp2_fast(logits[e] - base)",
    ),
    "a threshold too high": ("decode_cut.cuh", "t += found[0] << shift", "t += (found[0] + 1) << shift"),
    "ties of earlier words": ("decode_select.cu", "before += ties[i]", "before += 0"),
    "coarse keys of the wrong size": ("decode_cells.cuh", "z[2 * k + e] = sum[k] / tokens[k]", "z[2 * k + e] = sum[k]"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name, tmp_path):
    checks = (
        "from tests.emulator import test_decode_attention as tests\n"
        "for name in ('default, blocks of 64', 'from the first token', 'Top-P with composites of its own'):\n"
        "    tests.test_decode_steps(name)\n"
        "tests.test_a_few_queries('two groups of rows')\n"
        "tests.test_keys_pooled_one_by_one_are_those_of_the_whole(2, 2, 2, 2)\n"
        "tests.test_equal_blocks_are_kept_in_index_order()\n"
    )
    assert_caught(PLANTED[name], checks, tmp_path)
