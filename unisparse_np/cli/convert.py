"""unisparse-np convert: a GGUF file becomes a model folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import click

from .options import SectionedCommand, flag, in_section, output_options

_convert_options = in_section(
    "Conversion",
    flag("--dtype", type=click.Choice(["auto", "float16", "bfloat16", "float32"]), default="auto", show_default=True,
         help="Type of the written weights. auto: as in the file, and float16 where that is quantised, which loses least."),
    flag("--tokenizer", "tokenizer_file", metavar="FILE", help="Copy this tokenizer.json instead of rebuilding the one in the GGUF file."),
    flag("--force", is_flag=True, help="Replace DIR if an earlier convert wrote it."),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Turn a GGUF file into a model folder.")
@click.argument("gguf_file", metavar="FILE.gguf")
@click.argument("folder", metavar="DIR")
@_convert_options
@output_options
def convert(gguf_file: str, folder: str, dtype: str, tokenizer_file: str | None, force: bool, as_json: bool, quiet: bool) -> None:
    """Turn a GGUF file into a model folder for --model.

    DIR gets model.safetensors, config.json, tokenizer.json, tokenizer_config.json (with the chat template) and
    generation_config.json. Architectures: llama (also Mistral), qwen2, qwen3.

    \b
    pip install 'unisparse-np[gguf]'    # what convert needs
    unisparse-np convert SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
    """
    from ..model.gguf import convert as convert_gguf  # late, so that help and usage errors come at once

    with ExitStack() as stack:
        progress = None if quiet or as_json else _progress_bar(stack)
        done = convert_gguf(gguf_file, folder, dtype=dtype, tokenizer_file=tokenizer_file, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps(asdict(done)))
        return
    click.echo(
        f"{done.folder}: {done.architecture}, {done.parameters / 1e6:,.1f} million parameters, {done.dtype}, "
        f"{done.weight_bytes / 1e6:,.0f} MB, tokenizer {done.tokenizer}"
    )
    if quiet:
        return
    if done.lost_bytes:
        click.echo(f"The tokenizer has no token for {done.lost_bytes} of the 243 bytes of UTF-8 text and drops them.", err=True)
    if not done.has_chat_template:
        click.echo("The file has no chat template: prompts will be continued as they stand.", err=True)


def _progress_bar(stack: ExitStack) -> Callable[[int, int], None] | None:
    """A bar on stderr that takes (bytes written, bytes in all); None where stderr is no terminal."""
    if not sys.stderr.isatty():
        return None
    bar = stack.enter_context(click.progressbar(length=1, label="Converting", file=sys.stderr))

    def show(done: int, total: int) -> None:
        bar.length = total
        bar.update(done - bar.pos)

    return show
