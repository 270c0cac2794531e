"""The CuPy backend's own kernels and wrappers, run on the CPU by the emulator and compared with the reference.

Few and small problems here, each made to hit what could go wrong; -m slow has more seeds, and bugs planted in the sources.
"""

import functools
import shutil
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from tests.emulator.planted_bugs import assert_caught
from unisparse_np import Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.comparison import TOLERANCES, compare_anchors, compare_masks, compare_outputs, compare_scores
from unisparse_np.problem import KeySummary

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

CAUSAL_64 = Problem(2, 1, 70, 230, 64, UniSparseConfig(64, 4, 4, 2, top_p=0.3, sink_blocks=0, local_blocks=0), q_offset=130)
NOT_CAUSAL_128 = Problem(1, 1, 140, 290, 64, UniSparseConfig(top_p=0.2, key_anchors=2, sink_blocks=0), causal=False)
WIDE_128 = Problem(1, 1, 130, 140, 128, UniSparseConfig(top_p=0.6))
HALF_BLOCKS_256 = Problem(1, 1, 270, 520, 64, UniSparseConfig(256, 16, 16, top_p=0.3, sink_blocks=0, local_blocks=0))
SMALL_BLOCKS = Problem(2, 1, 300, 1000, 64, UniSparseConfig(128, 32, 32, top_p=0.5, row_threshold=0.1))  # 4 composites each
# The first 64 composite queries of a block see one tile of 128 composite keys, the others two.
SPLIT_TILES = Problem(1, 1, 256, 1200, 64, UniSparseConfig(256, 2, 8, top_p=0.5, row_threshold=0.05), q_offset=870)
# Each rule of step 4 reads composites of its own; the ends of q and k fall inside a coarse and a fine one.
TWO_SIZES = Problem(
    2,
    1,
    69,
    235,
    64,
    UniSparseConfig(64, 4, 2, top_p=0.3, row_threshold=0.1, sink_blocks=0, local_blocks=0, top_p_compress=8),
    q_offset=131,
)


def inputs(problem, dtype, seed=0):
    rng = np.random.default_rng(seed)
    q = 2 * rng.standard_normal((problem.num_q_heads, problem.q_len, problem.head_dim))
    k, v = (rng.standard_normal((problem.num_kv_heads, problem.k_len, problem.head_dim)) for _ in range(2))
    return tuple(x.astype(dtype) for x in (q, k, v))


def run(problem, capability, dtype=np.float16, seed=0):
    """The fused call -> its results as NumPy, and the kernels that ran."""
    cupy_on_cpu.Kernel.seed = seed
    cupy_on_cpu.Kernel.launched.clear()
    q, k, v = inputs(problem, dtype, seed)
    with cupy_on_cpu.installed(capability) as backend:
        asarray = sys.modules["cupy"].asarray
        out, trace = backend.run_sparse(*(asarray(x) for x in (q, k, v)), problem, keep_scores=True)
        results = [None if x is None else np.asarray(x) for x in (out, trace.mean, trace.peak, trace.mask, trace.anchors, trace.lse)]
    return (q, k, v), results, list(cupy_on_cpu.Kernel.launched)


def check(problem, capability, dtype=np.float16, seed=0):
    """Every stage within the tolerance table; outputs on the mask that the backend chose."""
    qkv, (out, mean, peak, mask, anchors, lse), launched = run(problem, capability, dtype, seed)
    name = np.dtype(dtype).name
    tolerance = TOLERANCES[name]
    q, k, v = (x.astype(np.float64) for x in qkv)
    expected_mean, expected_peak = reference.score_blocks(*reference.compress(q, k, problem), problem)
    expected_mask = reference.select_blocks(expected_mean, expected_peak, problem)
    expected_out, expected_lse = reference.sparse_attention(q, k, v, mask, problem)
    config = problem.config
    reports = [
        compare_scores(mean * visible(problem), None if peak is None else peak * visible(problem), expected_mean, expected_peak, tolerance),
        compare_masks(mask, expected_mask, expected_mean, expected_peak, problem, tolerance.scores),
        compare_outputs(out, (q, k, v), expected_out, mask, problem, name),
    ]
    if config.key_anchors:
        reports.append(compare_anchors(anchors, reference.find_anchors(k, config.block_size, config.key_anchors), k, tolerance.norms))
    assert all(report.ok for report in reports), reports
    np.testing.assert_allclose(lse, expected_lse, atol=tolerance.scores)
    return launched


def visible(problem):
    return reference.select.visible_blocks(problem)


