"""unisparse-np generate: read a prompt, write what the model answers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from ..attention import load_model_backend
from ..parallel import arrange, check_grid, together, world
from .backend import choose_backend
from .options import (
    Attention,
    SectionedCommand,
    Size,
    attention_options,
    check_finite_option,
    flag,
    in_section,
    note_config_file,
    output_options,
    resolve_attention,
    run_options,
    use_device,
)
from .progress import CountBar, PrefillBar
from .prompt import read_prompt
from .ranks import rank_options, refuse_one_device, refuse_uneven

if TYPE_CHECKING:
    from ..model.generate import Piece
    from ..model.statistics import Statistics

_text_options = in_section(
    "Prompt and answer",
    flag("-m", "--model", "model_dir", metavar="DIR", required=True, help="Folder with config.json, tokenizer.json and safetensors."),
    flag("-p", "--prompt", metavar="FILE|-", help="File that holds the prompt, UTF-8; - reads standard input."),
    flag("--text", metavar="STRING", help="The prompt itself, instead of --prompt."),
    flag("-n", "--max-tokens", type=Size(), default=128, show_default=True, help="Stop after this many new tokens."),
    flag("--system", metavar="STRING", help="Instruction that goes before the prompt (models with a chat template)."),
    flag("--raw", is_flag=True, help="Continue the text as it stands, without the model's chat template."),
    flag("--stop", multiple=True, metavar="STRING", help="End the answer before this text. Can be given several times."),
)

_sampling_options = in_section(
    "Choosing each token",
    flag("--temp", "temperature", type=float, default=0.0, show_default=True, help="0 takes the likeliest token; more is more random."),
    flag("--top-k", type=int, default=0, show_default=True, help="Draw from the k likeliest tokens only; 0 is off."),
    flag("--top-p", "sampling_top_p", type=float, default=1.0, show_default=True,
         help="Draw from the likeliest tokens that together hold this probability."),
    flag("--min-p", type=float, default=0.0, show_default=True, help="Leave out tokens below this share of the likeliest."),
    flag("--repetition-penalty", type=float, default=1.0, show_default=True, help="Above 1: less of the tokens that already appeared."),
    flag("--seed", type=int, help="Makes random draws repeatable."),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Read a prompt with sparse attention and write an answer.")
@_text_options
@_sampling_options
@attention_options
@run_options
@check_finite_option
@rank_options
@output_options
def generate(
    model_dir: str, prompt: str | None, text: str | None, attention: str, decode_attention: str, attention_flags: dict[str, Any],
    backend: str, dtype: str, max_context: int | None, device: int | None, check_finite: bool, tensor_parallel: int | None,
    context_parallel: int, sampling_top_p: float, as_json: bool, quiet: bool, **others: Any,
) -> None:  # fmt: skip
    """Read a prompt with sparse attention and write the model's answer.

    The answer streams to stdout. Statistics follow on stderr: tokens, times, density (the share of attention that was
    computed; 1 is dense) and peak memory.

    \b
    unisparse-np generate -m examples/needle-llama -p examples/needle-llama/prompts/needle-8k.txt
    unisparse-np generate -m models/smollm2 --text "What is the capital of France?"
    """
    everyone = world()

    def check() -> tuple[str, Attention, Attention, Any]:
        check_grid(everyone.size, tensor_parallel, context_parallel)
        prompt_text = read_prompt(prompt, text) if everyone.rank == 0 else ""
        prefill, later = resolve_attention(model_dir, attention, decode_attention, attention_flags)
        refuse_one_device(device)
        use_device(device, backend)
        engine = load_model_backend(choose_backend(backend, quiet, device))
        refuse_uneven(model_dir, everyone.size // context_parallel, prefill, later)
        return prompt_text, prefill, later, engine

    prompt_text, prefill_attention, later_attention, engine = together(everyone, check)
    prompt_text = everyone.broadcast(prompt_text)
    if not quiet and (prefill_attention, later_attention) != ("dense", "dense"):
        note_config_file(model_dir, attention_flags)
    from ..model.generate import stream_generate  # late, so that help and usage errors come at once
    from ..model.loading import load

    started = time.perf_counter()
    ranks = arrange(everyone, context_parallel, engine)
    with CountBar("Loading MiB", quiet) as loading:
        model, tokenizer = together(
            everyone,
            lambda: load(
                model_dir, backend=engine.name, dtype=dtype, max_context=max_context, check_finite=check_finite, ranks=ranks,
                progress=lambda done, total: loading(done >> 20, total >> 20),
            ),
        )  # fmt: skip
    load_seconds = time.perf_counter() - started
    with PrefillBar(quiet) as bar:
        pieces = together(
            everyone,
            lambda: stream_generate(
                model, tokenizer, prompt_text, attention=prefill_attention, decode_attention=later_attention, top_p=sampling_top_p,
                progress=bar.if_shown(), **others,
            ),
        )  # fmt: skip
        answer = Answer(pieces, bar)
        try:
            answer.stream(show=not as_json)
        except KeyboardInterrupt:  # keep what there is; the group exits with 130
            answer.report(load_seconds, as_json, quiet)
            raise
    answer.report(load_seconds, as_json, quiet)


class Answer:
    """What came out so far. Ctrl-C leaves it as far as it got, with finish_reason "interrupted"."""

    def __init__(self, pieces: Iterator[Piece], bar: PrefillBar) -> None:
        self._pieces, self._bar = pieces, bar
        self.text, self.finish_reason = "", "interrupted"
        self.statistics: Statistics | None = None

    def stream(self, show: bool) -> None:
        """Take piece after piece and, if show, print each as it comes."""
        try:
            for piece in self._pieces:
                self._bar.close()
                self.text += piece.text
                if show:
                    click.echo(piece.text, nl=False)  # flushes
                if piece.finish_reason is not None:
                    self.finish_reason, self.statistics = piece.finish_reason, piece.statistics
        except KeyboardInterrupt:
            self._bar.close()
            raise
        finally:
            if show and self.text and not self.text.endswith("\n"):
                click.echo()

    def report(self, load_seconds: float, as_json: bool, quiet: bool) -> None:
        """One JSON object on stdout, or the statistics on stderr."""
        if as_json:
            statistics = None if self.statistics is None else asdict(replace(self.statistics, load_seconds=load_seconds))
            answer = {"text": self.text, "finish_reason": self.finish_reason, "statistics": statistics}
            click.echo(json.dumps(answer, ensure_ascii=False))
        elif self.statistics is not None and not quiet:
            click.echo(closing_lines(self.statistics, load_seconds), err=True)


def closing_lines(s: Statistics, load_seconds: float) -> str:
    """What generate reports at the end, one line a subject."""
    ranks = (
        (f"ranks     {s.processes} processes, the busiest kept {s.busiest_rank:.2f} times the mean of blocks",) if s.busiest_rank else ()
    )
    return "\n".join(
        (
            f"prompt    {s.prompt_tokens:,} tokens in {s.prefill_seconds:.2f} s ({s.prefill_tokens_per_second:,.0f} tokens/s), "
            f"first token after {s.time_to_first_token:.2f} s",
            f"answer    {s.generated_tokens:,} tokens in {s.decode_seconds:.2f} s ({s.decode_tokens_per_second:,.1f} tokens/s)",
            f"density   mean {s.density_mean:.3f}, lowest layer {s.density_lowest:.3f}, highest {s.density_highest:.3f} (dense is 1)",
            f"memory    {s.peak_memory_bytes / 2**20:,.0f} MiB at the peak"
            + ("" if s.device_peak_memory_bytes is None else f", {s.device_peak_memory_bytes / 2**20:,.0f} MiB on the GPU"),
            *ranks,
            f"load      {load_seconds:.2f} s" + ("" if s.compile_seconds is None else f"; kernels made ready in {s.compile_seconds:.2f} s"),
        )
    )
