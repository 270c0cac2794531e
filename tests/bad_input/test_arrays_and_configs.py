"""Arrays: arguments of unisparse_attention unlike a good call's. Configs: arguments of UniSparseConfig. And words of each refusal."""

from typing import Any

import numpy as np
import pytest

from unisparse_np import InvalidInput, KeySummary, UniSparseConfig, unisparse_attention

from .refusals import one_sentence
from .test_checkpoints import CHECKPOINTS
from .test_conversions import CONVERSIONS
from .test_prompts_and_flags import FLAGS


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def holding(value: float, *shape: int) -> np.ndarray:
    array = normal(*shape)
    array[0, 1, 2] = value
    return array


ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "head_dim differs": ({"q": normal(4, 16, 32)}, ("head_dim 32", "64", "equal")),
    "k and v differ": ({"v": normal(2, 15, 64)}, ("(2, 16, 64)", "(2, 15, 64)", "differ in shape")),
    "heads do not divide": ({"q": normal(3, 16, 64)}, ("num_q_heads=3", "num_kv_heads=2", "whole groups")),
    "two axes": ({"q": normal(16, 64)}, ("(16, 64)", "[Hq, Lq, d]")),
    "batch of one side": ({"q": normal(1, 4, 16, 64)}, ("(1, 4, 16, 64)", "all or none with a batch axis")),
    "batches differ": ({"q": normal(2, 4, 16, 64), "k": normal(3, 2, 16, 64), "v": normal(3, 2, 16, 64)}, ("batch 2", "3", "equal")),
    "no queries": ({"q": normal(4, 0, 64)}, ("q_len=0", "at least one")),
    "no keys": ({"k": normal(2, 0, 64), "v": normal(2, 0, 64), "causal": False}, ("k_len=0", "at least one")),
    "more queries than keys": ({"q": normal(4, 17, 64)}, ("q_len=17", "k_len=16", "0 <= q_offset")),
    "q not finite": ({"q": holding(np.nan, 4, 16, 64)}, ("q holds nan at [0, 1, 2]", "finite")),
    "k infinite": ({"k": holding(np.inf, 2, 16, 64)}, ("k holds inf at [0, 1, 2]", "finite")),
    "v infinite": ({"v": holding(-np.inf, 2, 16, 64)}, ("v holds -inf at [0, 1, 2]", "finite")),
    "integers": ({name: np.ones((2, 16, 64), int) for name in "qkv"}, ("int64", "float16, bfloat16, float32, float64")),
    "dtypes differ": ({"k": normal(2, 16, 64).astype(np.float64)}, ("float32", "float64", "one dtype")),
    "a list": ({"q": [[1.0]]}, ("list", "give a NumPy")),
    "offset negative": ({"q_offset": -1}, ("q_offset=-1", "0 <= q_offset <= k_len - q_len")),
    "offset too far": ({"q_offset": 1}, ("q_offset=1", "k_len=16", "0 <= q_offset <= k_len - q_len")),
    "offset without causality": ({"q_offset": 0, "causal": False}, ("q_offset=0", "leave it None")),
    "scale infinite": ({"scale": float("inf")}, ("scale=inf", "finite")),
    "backend unknown": ({"backend": "torch"}, ("'torch'", "auto, reference, cupy, numba")),
    "config unknown": ({"config": "sparse"}, ("'sparse'", "UniSparseConfig", "'dense'")),
    "config for other heads": ({"config": UniSparseConfig(top_p=(0.9, 0.8, 0.7))}, ("top_p has 3 values", "4 composite heads")),
    "summary of other keys": (
        {"key_summary": KeySummary(normal(2, 1, 64), normal(2, 1, 1))}, ("key_summary.kc", "(2, 1, 64)", "summarise the same k")),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    changes, words = ARRAYS[name]
    good = {"q": normal(4, 16, 64), "k": normal(2, 16, 64), "v": normal(2, 16, 64)}
    unisparse_attention(**good)
    with pytest.raises(InvalidInput) as error:
        unisparse_attention(**(good | changes))
    one_sentence(str(error.value), words)


CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "block size a fraction": ({"block_size": 128.5}, ("block_size=128.5", "whole number")),
    "block size zero": ({"block_size": 0}, ("block_size=0", "at least 1")),
    "k_compress does not divide": ({"k_compress": 6}, ("k_compress=6", "block_size=128", "give a divisor")),
    "top_p_compress too fine": (
        {"row_threshold": 0.1, "top_p_compress": 4}, ("top_p_compress=4 is not a multiple of q_compress=8", "give one of 8, 16"),
    ),
    "top_p_compress without Top-P": (
        {"top_p": None, "row_threshold": 0.1, "top_p_compress": 8}, ("top_p_compress=8 with top_p=None", "set both rules"),
    ),
    "flag instead of a number": ({"key_anchors": True}, ("key_anchors=True", "whole number")),
    "top_p a text": ({"top_p": "0.9"}, ("top_p='0.9'", "not a number")),
    "top_p of no head": ({"top_p": []}, ("top_p", "empty", "one value per composite head")),
    "top_p of one head too high": ({"top_p": [0.9, 1.1]}, ("top_p=1.1", "0 < top_p <= 1")),
    "no rule": ({"top_p": None}, ("top_p=None", "set at least one")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str) -> None:
    values, words = CONFIGS[name]
    with pytest.raises(InvalidInput) as error:
        UniSparseConfig(**values)
    one_sentence(str(error.value), words)


def test_the_tables_are_as_long_as_promised() -> None:
    assert sum(map(len, (CHECKPOINTS, FLAGS, CONVERSIONS, ARRAYS, CONFIGS))) >= 60