def test_hopper_blocks_of_64():
    launched = check(CAUSAL_64, "90", ml_dtypes.bfloat16)
    assert {"score_tiles", "merge_scores", "attend_sm90", "repair"} <= set(launched)


def test_hopper_not_causal_with_anchors():
    check(NOT_CAUSAL_128, "90", seed=1)


def test_hopper_blocks_of_4_composites():
    launched = check(SMALL_BLOCKS, "90", seed=2)
    assert "merge_scores" in launched and "select_blocks" not in launched  # the merger selects


def test_the_merger_selects_what_the_selection_of_its_own_selects():
    with cupy_on_cpu.installed("90") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in inputs(SMALL_BLOCKS, np.float16, seed=3))
        mean, peak = backend.score_blocks(*(x.astype(np.float16) for x in backend.compress(q, k, SMALL_BLOCKS)), SMALL_BLOCKS)
        np.testing.assert_array_equal(backend.run_sparse(q, k, v, SMALL_BLOCKS)[1].mask, backend.select_blocks(mean, peak, SMALL_BLOCKS))


@pytest.mark.parametrize(("capability", "score"), [("80", "score_blocks"), ("90", "merge_scores")])
def test_composites_of_its_own_for_top_p(capability, score):
    launched = check(TWO_SIZES, capability, ml_dtypes.bfloat16)
    assert launched[:2] == ["compress", "coarsen"] and launched.count(score) == 2


def test_composites_of_its_own_for_top_p_in_blocks_of_few():
    check(
        replace(TWO_SIZES, config=replace(TWO_SIZES.config, q_compress=8, k_compress=16, top_p_compress=32, head_compress=2)), "80", seed=4
    )


def test_chunks_have_the_masks_of_the_whole():
    problem = replace(TWO_SIZES, q_len=200, k_len=200, q_offset=None)
    q, k, v = inputs(problem, np.float16, seed=5)
    with cupy_on_cpu.installed("90") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in (q, k, v))
        whole = backend.run_sparse(q, k, v, problem)[1].mask
        running = backend.RunningKeySummary(problem.config, 2, 1, 64, capacity=200)
        for start, stop in ((0, 128), (128, 200)):
            running.extend(k[:, start:stop])
            part = replace(problem, q_len=stop - start, k_len=stop, q_offset=start)
            mask = backend.run_sparse(q[:, start:stop], k[:, :stop], v[:, :stop], part, running.summary())[1].mask
            np.testing.assert_array_equal(mask, whole[:, start // 64 : -(-stop // 64), : mask.shape[2]])


def test_portable_blocks_of_64():
    assert {"score_blocks", "attend_sm80"} <= set(check(CAUSAL_64, "80", ml_dtypes.bfloat16))


def test_portable_other_head_dim():
    problem = Problem(1, 1, 40, 100, 80, UniSparseConfig(64, 8, 8, top_p=0.5))
    assert "attend_sm80" in check(problem, "90")


@pytest.mark.parametrize("head_dim", [96, 256])  # 96 fills one and a half panels of 64 columns
def test_hopper_other_head_dims(head_dim):
    problem = Problem(2, 1, 70, 200, head_dim, UniSparseConfig(128, 8, 8, 1, top_p=0.3, key_anchors=1))
    assert "attend_sm90" in check(problem, "90")


def test_running_key_summary_is_the_summary_of_the_whole():
    problem = Problem(2, 2, 40, 200, 64, UniSparseConfig(64, 8, 8, 2, top_p=0.3, key_anchors=2))
    q, k, v = inputs(problem, np.float16, seed=6)
    with cupy_on_cpu.installed("80") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in (q, k, v))
        running = backend.RunningKeySummary(problem.config, 2, 2, 64, capacity=256)
        for start, stop in ((0, 64), (64, 70), (70, 71), (71, 200)):
            running.extend(k[:, start:stop])
        kc, anchors = running.summary()
        np.testing.assert_array_equal(kc, backend.as_composites(backend.compress(q, k, problem)[1], problem, q.dtype))
        np.testing.assert_array_equal(anchors, backend.find_anchors(k, 64, 2))
        cached, _ = backend.run_sparse(q, k, v, problem, running.summary())
        whole, _ = backend.run_sparse(q, k, v, problem)
        np.testing.assert_array_equal(cached, whole)


@pytest.mark.parametrize(
    ("config", "capability"),
    [(UniSparseConfig(64, 8, 8, 2, top_p=0.3), "80"), (TWO_SIZES.config, "90")],
    ids=["one size, portable", "two sizes, hopper"],
)
def test_a_summary_of_any_kind_and_strides(config, capability):
    """NumPy's arrays, 64-bit positions, float16 composites whose rows are not side by side."""
    problem = Problem(4, 2, 20, 150, 64, config)
    q, k, v = inputs(problem, np.float16, seed=8)
    with cupy_on_cpu.installed(capability) as backend:
        qc, kc = backend.compress(*map(sys.modules["cupy"].asarray, (q, k)), problem)
        half = kc.astype(np.float16)
        by_token = sys.modules["cupy"].ascontiguousarray(half.transpose(1, 0, 2)).transpose(1, 0, 2)
        anchors = np.asarray(backend.find_anchors(sys.modules["cupy"].asarray(k), 64, 1))
        for expected, found in zip(*(backend.score_blocks(qc.astype(np.float16), x, problem) for x in (half, by_token)), strict=True):
            np.testing.assert_array_equal(found, expected)
        call = functools.partial(unisparse_attention, q, k, v, config, backend="cupy")
        for composites, positions in ((half, anchors), (np.array(half), anchors.astype(np.int64)), (by_token, anchors)):
            np.testing.assert_array_equal(call(key_summary=KeySummary(composites, positions)), call())


def test_composites_pooled_elsewhere_are_taken_as_they_are():
    problem = Problem(2, 2, 64, 200, 64, UniSparseConfig(64, 8, 8, top_p=0.3))
    q, k, v = inputs(problem, np.float16, seed=6)
    with cupy_on_cpu.installed("80") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in (q, k, v))
        running = backend.RunningKeySummary(problem.config, 2, 2, 64, capacity=256)
        running.extend(k)
        qc = backend.compress(q, k, problem)[0].astype(np.float16)
        cupy_on_cpu.Kernel.launched.clear()
        given, trace = backend.run_sparse(q, k, v, problem, running.summary(), q_composites=qc)
        assert "compress" not in cupy_on_cpu.Kernel.launched
        pooled, expected = backend.run_sparse(q, k, v, problem)
        np.testing.assert_array_equal(given, pooled)
        np.testing.assert_array_equal(trace.mask, expected.mask)


