"""From a prompt to an answer, piece by piece: prefill, then one token after another until something ends it."""

from __future__ import annotations

import numbers
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..config import UniSparseConfig
from ..errors import InvalidInput
from .kv_cache import KVCache
from .llama import Attention, Llama
from .sampling import Sampler
from .statistics import Statistics, Stopwatch
from .stop_strings import StopStrings
from .tokenizer import Tokenizer

FinishReason = Literal["eos", "stop", "length"]


class NoChatTemplateWarning(UserWarning):
    """The model has no chat template, so the prompt is continued as raw text."""


@dataclass(frozen=True)
class Piece:
    """One step of an answer.

    text: whole characters that are certain now; empty while a character or a stop string may be under way.
    token_id: the token of this step, the EOS token included.
    finish_reason: on the last piece "eos" (the model ended), "stop" (a stop string) or "length" (max_tokens, or the context is full).
    statistics: on the last piece.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None = None
    statistics: Statistics | None = None


def stream_generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str | Sequence[int],
    *,
    attention: Attention = UniSparseConfig(),  # noqa: B008  (frozen)
    decode_attention: Attention = "dense",
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    system: str | None = None,
    raw: bool = False,
    chunk_size: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Iterator[Piece]:
    """Answer `prompt`; everything is checked in this call, and the work begins with the first piece asked for.

    Args:
        prompt: text (goes through the chat template unless `raw` or the model has none), or token ids taken as they are.
        attention: of the prefill; "dense", a UniSparseConfig, or a list of these, one a layer. decode_attention: of the steps after it.
        max_tokens: most tokens to generate; fewer where the context ends before.
        temperature, top_k, top_p, min_p, repetition_penalty, seed: see `Sampler`; greedy by default.
        stop: texts that end the answer and are not part of it, however tokens cut them. A special token is given by its spelling.
        system: system message for the chat template.
        chunk_size, progress: see `Llama.prefill`.

    Raises:
        InvalidInput: an argument breaks its rule, or the prompt is empty or does not fit the context or the memory.
        CheckpointError: the chat template is broken; from the iterator: the logits are not finite.
    """
    stopwatch = Stopwatch(time.perf_counter(), model.backend)
    sampler = _sampler_of(model, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    stop_strings = StopStrings(stop)
    stop_token_ids = {token_id for text in stop_strings.texts if (token_id := tokenizer.special_token_id(text)) is not None}
    prompt_ids = _prompt_ids(model, tokenizer, prompt, system, raw)
    max_tokens = _tokens_that_fit(model, len(prompt_ids), max_tokens)
    cache = model.new_cache(len(prompt_ids) + max_tokens - 1, attention, decode_attention=decode_attention)

    def prefill() -> Any:
        return model.prefill_on_backend(prompt_ids, cache, attention, chunk_size=chunk_size, progress=progress)

    def step(token_id: int) -> Any:
        return model.step_on_backend(token_id, cache, decode_attention)

    token_ids = _generate_tokens(prefill, step, sampler, prompt_ids, max_tokens, stopwatch)
    ends: dict[int, FinishReason] = {token_id: "eos" for token_id in tokenizer.eos_token_ids}
    ends.update({token_id: "stop" for token_id in stop_token_ids})
    pieces = _pieces(token_ids, tokenizer, stop_strings, ends, max_tokens)
    return _releasing(cache, _with_statistics(pieces, model, cache, len(prompt_ids), stopwatch))


def generate(model: Llama, tokenizer: Tokenizer, prompt: str | Sequence[int], **options: Any) -> str:
    """The whole answer as one string; options and errors are those of `stream_generate`."""
    return "".join(piece.text for piece in stream_generate(model, tokenizer, prompt, **options))


def _sampler_of(model: Llama, *settings: Any) -> Callable[[Any, np.ndarray], int]:
    """What chooses a token from the backend's logits: the backend's own sampler where it has one. Checks the settings.

    On several ranks the choice is rank 0's for all.
    """
    sampler: Callable[[Any, np.ndarray], int] = Sampler(*settings)
    if (new_sampler := getattr(model.backend, "new_sampler", None)) is not None:
        sampler = new_sampler(*settings, model.config.vocab_size)
    return lambda logits, ids: model.ranks.world.broadcast(sampler(logits, ids))


def _generate_tokens(
    prefill: Callable[[], Any],
    step: Callable[[int], Any],
    sampler: Callable[[Any, np.ndarray], int],
    prompt_ids: list[int],
    max_tokens: int,
    stopwatch: Stopwatch,
) -> Iterator[int]:
    """max_tokens token ids, each read back only when the next one is asked for."""
    ids = np.empty(len(prompt_ids) + max_tokens, dtype=np.int64)  # prompt and answer so far
    ids[: len(prompt_ids)] = prompt_ids
    begin = time.perf_counter()
    token_id = sampler(prefill(), ids[: len(prompt_ids)])  # waits for a device, so that the time is the work's
    stopwatch.prefill_seconds = time.perf_counter() - begin
    stopwatch.time_to_first_token = time.perf_counter() - stopwatch.started
    yield token_id
    for length in range(len(prompt_ids) + 1, len(ids)):
        ids[length - 1] = token_id
        begin = time.perf_counter()
        token_id = sampler(step(token_id), ids[:length])
        stopwatch.decode_seconds += time.perf_counter() - begin
        yield token_id


def _pieces(
    token_ids: Iterator[int], tokenizer: Tokenizer, stop_strings: StopStrings, ends: dict[int, FinishReason], max_tokens: int
) -> Iterator[Piece]:
    """Tokens to pieces of certain text; the last piece has a finish_reason."""
    detokenizer = tokenizer.detokenizer()
    for count, token_id in enumerate(token_ids, start=1):
        reason = ends.get(token_id) or ("length" if count == max_tokens else None)
        text = "" if token_id in ends else detokenizer.push(token_id)
        if reason is not None:
            text += detokenizer.flush()
        certain, found = stop_strings.push(text)
        if found:
            reason = "stop"
        elif reason is not None:
            certain += stop_strings.flush()
        yield Piece(certain, token_id, reason)
        if reason is not None:
            return


def _with_statistics(pieces: Iterator[Piece], model: Llama, cache: KVCache, prompt_tokens: int, stopwatch: Stopwatch) -> Iterator[Piece]:
    for count, piece in enumerate(pieces, start=1):
        if piece.finish_reason is None:
            yield piece
        else:
            statistics = stopwatch.statistics(prompt_tokens, count, model.layer_densities(cache))
            yield Piece(piece.text, piece.token_id, piece.finish_reason, _over_ranks(statistics, model, cache))


def _over_ranks(statistics: Statistics, model: Llama, cache: KVCache) -> Statistics:
    """On several ranks: the largest memory of any, and how far the busiest is from the mean."""
    if model.ranks.world.size == 1:
        return statistics
    own = (statistics.peak_memory_bytes, statistics.device_peak_memory_bytes or 0, float(cache.counts()[:, 0].sum()))
    host, device, kept = zip(*model.ranks.world.gather_values(own), strict=True)
    return replace(
        statistics,
        processes=len(kept),
        peak_memory_bytes=max(host),
        device_peak_memory_bytes=None if statistics.device_peak_memory_bytes is None else max(device),
        busiest_rank=max(kept) * len(kept) / sum(kept),
    )


def _releasing(cache: KVCache, pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The same pieces; the cache's memory is free again after the last, after an error, and when nobody asks for more."""
    try:
        yield from pieces
    finally:
        cache.release()


