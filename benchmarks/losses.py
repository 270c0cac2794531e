"""What the quality benchmarks share: the loss of a window of text under a config, and the score of a needle question.

Both run on the model's own backend: logits and their comparison stay on its device.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tokenizers
from common import NEEDLE_LLAMA, code, licences, plays, prose

from unisparse_np.model.generate import stream_generate

TOKENS_AT_ONCE = 2048  # read by the model
ROWS_AT_ONCE = 512  # of logits
QUESTION_SEED = 2026

Row = dict[str, Any]


class Window:
    """One window of text, its dense log-probabilities over the second half held for comparison."""

    def __init__(self, model: Any, token_ids: list[int]) -> None:
        self._model, self._token_ids = model, token_ids
        self._half = len(token_ids) // 2
        xp = model.backend.layers.xp
        self._targets = xp.asarray(np.array(token_ids[self._half + 1 :]))  # [T/2 - 1]
        self._dense = [log_softmax(logits, xp) for logits in self._logits("dense", model.new_cache(len(token_ids)))]

    def loss(self, attention: Any) -> dict[str, float]:
        """Per token of the second half: KL(dense || sparse) in nats, agreement of the likeliest token, rise of the negative
        log-likelihood; and the mean density over the whole window, anchors included."""
        xp = self._model.backend.layers.xp
        cache = self._model.new_cache(len(self._token_ids), attention)
        sums, done = xp.zeros(3, dtype=xp.float64), 0
        for dense, logits in zip(self._dense, self._logits(attention, cache), strict=True):
            sparse, targets = log_softmax(logits, xp), self._targets[done : done + len(dense)]
            rises = (dense - sparse)[xp.arange(len(dense)), targets]
            agree = dense.argmax(axis=1) == sparse.argmax(axis=1)
            kl = (xp.exp(dense) * (dense - sparse)).sum(dtype=xp.float64)
            sums += xp.stack([kl, agree.sum(dtype=xp.float64), rises.sum(dtype=xp.float64)])
            done += len(dense)
        kl, top1, rise = (float(value) / done for value in sums)
        return {"kl": kl, "top1": top1, "nll_rise": rise, "density": float(np.mean(self._model.layer_densities(cache)))}

    def _logits(self, attention: Any, cache: Any) -> Iterator[Any]:
        """The backend's logits [t, vocab] of the second half but for its last token."""
        ids, configs = self._token_ids, per_layer(self._model, attention)
        self._model.prefill_on_backend(ids[: self._half], cache, attention)
        for start in range(self._half, len(ids) - 1, TOKENS_AT_ONCE):
            hidden = self._model.forward.hidden(ids[start : min(start + TOKENS_AT_ONCE, len(ids) - 1)], cache, configs, count=True)
            for row in range(0, len(hidden), ROWS_AT_ONCE):
                yield self._model.forward.head(hidden[row : row + ROWS_AT_ONCE])


def window_losses(model: Any, tokenizer: Any, job: tuple[list[int], dict[str, Any]]) -> dict[str, Row]:
    """(token ids of a window, attentions by name) -> the loss of each; work for `in_processes`."""
    token_ids, attentions = job
    window = Window(model, token_ids)
    return {name: window.loss(attention) for name, attention in attentions.items()}


def log_softmax(logits: Any, xp: Any) -> Any:
    """[T, vocab] float32, in place."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= xp.log(xp.exp(logits).sum(axis=1, keepdims=True))
    return logits


def per_layer(model: Any, attention: Any) -> list[Any]:
    """One config a layer."""
    return list(attention) if isinstance(attention, list) else [attention] * model.config.num_hidden_layers


TEXTS = {"prose": prose, "code": code, "plays": plays, "licences": licences}


def text_windows(tokenizer: Any, length: int, count: int, kinds: Sequence[str] = ("prose", "code")) -> Iterator[tuple[str, int, list[int]]]:
    """(kind of text, first token, ids): `count` windows of each kind in turn, spread over the text."""
    texts = {kind: tokenizer.encode(TEXTS[kind]()) for kind in kinds}
    for n in range(count):
        for kind, token_ids in texts.items():
            start = n * (len(token_ids) - length) // max(1, count - 1)
            yield kind, start, token_ids[start : start + length]


@lru_cache(maxsize=1)
def needle_tasks() -> Any:
    """examples/needle-llama/tasks.py as a module."""
    spec = importlib.util.spec_from_file_location("tasks", NEEDLE_LLAMA / "tasks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def questions(length: int, count: int, tasks: list[str] | None = None) -> Iterator[tuple[str, tuple]]:
    """(task, example) pairs: every task in turn, from one seed, the same for every config and run."""
    module = needle_tasks()
    tokenizer = tokenizers.Tokenizer.from_file(str(NEEDLE_LLAMA / "tokenizer.json"))
    generator = module.Gen(module.Pieces(tokenizer, [module.NOISE * 3], [module.NOISE * 3], n_story=3000), "eval", QUESTION_SEED + length)
    names = tasks or module.TASKS
    for n in range(count):
        task = names[n % len(names)]
        yield task, generator.eval_example(task, length)


def answer(model: Any, tokenizer: Any, example: tuple, attention: Any) -> dict[str, float]:
    """Read a question with `attention`, answer it greedily with dense decode -> RULER's score, density."""
    token_ids, references, any_one, room = example
    pieces = list(stream_generate(model, tokenizer, [int(t) for t in token_ids], attention=attention, max_tokens=room))
    statistics = pieces[-1].statistics
    assert statistics is not None
    text = "".join(piece.text for piece in pieces)
    return {"score": needle_tasks().score(text, references, any_one), "density": statistics.density_mean}


def answers(model: Any, tokenizer: Any, job: tuple[tuple, dict[str, Any]]) -> dict[str, Row]:
    """(question, attentions by name) -> the answer of each; work for `in_processes`."""
    example, attentions = job
    return {name: answer(model, tokenizer, example, attention) for name, attention in attentions.items()}
