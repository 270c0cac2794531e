"""What a query must not look at: NaN in its future, in padding and in neighbouring memory leaves mask and output as they are."""

import numpy as np
import pytest

from unisparse_np import InvalidInput, Problem, UniSparseConfig, reference, unisparse_attention

CONFIGS = {
    "default": UniSparseConfig(block_size=16, q_compress=4, k_compress=4),
    "paper": UniSparseConfig(block_size=16, q_compress=4, k_compress=8, top_p=0.6, key_anchors=0, sink_blocks=0, local_blocks=0),
    "row": UniSparseConfig(block_size=16, q_compress=2, k_compress=4, top_p=None, row_threshold=0.05, key_anchors=2),
    "coarse": UniSparseConfig(block_size=16, q_compress=4, k_compress=2, top_p=0.6, row_threshold=0.05, top_p_compress=16),
}


def random_qkv(q_len, k_len, dtype=np.float32):
    rng = np.random.default_rng(7)
    return (rng.standard_normal(shape).astype(dtype) for shape in ((4, q_len, 8), (2, k_len, 8), (2, k_len, 8)))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_selection_reads_no_further_than_the_composite_of_the_last_position(config, poison):
    """Poison only the keys after the composite key that holds the chunk's last position: mask and output stay."""
    q_len, q_offset, k_len = 40, 48, 160
    q, k, v = random_qkv(q_len, k_len)
    clean, trace = unisparse_attention(q, k, v, config, q_offset=q_offset, return_trace=True)
    width = config.top_p_compress or config.k_compress
    end = -(-(q_offset + q_len) // width) * width
    k[:, end:], v[:, q_offset + q_len :] = poison, poison
    out, poisoned_trace = unisparse_attention(q, k, v, config, q_offset=q_offset, return_trace=True)
    np.testing.assert_array_equal(out, clean)
    np.testing.assert_array_equal(poisoned_trace.mask, trace.mask)


@pytest.mark.parametrize("position", [0, 1, 15, 16, 31, 40, 62])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("key_anchors", [0, 2])
def test_with_the_mask_given_keys_and_values_after_a_position_do_not_reach_it(position, poison, key_anchors):
    config = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, key_anchors=key_anchors)
    q, k, v = random_qkv(64, 64)
    problem = Problem(4, 2, 64, 64, 8, config)
    mask = np.random.default_rng(1).random((4, 4, 4)) < 0.5
    mask |= np.eye(4, dtype=bool)
    summary = reference.run.summarise_keys(k, problem)  # anchors as they are without poison: the mask fixes what is seen
    clean, clean_lse = reference.sparse_attention(q, k, v, mask, problem, summary)
    k[:, position + 1 :], v[:, position + 1 :] = poison, poison
    with np.errstate(invalid="ignore"):
        out, lse = reference.sparse_attention(q, k, v, mask, problem, summary)
    np.testing.assert_array_equal(out[:, : position + 1], clean[:, : position + 1])
    np.testing.assert_array_equal(lse[:, : position + 1], clean_lse[:, : position + 1])
    assert not np.isfinite(out[:, position + 1 :]).all(), "the poison is visible to later queries and must not be hidden from them"


def test_a_visible_nan_value_is_not_hidden():
    q, k, v = random_qkv(32, 32)
    problem = Problem(4, 2, 32, 32, 8, CONFIGS["default"])
    v[0, 3, 5] = np.nan
    out, _ = reference.dense_attention(q, k, v, problem)
    assert np.isnan(out[:2, 3:, 5]).all() and np.isfinite(out[:2, :3]).all()
    assert np.isfinite(np.delete(out[:2], 5, axis=2)).all() and np.isfinite(out[2:]).all()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 33, 63])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_memory_around_the_arrays_never_matters(length, config):
    """The same numbers inside larger arrays of NaN (strided views) give the same bits."""
    q, k, v = random_qkv(length, length)
    expected = unisparse_attention(q, k, v, config)
    views = []
    for x in (q, k, v):
        around = np.full((x.shape[0] + 2, 2 * x.shape[1] + 6, x.shape[2] + 3), np.nan, dtype=x.dtype)
        view = around[1:-1, 3:-3:2, 2:-1]
        view[...] = x
        views.append(view)
    np.testing.assert_array_equal(unisparse_attention(*views, config), expected)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_would_be_read_must_be_finite(name):
    arrays = dict(zip("qkv", random_qkv(32, 32), strict=True))
    arrays[name][1, 20, 3] = np.nan
    with pytest.raises(InvalidInput, match=rf"{name} holds nan at \[1, 20, 3\]"):
        unisparse_attention(**arrays, config=CONFIGS["default"])


@pytest.mark.parametrize("logit", [1e4, -1e4, 1e30])
def test_huge_logits_stay_finite(logit):
    q, k, v = random_qkv(64, 64)
    q[:, 10] = np.sign(logit) * np.sqrt(abs(logit))
    k[:, 5] = np.sqrt(abs(logit))
    out, lse = unisparse_attention(q, k, v, CONFIGS["row"], scale=1.0 / 8 if abs(logit) > 1e5 else 1.0, return_lse=True)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
