"""unisparse-np inspect: which blocks every layer and head kept, as a table, pictures, arrays or a page."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config_file import CONFIG_FILE
from ..errors import InvalidInput
from .options import (
    SectionedCommand,
    config_file_decides,
    flag,
    flag_name,
    in_section,
    output_options,
    prefill_attention_options,
    resolve_attention,
    run_options,
)
from .progress import PrefillBar
from .reading import Reading, check_prompt, open_reading, prompt_options

if TYPE_CHECKING:
    from ..inspection.capture import Capture
    from ..inspection.report_page import Focus
    from ..model.llama import Attention

_inspect_options = in_section(
    "What to show",
    flag("--layer", "layers", type=int, multiple=True, metavar="N", help="Only this layer. Can be given several times. Default: all."),
    flag("--compare", metavar="FLAGS",
         help='Read the prompt a second time with these attention flags, such as --compare "--preset paper", and show both.'),
    flag("--no-truth", is_flag=True, help="Leave out dense attention's mass on the blocks, which takes as long as dense attention."),
    flag("--html", metavar="FILE", help="Write a page to explore, which opens from disk: masks, scores and the text of every block."),
    flag("--png", metavar="DIR", help="Write density.png and a picture of every layer's masks into this folder."),
    flag("--npz", metavar="FILE", help="Write scores, masks and reasons as NumPy arrays."),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Show which blocks each layer and head kept, and why.")
@prompt_options
@_inspect_options
@prefill_attention_options
@run_options
@output_options
def inspect(
    layers: tuple[int, ...], compare: str | None, no_truth: bool, html: str | None, png: str | None, npz: str | None, as_json: bool,
    quiet: bool, **reading_flags: Any,
) -> None:  # fmt: skip
    """Show which blocks each layer and head kept of a prompt, and what they gave up.

    Prints the density of every layer and head. Add --html for a page to explore: block masks, scores, and the very text
    of the blocks under the pointer; --compare puts a second config beside the first.

    \b
    unisparse-np inspect -m examples/needle-llama -p examples/needle-llama/prompts/needle-2k.txt --raw --html report.html
    unisparse-np inspect -m models/smollm2 -p chapter.txt --raw --compare "--preset paper" --html report.html
    """
    from ..inspection.density_table import densities_as_dict, density_table  # late, so that help and usage errors come at once

    targets = Targets(html, png, npz)
    if compare is not None and (png is not None or npz is not None):
        raise InvalidInput(
            "--compare shows two configs in the table and the page, but --png and --npz hold one: drop it, or run inspect twice"
        )
    if no_truth and not targets.use_truth:
        raise InvalidInput("--no-truth has no effect without --html or --npz: drop it")
    other = None if compare is None else compared_attention(reading_flags["model_dir"], compare)
    reading = open_reading(**reading_flags, quiet=quiet)
    attentions = [(attention_label(reading_flags["model_dir"], reading_flags["attention_flags"]), reading.attention)]
    if compare is not None and other is not None:
        check_prompt(reading, other)
        attentions.append((compare, other))
    with_truth = targets.use_truth and not no_truth
    captures = [capture_reading(reading, attention, label, layers or None, with_truth, quiet) for label, attention in attentions]
    targets.write(captures, reading)
    if as_json:
        click.echo(json.dumps({"tokens": len(reading.token_ids), "configs": [densities_as_dict(capture) for capture in captures]}))
    else:
        click.echo("\n\n".join(density_table(capture) for capture in captures))


class Targets:
    """The files to write, checked before any work, and written whole or not at all."""

    def __init__(self, html: str | None, png: str | None, npz: str | None) -> None:
        from ..inspection import files, pictures

        self.page = None if html is None else files.check_file("--html", html, ".html")
        self.arrays = None if npz is None else files.check_file("--npz", npz, ".npz")
        self.folder = None if png is None else files.check_new_folder("--png", png)
        if self.folder is not None:
            pictures.check_matplotlib()

    @property
    def use_truth(self) -> bool:
        """Whether a file would hold dense attention's masses."""
        return self.page is not None or self.arrays is not None

    def write(self, captures: list[Capture], reading: Reading) -> None:
        """Make every file in memory first, then write."""
        from ..inspection.files import as_npz, write_whole
        from ..inspection.pictures import draw_pictures
        from ..inspection.report_page import Focus

        files: dict[Path, bytes] = {}
        if self.page is not None:
            layers = list(captures[0].layers)
            focus = Focus(layers[len(layers) // 2], 0, -1)
            files[self.page] = page_of(captures, reading, focus)
        if self.arrays is not None:
            files[self.arrays] = as_npz(captures[0], reading.token_ids)
        if self.folder is not None:
            files |= {self.folder / name: png for name, png in draw_pictures(captures[0], len(reading.token_ids)).items()}
            self.folder.mkdir(exist_ok=True)
        for path, content in files.items():
            write_whole(path, content)


def capture_reading(
    reading: Reading, attention: Attention, label: str, layers: tuple[int, ...] | None, with_truth: bool, quiet: bool
) -> Capture:
    """Read the prompt with this attention and keep what every layer selected, with a bar on a terminal."""
    from ..inspection.capture import capture

    with PrefillBar(quiet) as bar:
        return capture(
            reading.model, reading.token_ids, attention, label=label, layers=layers, with_truth=with_truth,
            chunk_size=reading.chunk_size, progress=bar,
        )  # fmt: skip


def page_of(captures: list[Capture], reading: Reading, focus: Focus) -> bytes:
    """The report page."""
    from ..inspection.report_page import report_page

    return report_page(captures, reading.token_ids, reading.tokenizer, reading.model_name, focus)


def compared_attention(model_dir: str, flags: str) -> Attention:
    """What --compare asks for. Raises InvalidInput when its text is not attention flags."""

    @click.command(add_help_option=False)
    @prefill_attention_options
    def parse(attention: str, attention_flags: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return attention, attention_flags

    try:
        attention, attention_flags = parse.main(args=shlex.split(flags), standalone_mode=False)
    except (click.ClickException, ValueError) as error:
        reason = error.format_message() if isinstance(error, click.ClickException) else str(error)
        raise InvalidInput(f'--compare {flags!r}: {reason.rstrip(".")}: give attention flags, such as --compare "--preset paper"') from None
    if not attention_flags:
        raise InvalidInput(f'--compare {flags!r} names no change: give attention flags, such as --compare "--preset paper"')
    return resolve_attention(model_dir, attention, attention, attention_flags)[0]


def attention_label(model_dir: str, attention_flags: dict[str, Any]) -> str:
    """Where the attention comes from: the flags that were given, as they are typed, over unisparse.json where that decides the rest."""
    typed = " ".join(f"--{flag_name(name)} {value}" for name, value in attention_flags.items())
    if config_file_decides(model_dir, attention_flags):
        return f"{CONFIG_FILE} {typed}".rstrip()
    return typed or "the default preset"
