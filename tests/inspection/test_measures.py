"""Ranks, true attention and what a layer keeps of it, against the plain formulas on whole matrices."""

from dataclasses import replace

import numpy as np
import pytest

from unisparse_np import UniSparseConfig, reference, unisparse_attention
from unisparse_np.inspection.layer_statistics import SparseAttentionMeter
from unisparse_np.inspection.rank_correlation import ranks, spearman
from unisparse_np.inspection.true_attention import attention_weights, mass_per_block
from unisparse_np.problem import Problem

CONFIG = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6, key_anchors=1)
BARE = replace(CONFIG, key_anchors=0, sink_blocks=0, local_blocks=0, head_compress=2)
HEADS, KV_HEADS, TOKENS, DIM = 4, 2, 90, 8  # a ragged last block


def test_ranks_share_the_mean_place_on_ties() -> None:
    np.testing.assert_array_equal(ranks(np.array([30.0, 10.0, 20.0, 10.0])), [4, 1.5, 3, 1.5])


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [([1, 2, 3, 4], [10, 20, 30, 40], 1.0), ([1, 2, 3], [9, 5, 1], -1.0), ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
     ([1, 1, 2], [1, 2, 3], 0.75**0.5)],
)  # fmt: skip
def test_spearman_of_known_lists(a: list, b: list, expected: float) -> None:
    assert spearman(np.array(a), np.array(b)) == pytest.approx(expected)


def test_spearman_of_a_constant_is_no_number() -> None:
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


@pytest.fixture(scope="module")
def qkv() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    q, k, v = (draw.standard_normal((heads, TOKENS, DIM)) * 2 for heads in (HEADS, KV_HEADS, KV_HEADS))
    return q, k, v


def whole_matrix(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Dense attention's weights [Hq, L, L] all at once."""
    logits = np.einsum("hqd,hkd->hqk", q, np.repeat(k, HEADS // KV_HEADS, axis=0)) / np.sqrt(DIM)
    logits[:, np.triu(np.ones((TOKENS, TOKENS), bool), 1)] = -np.inf
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("start", [0, 48])
def test_weights_of_a_query_block_are_rows_of_the_whole_matrix(qkv: tuple, start: int) -> None:
    q, k, _ = qkv
    problem = Problem(HEADS, KV_HEADS, TOKENS - start, TOKENS, DIM, CONFIG)
    expected = whole_matrix(q, k)
    for i in range(problem.num_q_blocks):
        rows = slice(start + problem.query_range(i)[0], start + problem.query_range(i)[1])
        weights = attention_weights(q[1, rows], k[0], i, problem, np)
        np.testing.assert_allclose(weights, expected[1, rows, : weights.shape[1]], atol=1e-12)
        mass = mass_per_block(weights, CONFIG.block_size, np)
        np.testing.assert_allclose(mass.sum(axis=1), 1)
        np.testing.assert_allclose(mass[:, 0], expected[1, rows, :16].sum(axis=1), atol=1e-12)


def measured(qkv: tuple, config: UniSparseConfig, chunks: list[tuple[int, int]]) -> list:
    """Every head's statistics, the prompt observed in chunks."""
    q, k, v = qkv
    meter = SparseAttentionMeter(reference, {0: [config]})
    for start, stop in chunks:
        out, trace = unisparse_attention(q[:, start:stop], k[:, :stop], v[:, :stop], "dense", return_trace=True)
        meter(0, q[:, start:stop], k[:, :stop], v[:, :stop], out, trace)
    return meter.statistics(0)


@pytest.mark.parametrize("config", [CONFIG, BARE])
def test_statistics_against_whole_matrices(qkv: tuple, config: UniSparseConfig) -> None:
    q, k, v = qkv
    true = whole_matrix(q, k)
    dense = np.einsum("hqk,hkd->hqd", true, np.repeat(v, HEADS // KV_HEADS, axis=0))
    sparse, trace = unisparse_attention(q, k, v, config, return_trace=True)
    block = np.arange(TOKENS) // 16
    for head, found in enumerate(measured(qkv, config, [(0, TOKENS)])):
        visible_key = np.repeat(trace.mask[head], 16, axis=1)[block][:, :TOKENS]  # [L, L]
        visible_key[:, trace.anchors[head // 2].ravel()[trace.anchors[head // 2].ravel() >= 0]] = True
        rows = (true[head] * visible_key).sum(axis=1)
        assert found.mass_kept == pytest.approx(rows.mean(), abs=1e-6)
        assert found.mass_kept_p1 == pytest.approx(np.percentile(rows, 1), abs=1e-6)
        assert found.output_error == pytest.approx(np.linalg.norm(sparse[head] - dense[head]) / np.linalg.norm(dense[head]), rel=1e-9)
        assert found.sink_mass == pytest.approx(true[head, 16:, :16].sum(axis=1).mean(), abs=1e-6)
        assert found.sink_mass_kept == pytest.approx((true[head] * visible_key)[16:, :16].sum(axis=1).mean(), abs=1e-6)
        assert -1 <= found.rank_correlation <= 1
    assert np.mean([head.density for head in measured(qkv, config, [(0, TOKENS)])]) == pytest.approx(trace.density)


def test_statistics_do_not_depend_on_chunks(qkv: tuple) -> None:
    whole, parts = measured(qkv, CONFIG, [(0, TOKENS)]), measured(qkv, CONFIG, [(0, 32), (32, 64), (64, TOKENS)])
    for a, b in zip(whole, parts, strict=True):
        assert a.__dict__ == pytest.approx(b.__dict__, abs=1e-6)


def test_compression_by_one_ranks_as_the_truth(qkv: tuple) -> None:
    config = UniSparseConfig(block_size=16, q_compress=1, k_compress=1)
    assert [head.rank_correlation for head in measured(qkv, config, [(0, TOKENS)])] == pytest.approx([1.0] * HEADS)


def test_keeping_everything_loses_nothing(qkv: tuple) -> None:
    for head in measured(qkv, UniSparseConfig(block_size=16, top_p=1.0), [(0, TOKENS)]):
        assert head.mass_kept_p1 == pytest.approx(1, abs=1e-6) and head.density == 1 and head.output_error < 1e-12
