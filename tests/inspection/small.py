"""A small real model and texts for the inspection tests."""

from functools import cache
from pathlib import Path
from typing import Any

from unisparse_np import UniSparseConfig
from unisparse_np.model.loading import load

NEEDLE_LLAMA = Path(__file__).parents[2] / "examples" / "needle-llama"
CONFIG = UniSparseConfig(block_size=32, q_compress=4, k_compress=4, top_p=0.8, key_anchors=2)
TEXT = (
    "One of the special magic numbers for the brave garden is: 4817263. " + "The grass is green. The sky is blue. The sun is yellow. " * 9
)
FLAGS = ["--block-size", "32", "--compress", "4", "--attn-top-p", "0.8", "--key-anchors", "2", "--backend", "reference"]


@cache
def model_and_tokenizer() -> tuple[Any, Any]:
    return load(NEEDLE_LLAMA, backend="reference")


@cache
def token_ids() -> tuple[int, ...]:
    return tuple(model_and_tokenizer()[1].encode_prompt(TEXT, raw=True))
