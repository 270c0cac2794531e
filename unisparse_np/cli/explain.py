"""unisparse-np explain: one query block of a real prompt through every step, with its numbers."""

from __future__ import annotations

import json
from typing import Any

import click

from .inspect import attention_label, capture_reading, page_of
from .options import SectionedCommand, flag, in_section, output_options, prefill_attention_options, run_options
from .progress import PrefillBar
from .reading import open_reading, prompt_options

_explain_options = in_section(
    "What to explain",
    flag("--layer", type=int, metavar="N", help="Layer, from 0; -1 is the last. Default: the middle one."),
    flag("--head", type=int, default=0, show_default=True, metavar="N", help="Query head of that layer."),
    flag("--html", metavar="FILE", help="Also write the page of `inspect`, opened at this block."),
    flag("--block", type=int, default=-1, metavar="N", help="Query block of the prompt. Default: the last, where the question usually is."),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Walk one query block through every step, in numbers.")
@prompt_options
@_explain_options
@prefill_attention_options
@run_options
@output_options
def explain(layer: int | None, head: int, block: int, html: str | None, as_json: bool, quiet: bool, **reading_flags: Any) -> None:
    """Walk one query block of a prompt through every step of the algorithm.

    Tokens, composite tokens, scores, the blocks that Top-P keeps with the running sum, the blocks that are forced, the
    output beside dense attention's, and what each step costs, here and at 128K tokens.

    \b
    unisparse-np explain -m examples/needle-llama -p examples/needle-llama/prompts/needle-2k.txt --raw
    """
    from ..inspection.files import check_file, write_whole  # late, so that help and usage errors come at once

    page = None if html is None else check_file("--html", html, ".html")
    reading = open_reading(**reading_flags, quiet=quiet)
    from ..inspection.walkthrough import walk
    from ..inspection.walkthrough_text import walkthrough_text

    with PrefillBar(quiet) as bar:
        walked = walk(
            reading.model, reading.token_ids, reading.attention, layer=layer, head=head, block=block, chunk_size=reading.chunk_size,
            progress=bar,
        )  # fmt: skip
    if page is not None:
        from ..inspection.report_page import Focus

        label = attention_label(reading_flags["model_dir"], reading_flags["attention_flags"])
        captured = capture_reading(reading, reading.attention, label, None, True, quiet)
        write_whole(page, page_of([captured], reading, Focus(walked.layer, walked.head, walked.block)))
    click.echo(json.dumps(walked.as_dict()) if as_json else walkthrough_text(walked, reading.token_ids, reading.tokenizer))
