"""The copy suite: verbatim continuation of a passage far back in the text, the sharpest test of token-level precision."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..model.llama import Attention, Llama
from ..model.tokenizer import Tokenizer
from .divergence import log_probabilities
from .haystack import digest
from .suite import Attentions, Example, Step, chunk_unit, require_context
from .windows import Windows

CUE_TOKENS = 48
QUOTE_TOKENS = 32


@dataclass
class CopySuite:
    """A window of text, then its 48 tokens from a random place once more: how well does the model go on with the next 32?

    Everything is read under the attention that is measured, the quote included.
    """

    windows: Windows
    name: str = "copy"

    def __post_init__(self) -> None:
        if self.windows.length < 4 * (CUE_TOKENS + QUOTE_TOKENS):
            raise InvalidInput(
                f"--length {self.windows.length} is too short to quote from: give at least {4 * (CUE_TOKENS + QUOTE_TOKENS)}"
            )

    def check(self, model: Llama) -> None:
        """Raise InvalidInput when the windows do not fit the model."""
        require_context(model, self.windows.length)

    def identity(self) -> dict[str, Any]:
        return {"text": digest(self.windows.text), "length": self.windows.length, "seed": self.windows.seed}

    def examples(self) -> list[Example]:
        return [Example(self.windows.length, self.name, index) for index in range(len(self.windows))]

    def quotation(self, index: int) -> list[int]:
        """The window's beginning, a passage of it as the cue, and the passage's continuation: `length` tokens in all."""
        passage = CUE_TOKENS + QUOTE_TOKENS
        context = self.windows[index][: self.windows.length - passage]
        start = Random(f"{self.windows.seed}/{self.windows.length}/{index}").randrange(1, len(context) - passage)
        return context + context[start : start + passage]

    def measure(self, example: Example, model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step) -> dict[str, dict]:
        token_ids = self.quotation(example.number)
        measured = {}
        for label, attention in attentions.items():
            measured[label] = quote(model, token_ids, attention)
            step()
        return measured


def quote(model: Llama, token_ids: list[int], attention: Attention) -> dict[str, float]:
    """Of the last 32 tokens: mean negative log-likelihood, whether greedy choice gives every one, and how many it gets right in a row."""
    cache = model.new_cache(len(token_ids), attention, prompt_tokens=len(token_ids))
    unit = chunk_unit([attention])
    split = (len(token_ids) - QUOTE_TOKENS - 1) // unit * unit  # before it no logits are needed
    if split:
        model.prefill(token_ids[:split], cache, attention)
    logits = model.logits(token_ids[split:-1], attention, cache=cache)[-QUOTE_TOKENS:]  # [32, vocab]
    targets = np.array(token_ids[-QUOTE_TOKENS:])
    right = logits.argmax(axis=1) == targets
    nll = -log_probabilities(logits)[np.arange(QUOTE_TOKENS), targets]
    densities = model.layer_densities(cache)
    return {
        "nll": float(nll.mean(dtype=np.float64)),
        "exact": float(right.all()),
        "right_in_a_row": float(QUOTE_TOKENS if right.all() else right.argmin()),
        "density": sum(densities) / len(densities),
    }
