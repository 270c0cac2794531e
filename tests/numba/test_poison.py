"""What a query must not look at: NaN in its future, in padding and in a key's neighbours leaves mask and output as they are."""

from dataclasses import replace

import numpy as np
import pytest

from tests.numba.test_stages import random_qkv
from unisparse_np import InvalidInput, Problem, UniSparseConfig, reference, unisparse_attention
from unisparse_np.gpu import numba_kernels

CONFIG = UniSparseConfig(block_size=8, q_compress=2, k_compress=4, top_p=0.6, row_threshold=0.2)


@pytest.mark.parametrize("top_p_compress", [None, 8])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_selection_reads_no_further_than_the_composite_of_the_last_position(poison, top_p_compress):
    config = replace(CONFIG, top_p_compress=top_p_compress)
    q_len, q_offset, k_len = 13, 16, 48
    q, k, v = random_qkv(2, 1, q_len, k_len, 4)
    clean, trace = unisparse_attention(q, k, v, config, q_offset=q_offset, backend="numba", return_trace=True)
    width = top_p_compress or config.k_compress
    end = -(-(q_offset + q_len) // width) * width
    k[:, end:], v[:, q_offset + q_len :] = poison, poison
    out, poisoned_trace = unisparse_attention(q, k, v, config, q_offset=q_offset, backend="numba", return_trace=True)
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(poisoned_trace.mask, trace.mask)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # infinity minus infinity, in the simulator
@pytest.mark.parametrize("position", [0, 7, 12, 22])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_with_the_mask_given_keys_and_values_after_a_position_do_not_reach_it(position, poison):
    q, k, v = random_qkv(2, 1, 24, 24, 4)
    problem = Problem(2, 1, 24, 24, 4, CONFIG)
    mask = np.random.default_rng(1).random((2, 3, 3)) < 0.5
    mask |= np.eye(3, dtype=bool)
    summary = reference.run.summarise_keys(k, problem)  # anchors as they are without poison: the mask fixes what is seen
    clean, clean_lse = numba_kernels.sparse_attention(q, k, v, mask, problem, summary)
    k[:, position + 1 :], v[:, position + 1 :] = poison, poison
    out, lse = numba_kernels.sparse_attention(q, k, v, mask, problem, summary)
    np.testing.assert_array_equal(out[:, : position + 1], clean[:, : position + 1])
    np.testing.assert_array_equal(lse[:, : position + 1], clean_lse[:, : position + 1])
    assert not np.isfinite(out[:, position + 1 :]).all(), "the poison is visible to later queries and must not be hidden from them"


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_would_be_read_must_be_finite(name):
    arrays = dict(zip("qkv", random_qkv(2, 2, 16, 16, 4), strict=True))
    arrays[name][1, 9, 3] = np.nan
    with pytest.raises(InvalidInput, match=rf"{name} holds nan at \[1, 9, 3\]"):
        unisparse_attention(**arrays, config=CONFIG, backend="numba")


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_huge_logits_stay_finite(logit):
    q, k, v = random_qkv(1, 1, 16, 16, 4)
    q[:, 10] = np.sign(logit) * np.sqrt(abs(logit))
    k[:, 5] = np.sqrt(abs(logit))
    out, lse = unisparse_attention(q, k, v, CONFIG, scale=1.0, backend="numba", return_lse=True)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_a_query_with_nothing_to_attend_has_out_0_and_lse_minus_infinity():
    q, k, v = random_qkv(1, 1, 8, 16, 4)
    config = UniSparseConfig(block_size=8, q_compress=8, k_compress=8, key_anchors=0)
    mask = np.zeros((1, 1, 2), bool)
    out, lse = numba_kernels.sparse_attention(q, k, v, mask, Problem(1, 1, 8, 16, 4, config, causal=False))
    assert (out == 0).all() and (lse == -np.inf).all()