@pytest.mark.parametrize(("capability", "q_len", "broken"), [("80", 17, np.nan), ("90", 17, np.inf), ("90", 3, np.nan)])
def test_a_row_that_sees_one_number_that_is_not_finite_is_nan_as_a_whole(capability, q_len, broken):
    """The other numbers of such a row are not left half summed."""
    problem = Problem(2, 1, q_len, 100, 64, UniSparseConfig(64, 8, 8, top_p=1.0))
    q, k, v = inputs(problem, np.float16)
    last = problem.q_offset + q_len - 1
    v[:, last, 5] = broken  # the last query alone may see it
    with cupy_on_cpu.installed(capability) as backend:
        out = np.asarray(backend.run_sparse(*map(sys.modules["cupy"].asarray, (q, k, v)), problem)[0])
    assert np.isnan(out[:, -1]).all() and np.isfinite(out[:, :-1]).all()


@pytest.mark.parametrize("in_one_piece", [True, False])
def test_a_batch_is_its_items(in_one_piece):
    config = UniSparseConfig(64, 8, 8, 2, top_p=(0.3, 0.8), key_anchors=2)
    problem = Problem(4, 2, 100, 200, 64, config)
    items = [inputs(problem, np.float16, seed) for seed in (1, 2)]
    with cupy_on_cpu.installed("80") as backend:
        q, k, v = (sys.modules["cupy"].stack([item[n] for item in items]) for n in range(3))
        if not in_one_piece:
            k = sys.modules["cupy"].stack([items[0][1], items[0][1], items[1][1]])[::2]
        cupy_on_cpu.Kernel.launched.clear()
        out, lse, traces = backend.run_batch(q, k, v, problem, dense=False, keep_scores=True)
        assert cupy_on_cpu.Kernel.launched.count("compress") == (1 if in_one_piece else 2)
        for n in range(2):
            alone, trace = backend.run_sparse(q[n], k[n], v[n], problem, keep_scores=True)
            np.testing.assert_array_equal(out[n], alone)
            np.testing.assert_array_equal(lse[n], trace.lse)
            for name in ("mask", "anchors", "qc", "kc", "mean", "lse"):
                np.testing.assert_array_equal(getattr(traces[n], name), getattr(trace, name))
            assert (traces[n].kept_blocks, traces[n].visible_blocks) == (trace.kept_blocks, trace.visible_blocks)
        out, _, traces = backend.run_batch(q, k, v, problem, dense=True, keep_scores=False)
        for n in range(2):
            alone, trace = backend.run_dense(q[n], k[n], v[n], problem)
            np.testing.assert_array_equal(out[n], alone)
            assert traces[n].density == trace.density == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("capability", ["80", "90"])
