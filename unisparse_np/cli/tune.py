"""unisparse-np tune: the cheapest config that keeps a model within a stated loss on a text, written beside the model."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..config import PRESETS
from ..config_file import CONFIG_FILE, was_tuned, write_config_file
from ..errors import InvalidInput
from .backend import choose_backend
from .options import SectionedCommand, Size, flag, in_section, measuring_run_options, output_options, use_device
from .progress import CountBar

if TYPE_CHECKING:
    from ..evaluation.search import Search
    from ..evaluation.settle import Settled
    from ..model.llama import Llama

_CURVE_WINDOWS = 4  # of those that the search looks at: what single heads lose and keep is measured there

_search_options = in_section(
    "What to find",
    flag("-m", "--model", "model_dir", metavar="DIR", required=True, help="Folder with config.json, tokenizer.json and safetensors."),
    flag("--text", "text_file", metavar="FILE", help="Text like what the model will read. Default: Python's language reference."),
    flag("--max-kl", type=float, default=0.02, show_default=True,
         help="Most loss: KL(dense || sparse) in nats per token, over the second half of each window."),
    flag("--length", type=Size(), default=4096, show_default=True, help="Tokens of a window; as long as the prompts you care about."),
    flag("--windows", "count", type=Size(), default=2, show_default=True, help="Windows that the search looks at."),
    flag("--held-out", type=Size(), default=2, show_default=True, help="Further windows, on which the bound must hold in the end."),
    flag("--seed", type=int, default=0, show_default=True, help="Decides which windows are taken."),
    flag("--cost", "cost_kind", type=click.Choice(["auto", "model", "time"]), default="auto", show_default=True,
         help="What is made cheap. model: selection and attention as a share of dense attention's products. time: the prefill, measured. "
              "auto: time on a GPU where sparse attention is faster at this length, else model."),
)  # fmt: skip

_file_options = in_section(
    "Results",
    flag("--results", metavar="FILE", help="Probes are appended here, and a stopped run goes on. Default: tune-MODEL.jsonl."),
    flag("--force", is_flag=True, help=f"Replace a {CONFIG_FILE} that tune did not write."),
)  # fmt: skip


_COMPARED = {f"{name} preset": preset() for name, preset in PRESETS.items() if name != "paper"}  # with what was found


@click.command(cls=SectionedCommand, short_help="Find the cheapest config within a loss you allow.")
@_search_options
@_file_options
@measuring_run_options
@output_options
def tune(
    model_dir: str, text_file: str | None, max_kl: float, length: int, count: int, held_out: int, seed: int, cost_kind: str,
    results: str | None, force: bool, backend: str, dtype: str, max_context: int | None, device: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Find the cheapest attention config that keeps a model within a loss, and write it to unisparse.json beside the model.

    Block size, rule (Top-P, row threshold or both) and its value, composite sizes, anchors, and values per head where they pay.
    Windows that the search has not seen decide. generate, audit and eval then use it without being told. Each probe is a
    prefill of all windows, and there are about 35: expect minutes for a small model, hours for a large one on a CPU.

    \b
    unisparse-np tune -m models/smollm2 --text book.txt --max-kl 0.02
    unisparse-np generate -m models/smollm2 -p book.txt
    """
    folder = Path(model_dir)
    _check_target(folder, max_kl, force)
    use_device(device, backend)
    backend = choose_backend(backend, quiet, device)
    from ..evaluation.haystack import python_reference, read_text  # late, so that help and usage errors come at once
    from ..evaluation.head_curves import measure_head_curves
    from ..evaluation.probe import Prober
    from ..evaluation.results import ResultsFile
    from ..evaluation.search import Search
    from ..evaluation.settle import settle
    from ..evaluation.suite import describe_run, require_context
    from ..evaluation.text_suite import TextSuite
    from ..evaluation.windows import Windows
    from ..model.loading import load

    text = None if text_file is None else read_text(Path(text_file))
    model, tokenizer = load(model_dir, backend=backend, dtype=dtype, max_context=max_context)
    require_context(model, length)
    windows = Windows(tokenizer, python_reference() if text is None else text, length, seed, count + held_out)
    if cost_kind == "auto":
        cost_kind = _cost_that_tells(model, windows[0], quiet)
    run = describe_run(TextSuite(windows), folder, model, {"dense": "dense"}) | {"suite": "tune", "cost": cost_kind}
    search_windows, other_windows = range(count), range(count, count + held_out)
    layers = model.config.num_hidden_layers
    curves = partial(measure_head_curves, model, [windows[n] for n in search_windows[:_CURVE_WINDOWS]])
    with ResultsFile(Path(results or f"tune-{folder.resolve().name}.jsonl"), run) as file, CountBar("Probing", quiet) as bar:
        prober = Prober(model, windows, file, cost_kind, _counted(bar, Search.planned_probes(layers) + 2 + len(_COMPARED)))  # type: ignore[arg-type]
        search = Search(lambda attention: prober(attention, search_windows), curves, max_kl, layers)
        try:
            fits = search.run()
            settled, closest = settle(fits, lambda attention: prober(attention, other_windows), max_kl)
            held_out_probes = {name: prober(preset, other_windows) for name, preset in _COMPARED.items()}
        except KeyboardInterrupt:
            bar.__exit__(None, None, None)
            _report_best_so_far(search, file.path)
            raise
    if settled is None:
        raise InvalidInput(_nothing_found(closest, max_kl))
    facts = {"max_kl": max_kl, "kl": settled.probe.kl, "cost": settled.probe.cost, "cost_is": cost_kind, "length": length,
             "windows": [count, held_out], "seed": seed, "text": run["examples"]["text"], "version": run["version"]}  # fmt: skip
    path = write_config_file(folder, settled.attention, facts)  # type: ignore[arg-type]
    _report(search, settled, held_out_probes, path, as_json, quiet)


