"""The plain kernels (float32, small head dims and blocks, any scale), run on the CPU by the emulator, against the reference."""

import shutil
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from tests import golden
from tests.emulator import cupy_on_cpu
from tests.emulator.planted_bugs import assert_caught
from tests.emulator.test_backend_on_cpu import check, inputs
from unisparse_np import InvalidInput, Problem, UniSparseConfig, audit, reference

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

PLAIN = {"pool_plain", "find_anchors_plain", "score_plain", "select_blocks", "attend_plain"}
# Pooled heads and a share for each; a chunk; two anchors; a head_dim that is no multiple of 4.
SMALL = Problem(4, 2, 21, 45, 18, UniSparseConfig(16, 4, 4, 2, top_p=(0.3, 0.8), key_anchors=2, sink_blocks=0, local_blocks=0))
NOT_CAUSAL = Problem(2, 1, 20, 70, 18, UniSparseConfig(12, 3, 4, top_p=0.2, row_threshold=0.2, key_anchors=3, sink_blocks=0), causal=False)
WHOLE_BLOCKS = replace(NOT_CAUSAL, k_len=72)
WHOLE_TILES = Problem(1, 1, 130, 150, 64, UniSparseConfig(128, 8, 8, top_p=0.6))
WIDE = Problem(1, 1, 60, 100, 160, UniSparseConfig(32, 1, 32, top_p=None, row_threshold=0.2))
ODD_BLOCKS = Problem(4, 2, 300, 300, 20, UniSparseConfig(100, 1, 1, 4, top_p=0.5))  # tiles that end inside a block, key blocks of two tiles
TWO_SIZES = Problem(
    4, 2, 21, 45, 18, UniSparseConfig(12, 3, 2, 2, top_p=0.3, row_threshold=0.2, top_p_compress=6)
)  # each rule reads its own
SMALLER_THAN_ANCHORS = Problem(2, 1, 40, 300, 18, UniSparseConfig(4, 2, 2, top_p=0.3, key_anchors=8, sink_blocks=0, local_blocks=0))
NEGATIVE = Problem(1, 1, 60, 100, 64, UniSparseConfig(64, 8, 8, top_p=0.5), scale=-0.1)


def test_small_blocks_with_a_share_a_head():
    assert set(check(SMALL, "90", np.float32)) == PLAIN


@pytest.mark.parametrize("problem", [NOT_CAUSAL, WHOLE_BLOCKS], ids=["ragged", "whole blocks"])
def test_not_causal(problem):
    check(problem, "80", np.float32, seed=1)


def test_composites_of_its_own_for_top_p():
    assert "coarsen_plain" in check(TWO_SIZES, "90", np.float32, seed=6)


def test_whole_tiles():
    check(WHOLE_TILES, "90", np.float32, seed=2)


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_with_fewer_keys_than_anchors_are_allowed(causal):
    check(replace(SMALLER_THAN_ANCHORS, causal=causal, q_offset=None), "90", np.float32, seed=7)


def test_sixteen_bit_input_of_other_shapes():
    assert "attend_plain" in check(SMALL, "90", ml_dtypes.bfloat16, seed=3)


def test_the_dispatch_is_said():
    with cupy_on_cpu.installed("90") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in inputs(SMALL, np.float32))
        assert backend.run_sparse(q, k, v, SMALL)[1].kernel == "attend_plain d18 S16 float32"
        assert backend.run_dense(q, k, v, SMALL)[1].kernel == "attend_plain d18 S16 float32 dense"


def test_shared_memory_that_one_problem_asked_for_is_not_taken_back_by_another():
    with cupy_on_cpu.installed("90"):
        kernel = sys.modules["unisparse_np.gpu.cupy_kernels.device"].kernel
        first, second = (kernel("plain_scores.cu", "score_plain", size, HEAD_DIM=2, TILE_ROWS=16) for size in (60_000, 50_000))
        assert first.max_dynamic_shared_size_bytes == second.max_dynamic_shared_size_bytes == 60_000


def test_a_running_summary_is_the_summary_of_the_whole():
    q, k, v = inputs(SMALL, np.float32, seed=4)
    with cupy_on_cpu.installed("80") as backend:
        q, k, v = (sys.modules["cupy"].asarray(x) for x in (q, k, v))
        running = backend.RunningKeySummary(SMALL.config, 4, 2, 18, capacity=64, dtype=np.float32)
        for start, stop in ((0, 16), (16, 19), (19, 20), (20, 45)):
            running.extend(k[:, start:stop])
        kc, anchors = running.summary()
        np.testing.assert_array_equal(kc, backend.compress(q, k, SMALL)[1])
        np.testing.assert_array_equal(anchors, backend.find_anchors(k, 16, 2))
        np.testing.assert_array_equal(backend.run_sparse(q, k, v, SMALL, running.summary())[0], backend.run_sparse(q, k, v, SMALL)[0])