@pytest.mark.parametrize(
    "problem",
    [CAUSAL_64, NOT_CAUSAL_128, WIDE_128, HALF_BLOCKS_256, SPLIT_TILES, TWO_SIZES],
    ids=lambda p: f"S{p.config.block_size}_d{p.head_dim}_ck{p.config.k_compress}",
)
def test_more_problems_and_seeds(problem, capability, seed):
    check(problem, capability, seed=seed + 10)


PLANTED = {
    "a key too many is visible": ("mask.cuh", "if (8 * j > d0) s[4 * j]", "if (8 * j > d0 + 1) s[4 * j]"),
    "values are not waited for": (
        "attend_sm90.cu",
        "      barrier_wait(V_FULL(v.stage), v.parity);\n      pin(o);",
        "      pin(o);",
    ),
    "keys are freed too early": ("attend_sm90.cu", "      wgmma_wait<1>();\n      pin(s);\n", "      pin(s);\n"),
    "the wrong parity after a ring's end": ("attend_sm90_layout.cuh", "stage = 0; parity ^= 1;", "stage = 0;"),
    "an old maximum": ("attend_sm90_tile.cuh", "    max0 = x0;\n", ""),
    "a part that holds nothing is seen": ("attend_sm90_producer.cuh", "    if (lane >= filled && lane < PARTS) part = NO_KEYS;\n", ""),
    "anchors of selected blocks": ("attend_sm90_producer.cuh", " & ~word_of(under_way, w)", ""),
    "a coarse composite takes all for full": ("compress.cu", "const float tokens = min(held, stop - start)", "const float tokens = held"),
    "sums of 32 keys go to other lanes": ("scores_sm90.cu", "sum_pair(half, fours, 2, t & 2)", "sum_pair(half, fours, 2, t & 1)"),
    "a tile nobody wrote": ("scores_sm90_merge.cuh", "min(exist, rows + 16) - 1", "exist - 1"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name, tmp_path):
    checks = (
        "from tests.emulator import test_backend_on_cpu as tests\n"
        "for seed in range(3):\n"
        "    for problem in (tests.CAUSAL_64, tests.NOT_CAUSAL_128, tests.SPLIT_TILES, tests.TWO_SIZES):\n"
        "        tests.check(problem, '90', seed=seed)\n"
    )
    assert_caught(PLANTED[name], checks, tmp_path)


PLANTED_IN_PORTABLE = {
    "an output that an old maximum scaled": ("          o[m][i][2 * r] *= scale[m][r];\n", ""),
    "a sum that an old maximum scaled": ("        sum[m][r] *= scale[m][r];\n", ""),
    "keys of the future are seen": (
        "tile + BN - 1 > last_visible_key(shape, item.first_row)",
        "tile > last_visible_key(shape, item.first_row)",
    ),
    "weights against the maximum of another row": ("-from[m][i % 2])), b =", "-from[m][0])), b ="),
    "values are not waited for": ("    copy_wait<0>();\n    __syncthreads();  // the values", "    __syncthreads();  // the values"),
}
PORTABLE_CHECKS = """
from tests.emulator import test_backend_on_cpu as tests
repair = cupy_on_cpu.Kernel.folder / "repair.cu"  # it mends rows with NaN, which is what memory holds until a copy arrives
repair.write_text(repair.read_text().replace("rows = 16 * broken[0];", "rows = 0;"))
for seed in range(3):
    for problem in (tests.CAUSAL_64, tests.NOT_CAUSAL_128, tests.HALF_BLOCKS_256):
        tests.check(problem, "80", seed=seed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED_IN_PORTABLE)
def test_a_bug_planted_in_the_portable_kernel_is_caught(name, tmp_path):
    assert_caught(("attend_sm80.cu", *PLANTED_IN_PORTABLE[name]), PORTABLE_CHECKS, tmp_path)


@pytest.mark.slow
def test_the_portable_kernel_without_a_bug_needs_no_repair(tmp_path):
    with pytest.raises(AssertionError, match="the bug went unseen"):
        assert_caught(("attend_sm80.cu", "// Step 6 on sm_80", "// Step 6, on sm_80"), PORTABLE_CHECKS, tmp_path)
