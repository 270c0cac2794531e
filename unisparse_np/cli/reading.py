"""What the commands share that read a prompt to show what attention keeps: which model, which prompt, and the checks first."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from .backend import choose_backend
from .options import flag, in_section, note_config_file, resolve_attention, use_device
from .prompt import read_prompt

if TYPE_CHECKING:
    from ..model.llama import Attention, Llama
    from ..model.tokenizer import Tokenizer

MODEL = flag("-m", "--model", "model_dir", metavar="DIR", help="Folder with config.json, tokenizer.json and safetensors.")
PROMPT_FLAGS = (
    flag("-p", "--prompt", metavar="FILE|-", help="File that holds the prompt, UTF-8; - reads standard input."),
    flag("--text", metavar="STRING", help="The prompt itself, instead of --prompt."),
    flag("--raw", is_flag=True, help="Read the text as it stands, without the model's chat template."),
)
prompt_options = in_section("Prompt", (MODEL[0], MODEL[1] | {"required": True}), *PROMPT_FLAGS)


@dataclass(frozen=True)
class Reading:
    """A loaded model, and a prompt that has passed every check."""

    model: Llama
    tokenizer: Tokenizer
    token_ids: list[int]
    attention: Attention
    chunk_size: int | None
    model_name: str


def open_reading(
    model_dir: str, prompt: str | None, text: str | None, raw: bool, attention: str, attention_flags: dict[str, Any], backend: str,
    dtype: str, chunk_size: int | None, max_context: int | None, device: int | None, quiet: bool,
) -> Reading:  # fmt: skip
    """Check flags and prompt, load the model, encode the prompt. Raises the project's errors before any long work."""
    prompt_text = read_prompt(prompt, text)
    chosen, _ = resolve_attention(model_dir, attention, attention, attention_flags)
    if not quiet and attention != "dense":
        note_config_file(model_dir, attention_flags)
    use_device(device, backend)
    backend = choose_backend(backend, quiet, device)
    from ..inspection.prompt import encode_prompt  # late, so that help and usage errors come at once
    from ..model.loading import load

    model, tokenizer = load(model_dir, backend=backend, dtype=dtype, max_context=max_context)
    return Reading(
        model, tokenizer, encode_prompt(model, tokenizer, prompt_text, chosen, raw), chosen, chunk_size, Path(model_dir).resolve().name
    )


def check_prompt(reading: Reading, attention: Attention) -> None:
    """Refuse a second attention that has nothing to choose from in this prompt. Raises InvalidInput."""
    from ..inspection.prompt import check_length

    check_length(reading.model, reading.token_ids, attention)


class PhaseBar(AbstractContextManager["PhaseBar"]):
    """Call it with (what is going on, tokens done, tokens in all): a bar a phase on stderr, on a terminal only."""

    def __init__(self, quiet: bool) -> None:
        self._shown = not quiet and sys.stderr.isatty()
        self._phase = ""
        self._bar: Any = None

    def __call__(self, phase: str, done: int, total: int) -> None:
        if not self._shown:
            return
        if phase != self._phase:
            self._close()
            self._phase, self._bar = phase, click.progressbar(length=total, label=phase.capitalize(), file=sys.stderr)
            self._bar.__enter__()
        self._bar.update(done - self._bar.pos)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
        self._bar = None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._close()
