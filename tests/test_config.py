"""UniSparseConfig: presets, what is legal, and one sentence for each thing that is not."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from unisparse_np import InvalidInput, Problem, UniSparseConfig


def test_presets():
    assert UniSparseConfig() == UniSparseConfig(128, 8, 8, 1, 0.95, None, 1, 1, 1)
    assert UniSparseConfig.paper() == UniSparseConfig(128, 8, 8, 1, 0.95, None, 0, 0, 0)
    assert UniSparseConfig.balanced() == UniSparseConfig(64, 2, 2, 1, 0.93, 0.025, 1, 1, 1, 8)
    assert UniSparseConfig.precise() == UniSparseConfig(64, 2, 4, 1, None, 0.02, 1, 1, 1)


def test_a_config_is_frozen_and_hashable():
    config = UniSparseConfig(top_p=np.array([0.5, 0.9]), block_size=np.int64(64))
    assert hash(config) == hash(UniSparseConfig(top_p=(0.5, 0.9), block_size=64))
    with pytest.raises(FrozenInstanceError):
        config.top_p = 0.5


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"top_p": 0.0}, "top_p=0.0 is outside its range: give a number with 0 < top_p <= 1"),
        ({"top_p": 1.5}, "top_p=1.5 is outside"),
        ({"top_p": float("nan")}, "top_p=nan is outside"),
        ({"top_p": "most"}, "top_p='most' is not a number"),
        ({"top_p": ()}, "top_p is an empty sequence"),
        ({"top_p": (0.5, 2.0)}, "top_p=2.0 is outside"),
        ({"top_p": np.ones((2, 2))}, "is not a number: give one share, a flat sequence"),
        ({"top_p": None}, "leave no rule to keep blocks by"),
        ({"row_threshold": 1.0}, "row_threshold=1.0 is outside its range: give a number with 0 < row_threshold < 1"),
        ({"row_threshold": True}, "row_threshold=True is outside"),
        ({"block_size": 0}, "block_size=0 is too small"),
        ({"block_size": 64.0}, "block_size=64.0 is not a whole number"),
        ({"q_compress": 3}, "q_compress=3 does not divide block_size=128"),
        ({"k_compress": 256}, "k_compress=256 does not divide block_size=128: give a divisor, such as 128"),
        ({"key_anchors": 9}, "key_anchors=9 is more than 8"),
        ({"key_anchors": -1}, "key_anchors=-1 is too small"),
        ({"sink_blocks": -1}, "sink_blocks=-1 is too small"),
        ({"local_blocks": None}, "local_blocks=None is not a whole number"),
        ({"head_compress": 0}, "head_compress=0 is too small"),
        ({"top_p_compress": 8}, "top_p_compress=8 with row_threshold=None: Top-P reads composite tokens of its own only beside"),
        ({"top_p_compress": 8, "top_p": None, "row_threshold": 0.1}, "top_p_compress=8 with top_p=None"),
        ({"top_p_compress": 12, "row_threshold": 0.1}, "top_p_compress=12 is not a multiple of q_compress=8 and k_compress=8 that divides"),
        ({"top_p_compress": 256, "row_threshold": 0.1}, "divides block_size=128: give one of 8, 16, 32, 64, 128"),
        ({"top_p_compress": 4, "row_threshold": 0.1}, "top_p_compress=4 is not a multiple"),
        ({"top_p_compress": 0, "row_threshold": 0.1}, "top_p_compress=0 is too small"),
        ({"top_p_compress": "8", "row_threshold": 0.1}, "top_p_compress='8' is not a whole number"),
    ],
)
def test_a_bad_value_gets_one_sentence(values, words):
    with pytest.raises(InvalidInput) as caught:
        UniSparseConfig(**values)
    message = str(caught.value)
    assert words in message and "\n" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_kv_heads": 3}, "num_q_heads=8 is not a multiple of num_kv_heads=3"),
        ({"q_len": 0}, "q_len=0 is empty"),
        ({"q_len": 11}, "q_len=11, k_len=10: causal queries"),
        ({"q_offset": -1}, "q_offset=-1, q_len=10"),
        ({"q_offset": 1}, "q_offset=1, q_len=10, k_len=10"),
        ({"q_offset": 0, "causal": False}, "q_offset=0 means nothing without causality"),
        ({"scale": float("inf")}, "scale=inf is not finite"),
        ({"config": UniSparseConfig(head_compress=3)}, "head_compress=3 does not fit 8 query heads in groups of 4: give one of 1, 2, 4, 8"),
        ({"config": UniSparseConfig(top_p=(0.5, 0.5))}, "top_p has 2 values, but there are 8 composite heads"),
    ],
)
def test_a_bad_problem_gets_one_sentence(arguments, words):
    with pytest.raises(InvalidInput) as caught:
        Problem(**({"num_q_heads": 8, "num_kv_heads": 2, "q_len": 10, "k_len": 10, "head_dim": 4} | arguments))
    message = str(caught.value)
    assert words in message and "\n" not in message


def test_each_rule_alone_is_a_problem_with_its_own_composite_tokens():
    config = UniSparseConfig(block_size=16, q_compress=4, k_compress=2, row_threshold=0.1, top_p_compress=np.int64(8))
    problem = Problem(4, 2, q_len=30, k_len=43, head_dim=8, config=config)
    top_p, row_threshold = problem.of_top_p(), problem.of_row_threshold()
    assert (top_p.num_q_composites, top_p.num_k_composites, top_p.q_offset) == (4, 6, 13)
    assert (top_p.config.top_p, top_p.config.row_threshold, top_p.config.top_p_compress) == (0.95, None, None)
    assert (row_threshold.num_q_composites, row_threshold.num_k_composites) == (8, 22)
    assert (row_threshold.config.top_p, row_threshold.config.row_threshold, row_threshold.config.top_p_compress) == (None, 0.1, None)
    assert Problem(1, 1, 10, 43, 8, config, q_offset=8).keys_read == 24  # position 17, in a coarse composite key of 16 .. 23
    assert Problem(1, 1, 10, 43, 8, row_threshold.config, q_offset=8).keys_read == 18
    assert problem.keys_read == 43 and Problem(1, 1, 10, 20, 8, config, causal=False).keys_read == 20


def test_a_problem_names_what_is_visible():
    problem = Problem(4, 2, q_len=40, k_len=100, head_dim=8, config=UniSparseConfig(block_size=16, q_compress=4, k_compress=8))
    assert problem.q_offset == 60 and problem.group_size == 2
    assert (problem.num_q_blocks, problem.num_k_blocks, problem.num_q_composites, problem.num_k_composites) == (3, 7, 10, 13)
    assert problem.query_positions(2) == (92, 99) and problem.visible_blocks(0) == 5 and problem.visible_composites(0) == 8
    assert problem.forced_blocks(1) == (1, 3, 6)  # positions 76..91: blocks 4 and 5 are the diagonal, block 3 is local