def _prompt_ids(model: Llama, tokenizer: Tokenizer, prompt: str | Sequence[int], system: str | None, raw: bool) -> list[int]:
    if isinstance(prompt, str):
        token_ids = tokenizer.encode_prompt(prompt, system, raw)
        if not raw and not tokenizer.has_chat_template:
            warnings.warn("the model has no chat template, so the prompt is continued as raw text", NoChatTemplateWarning, stacklevel=3)
        return token_ids
    if isinstance(prompt, bytes) or not isinstance(prompt, (Sequence, np.ndarray)):
        raise InvalidInput(f"the prompt is a {type(prompt).__name__}: give text, or a sequence of token ids")
    if system is not None:
        raise InvalidInput(
            f"the system message {system[:40]!r} has no place beside a prompt of token ids: leave it out, or give the prompt as text"
        )
    if len(prompt) == 0:
        raise InvalidInput("the prompt has no tokens: give at least one")
    vocab_size = model.config.vocab_size
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, numbers.Integral) or not 0 <= token_id < vocab_size:
            raise InvalidInput(
                f"token id {token_id!r} in the prompt is not one of the model's: give whole numbers from 0 to {vocab_size - 1}"
            )
    return [int(token_id) for token_id in prompt]


def _tokens_that_fit(model: Llama, prompt_tokens: int, max_tokens: int) -> int:
    """max_tokens, or fewer where the context ends before."""
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, numbers.Integral) or max_tokens < 1:
        raise InvalidInput(f"max_tokens={max_tokens!r} makes no answer: give a whole number of at least 1")
    limit = model.max_context
    if prompt_tokens > limit:
        raise InvalidInput(
            f"the prompt has {prompt_tokens} tokens, more than the {limit} this model may use: shorten it, "
            "or raise the limit with --max-context (max_context= in load)"
        )
    fitting = limit - prompt_tokens + 1  # the last token is not read again
    if fitting < max_tokens:
        warnings.warn(
            f"the context of {limit} tokens leaves room for {fitting} of the {max_tokens} tokens to generate (raise it with --max-context)",
            stacklevel=3,
        )
    return min(int(max_tokens), fitting)
