"""unisparse-np eval: what sparse attention costs a model in quality, on tasks, on a text, or in quoting."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidInput
from .backend import choose_backend
from .config_text import TUNED, attentions_of
from .options import CONFIG_FILE, SectionedCommand, Size, flag, in_section, measuring_run_options, output_options, use_device
from .progress import CountBar

if TYPE_CHECKING:
    from ..model.tokenizer import Tokenizer

_TITLES = {
    "ruler": "RULER's tasks, scored by string match",
    "questions": "Questions, scored by string match",
    "text": "Predictions of a text, over the second half of each window",
    "copy": "Quoting 32 tokens after a cue of 48",
}
SUITES = ("ruler", "questions", "text", "copy")
_USED_BY = {"text": ("text", "copy", "ruler"), "questions": ("questions",), "tasks": ("ruler",), "raw": ("ruler", "questions"),
            "lengths": ("ruler", "text", "copy")}  # fmt: skip

_what_options = in_section(
    "What to measure",
    flag("-m", "--model", "model_dir", metavar="DIR", required=True, help="Folder with config.json, tokenizer.json and safetensors."),
    flag("--suite", type=click.Choice(SUITES), default="ruler", show_default=True,
         help="ruler: 13 long-context tasks. questions: those of a file. text: predictions of a text. copy: verbatim quoting."),
    flag("--length", "lengths", type=Size(), multiple=True,
         help="Tokens of an example, prompt and answer. Default: 4K. Several with --suite ruler."),
    flag("-n", "--count", type=Size(), help="Examples of each task and length (default 10), or windows of text (default 8 or all)."),
    flag("--seed", type=int, default=0, show_default=True, help="Decides needles, questions and which windows come first."),
    flag("--tasks", metavar="NAME,...", help="Only these RULER tasks."),
    flag("--text", "text_file", metavar="FILE",
         help="Text of the text and copy suites (default: Python's language reference), and RULER's background instead of made-up prose."),
    flag("--questions", metavar="FILE",
         help='Questions, one JSON object a line: {"prompt": ..., "answers": [...], "match": "all"|"part", "max_tokens": 64}.'),
    flag("--raw", is_flag=True, help="Prompts as they stand, without the model's chat template."),
)  # fmt: skip

_config_options = in_section(
    "Attention",
    flag("--config", "configs", multiple=True, metavar="TEXT",
         help="One to compare with dense; several times for several. A preset (default, balanced, precise, paper), tuned "
              "(unisparse.json beside the model), and settings named as generate's flags: paper,attn-top-p=0.9,k-compress=4. "
              "Unset: what generate would use."),
)  # fmt: skip

_file_options = in_section(
    "Results",
    flag("--results", metavar="FILE", help="Examples are appended here, and a stopped run goes on. Default: eval-MODEL-SUITE.jsonl."),
    flag("--plot", metavar="FILE", help="Also draw the figures as .png, .svg or .pdf. Needs: pip install 'unisparse-np[plot]'"),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="Measure what sparse attention costs a model.")
@_what_options
@_config_options
@_file_options
@measuring_run_options
@output_options
def eval(
    model_dir: str, suite: str, configs: tuple[str, ...], results: str | None, plot: str | None, backend: str, dtype: str,
    max_context: int | None, device: int | None, as_json: bool, quiet: bool, **what: Any,
) -> None:  # fmt: skip
    """Measure what sparse attention costs a model: dense and any number of configs on the same examples.

    \b
    ruler      score by RULER's string match, share of the dense score
    questions  the same for questions of your own
    text       KL(dense || sparse) per token, top-1 agreement, perplexity (second half of each window), KL by position
    copy       NLL and exact match of 32 tokens quoted from far back, after a cue of 48

    Intervals are 95%. Dense is always measured.

    \b
    unisparse-np eval -m models/smollm2 --suite text --text book.txt --config default --config precise
    unisparse-np eval -m models/llama --length 8K --length 32K --config paper --config precise,row-threshold=0.03
    """
    attentions = attentions_of(model_dir, configs)
    _check_flags(suite, what)
    use_device(device, backend)
    backend = choose_backend(backend, quiet, device)
    if not quiet and any(label.split(",")[0] == TUNED for label in attentions):
        click.echo(f"tuned     {Path(model_dir) / CONFIG_FILE}", err=True)
    from ..evaluation.plot import check_plot, plot_summary  # late, so that help and usage errors come at once
    from ..evaluation.report import as_tables, summarise
    from ..evaluation.results import ResultsFile
    from ..evaluation.suite import describe_run, records_of, run_suite
    from ..model.loading import load

    if plot is not None:
        check_plot(Path(plot))
    model, tokenizer = load(model_dir, backend=backend, dtype=dtype, max_context=max_context)
    chosen = _suite(suite, tokenizer, **what)
    chosen.check(model)
    for attention in attentions.values():
        model.new_cache(1, attention)  # has a list of another number of layers refused
    path = Path(results or f"eval-{Path(model_dir).resolve().name}-{suite}.jsonl")
    run = describe_run(chosen, Path(model_dir), model, attentions)
    with ResultsFile(path, run) as file:
        stopped = False
        with CountBar("Measuring", quiet) as bar:
            try:
                run_suite(chosen, model, tokenizer, attentions, file, bar)
            except KeyboardInterrupt:
                stopped = True
        records = records_of(chosen, file)
    summary = summarise(suite, records)
    if as_json:
        click.echo(json.dumps({"run": run, "complete": not stopped, "results": str(path), **summary}))
    else:
        click.echo(f"{_TITLES[suite]}; {run['model'].split()[0]}, seed {what['seed']}\n")
        click.echo(as_tables(suite, summary))
    if plot is not None and records:
        plot_summary(suite, summary, Path(plot))
    if stopped:
        click.echo(f"stopped after {len(records)} of {len(chosen.examples())} examples: the same command goes on from {path}", err=True)
        raise KeyboardInterrupt


def _check_flags(suite: str, what: dict[str, Any]) -> None:
    """Refuse flags that the suite would not use."""
    what = {"text": what["text_file"], **what}
    for name, suites in _USED_BY.items():
        if what[name] and suite not in suites:
            shown = "length" if name == "lengths" else name
            raise InvalidInput(f"--{shown} has no effect with --suite {suite}, only with {' and '.join(suites)}: drop one of the two")
    if suite == "questions" and what["questions"] is None:
        raise InvalidInput("--suite questions has no questions: name a file with --questions FILE")
    if suite in ("text", "copy") and len(what["lengths"]) > 1:
        raise InvalidInput(f"--length is given {len(what['lengths'])} times, but --suite {suite} takes one")


def _suite(
    name: str, tokenizer: Tokenizer, lengths: tuple[int, ...], count: int | None, seed: int, tasks: str | None, text_file: str | None,
    questions: str | None, raw: bool,
) -> Any:  # fmt: skip
    """The suite that the flags describe."""
    from ..evaluation.copy_suite import CopySuite
    from ..evaluation.haystack import python_reference, read_text
    from ..evaluation.question_suite import QuestionFileSuite, RulerSuite
    from ..evaluation.ruler_tasks import TASKS
    from ..evaluation.text_suite import TextSuite
    from ..evaluation.windows import Windows

    lengths = tuple(dict.fromkeys(lengths)) or (4096,)
    text = None if text_file is None else read_text(Path(text_file))
    if name == "ruler":
        chosen = tuple(TASKS) if tasks is None else tuple(dict.fromkeys(task.strip() for task in tasks.split(",")))
        return RulerSuite(tokenizer, lengths, count or 10, seed, chosen, raw, text)
    if name == "questions":
        assert questions is not None
        return QuestionFileSuite(tokenizer, Path(questions), count, raw)
    windows = Windows(tokenizer, python_reference() if text is None else text, lengths[0], seed, count, most=8)
    return TextSuite(windows) if name == "text" else CopySuite(windows)