def test_what_a_row_may_not_see_does_not_reach_it():
    """NaN keys and values behind a position: rows up to it are the same to the bit, their own blocks being selected."""
    q, k, v = inputs(SMALL, np.float32, seed=5)
    with cupy_on_cpu.installed("80") as backend:
        asarray = sys.modules["cupy"].asarray
        mask = asarray(np.array([[0, 1, 1], [0, 0, 1]], bool)[None].repeat(4, axis=0))
        clean = np.asarray(backend.sparse_attention(asarray(q), asarray(k), asarray(v), mask, SMALL)[0])
        row = 9  # in the middle of a query block and of a key block
        for x in (k, v):
            x[:, SMALL.q_offset + row + 1 :] = np.nan
        found = np.asarray(backend.sparse_attention(asarray(q), asarray(k), asarray(v), mask, SMALL)[0])
    np.testing.assert_array_equal(found[:, : row + 1], clean[:, : row + 1])
    assert np.isnan(found[:, row + 1 :]).all()


def test_a_long_row_of_scores_leaves_room_for_fewer_rows_at_a_time():
    problem = Problem(1, 1, 3, 20000, 2, UniSparseConfig(2, 1, 2, top_p=0.5, sink_blocks=0, local_blocks=0))
    mean = np.random.default_rng(0).random((1, 2, 10000)) * reference.select.visible_blocks(problem)
    mean = (mean / mean.sum(axis=-1, keepdims=True)).astype(np.float32)
    with cupy_on_cpu.installed("80") as backend:
        found = np.asarray(backend.select_blocks(sys.modules["cupy"].asarray(mean), None, problem))
        np.testing.assert_array_equal(found, reference.select_blocks(mean.astype(np.float64), None, problem))
        with pytest.raises(InvalidInput, match="25000 key blocks: the cupy backend takes up to 24576"):
            backend.select_blocks(mean, None, replace(problem, k_len=50000))


def test_a_block_that_is_not_selected_is_not_read():
    problem = Problem(1, 1, 20, 40, 18, UniSparseConfig(16, 4, 4, key_anchors=0), causal=False)
    q, k, v = inputs(problem, np.float32, seed=7)
    k[:, 16:32] = v[:, 16:32] = np.nan
    with cupy_on_cpu.installed("80") as backend:
        asarray = sys.modules["cupy"].asarray
        mask = asarray(np.array([[1, 0, 1], [0, 1, 0]], bool)[None])
        out = np.asarray(backend.sparse_attention(asarray(q), asarray(k), asarray(v), mask, problem)[0])
    assert np.isfinite(out[:, :16]).all() and np.isnan(out[:, 16:]).all()


def test_rows_with_nothing_to_attend():
    problem = Problem(1, 1, 20, 40, 18, UniSparseConfig(16, 4, 4, key_anchors=0), causal=False)
    q, k, v = inputs(problem, np.float32, seed=6)
    with cupy_on_cpu.installed("80") as backend:
        asarray = sys.modules["cupy"].asarray
        mask = np.zeros((1, 2, 3), bool)
        mask[0, 1, 2] = True
        out, lse = backend.sparse_attention(asarray(q), asarray(k), asarray(v), asarray(mask), problem)
        assert (np.asarray(out)[0, :16] == 0).all() and np.isneginf(np.asarray(lse)[0, :16]).all()
        assert np.isfinite(np.asarray(out)).all() and np.isfinite(np.asarray(lse)[0, 16:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "problem",
    [SMALL, NOT_CAUSAL, WHOLE_TILES, WIDE, ODD_BLOCKS, NEGATIVE, TWO_SIZES],
    ids=lambda p: f"S{p.config.block_size}_d{p.head_dim}",
)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_more_problems_and_seeds(problem, dtype, seed):
    check(problem, "90", dtype, seed=seed + 10)


@pytest.mark.slow
@pytest.mark.parametrize("path", golden.FILES, ids=lambda path: path.stem)
def test_golden_vectors(path):
    """Every stage in float32, of which the inputs are exact."""
    case = golden.load(path)
    problem = case.problem
    with cupy_on_cpu.installed("90"):
        qkv = (x.astype(np.float32) for x in (case.q, case.k, case.v))
        report = audit(*qkv, problem.config, backend="cupy", causal=problem.causal, q_offset=problem.q_offset)
    assert report.ok, str(report)


PLANTED = {
    "a key too many is visible": ("plain_attend.cu", "position > last_visible_key(", "position > 1 + last_visible_key("),
    "places without a key count": ("plain_attend.cu", "    hidden = hidden || filled < KEYS;\n", ""),
    "values are read before they are there": ("plain_attend.cu", "    __syncthreads();\n    if (hidden) add", "    if (hidden) add"),
    "an old maximum": ("plain_attend.cu", "      total[m] *= shrink;\n", ""),
    "anchors of the block before": (
        "plain_attend.cu",
        "anchors[block * shape.key_anchors + mine]",
        "anchors[max(0, block - 1) * shape.key_anchors + mine]",
    ),
    "a composite key too many": ("plain_scores.cu", ">= limit", "> limit"),
    "a large key block forgets its first tile": ("plain_scores.cu", "key > begin ? block_sums[pair] : 0.f", "0.f"),
    "a composite over tokens that are not there": ("plain_compress.cu", "min(length, start + width) - start", "width"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name, tmp_path):
    checks = (
        "import numpy\n"
        "from tests.emulator import test_plain_on_cpu as tests\n"
        "for seed in range(2):\n"
        "    for problem in (tests.SMALL, tests.NOT_CAUSAL, tests.WHOLE_BLOCKS, tests.ODD_BLOCKS):\n"
        "        tests.check(problem, '90', numpy.float32, seed=seed)\n"
    )
    assert_caught(PLANTED[name], checks, tmp_path)