def _cost_that_tells(model: Llama, token_ids: list[int], quiet: bool) -> str:
    """Measured time on a GPU whose time depends on the attention; otherwise the cost model."""
    from ..evaluation.probe import time_tells

    if model.backend.name == "reference":
        return "model"
    if time_tells(model, token_ids):
        return "time"
    if not quiet:
        click.echo(
            f"{len(token_ids)} tokens are read as fast with dense attention here, so the cost is not the time but the share of products",
            err=True,
        )
    return "model"


def _check_target(folder: Path, max_kl: float, force: bool) -> None:
    """Refuse what would only fail after hours."""
    if not max_kl > 0 or max_kl == float("inf"):
        raise InvalidInput(f"--max-kl {max_kl:g} is no bound that a sparse config can meet: give a number above 0, such as 0.02")
    if folder.is_dir() and not os.access(folder, os.W_OK):
        raise InvalidInput(f"{folder} cannot be written, and the config goes there: make the folder writable, or copy the model")
    if (folder / CONFIG_FILE).exists() and not force and not was_tuned(folder):
        raise InvalidInput(f"{folder / CONFIG_FILE} was not written by tune: move it away, or replace it with --force")


def _counted(bar: CountBar, planned: int) -> Any:
    """A progress callback for probes; the plan grows when more are needed."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        bar(done, max(planned, done + 1))

    return step


def _report_best_so_far(search: Search, path: Path) -> None:
    """What Ctrl-C leaves: nothing is written beside the model."""
    from ..evaluation.tuning_report import fits_table

    if search.fits:
        click.echo(fits_table(search.ranked(), search.max_kl))
    click.echo(f"stopped; nothing was written beside the model. The same command goes on from {path}", err=True)


def _nothing_found(closest: Settled, max_kl: float) -> str:
    kind = closest.fit.kind
    return (
        f"no config keeps KL at {max_kl:g} for less than dense attention: the best found has KL {closest.probe.kl:.4g} at a cost of "
        f"{closest.probe.cost:.3f} ({kind.rule}, block_size {kind.block_size}, q_compress {kind.q_compress}, "
        f"k_compress {kind.k_compress}); nothing was written: give a larger --max-kl or longer windows"
    )


def _report(search: Search, settled: Settled, others: dict[str, Any], path: Path, as_json: bool, quiet: bool) -> None:
    from ..evaluation.tuning_report import composites_answer, fits_table, held_out_table, plain_fit, plain_probe

    fits = search.ranked()
    if as_json:
        answer = {
            "written": str(path), "max_kl": search.max_kl, "tuned": plain_probe(settled.attention, settled.probe),
            "presets": {name: plain_probe(_COMPARED[name], probe) for name, probe in others.items()},
            "fits": [plain_fit(fit) for fit in fits],
        }  # fmt: skip
        click.echo(json.dumps(answer))
        return
    click.echo(fits_table(fits, search.max_kl))
    click.echo(f"\n{held_out_table({'tuned': settled.probe, **others})}\n\n{composites_answer(fits)}")
    if not quiet:
        click.echo(f"wrote {path}: generate, audit and eval use it from now on", err=True)
