"""The text suite: what sparse attention changes in the model's predictions of a text, by position."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model.kv_cache import KVCache
from ..model.llama import Attention, Llama
from ..model.tokenizer import Tokenizer
from .divergence import Divergence, divergence
from .haystack import digest
from .suite import Attentions, Example, Step, chunk_unit, require_context
from .windows import Windows

DECILES = 10
_TOKENS_AT_ONCE = 512  # of logits held for each attention


@dataclass
class TextSuite:
    """Every position of some windows: KL(dense || sparse), top-1 agreement and both negative log-likelihoods, in deciles."""

    windows: Windows
    name: str = "text"

    def check(self, model: Llama) -> None:
        """Raise InvalidInput when the windows do not fit the model."""
        require_context(model, self.windows.length)

    def identity(self) -> dict[str, Any]:
        return {"text": digest(self.windows.text), "length": self.windows.length, "seed": self.windows.seed}

    def examples(self) -> list[Example]:
        return [Example(self.windows.length, self.name, index) for index in range(len(self.windows))]

    def measure(self, example: Example, model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step) -> dict[str, dict]:
        """All attentions read the window side by side, a piece at a time, so that no logits pile up."""
        token_ids = self.windows[example.number]
        caches = {label: model.new_cache(len(token_ids), a, prompt_tokens=len(token_ids)) for label, a in attentions.items()}
        parts: dict[str, list[Divergence]] = {label: [] for label in attentions}
        for start, stop in pieces(len(token_ids) - 1, chunk_unit(list(attentions.values()))):
            targets = np.array(token_ids[start + 1 : stop + 1])
            dense = logits_of_piece(model, token_ids[start:stop], "dense", caches["dense"])  # [t, vocab]
            for label, attention in attentions.items():
                sparse = dense if label == "dense" else logits_of_piece(model, token_ids[start:stop], attention, caches[label])
                parts[label].append(divergence(dense, sparse, targets, model.backend.layers))
        measured = {}
        for label in attentions:
            densities = model.layer_densities(caches[label])
            measured[label] = by_decile(parts[label]) | {"density": sum(densities) / len(densities)}
            step()
        return measured


def pieces(tokens: int, unit: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of pieces of whole units that cover the tokens, about _TOKENS_AT_ONCE each."""
    size = -(-_TOKENS_AT_ONCE // unit) * unit
    yield from ((start, min(tokens, start + size)) for start in range(0, tokens, size))


def logits_of_piece(model: Llama, token_ids: list[int], attention: Attention, cache: KVCache) -> Any:
    """All logits [t, vocab] of tokens that follow what the cache holds, as one of the backend's arrays."""
    chunks = list(model.logits_on_backend(token_ids, cache, attention))
    return chunks[0] if len(chunks) == 1 else model.backend.layers.xp.concatenate(chunks)


def by_decile(parts: list[Divergence]) -> dict[str, list[float]]:
    """Means over each tenth of the positions: kl, top1, nll."""
    whole = Divergence(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    return {name: [float(part.mean()) for part in np.array_split(getattr(whole, name), DECILES)] for name in ("kl", "top1", "nll")}
