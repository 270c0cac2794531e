"""unisparse-np audit: does a backend compute what the reference does, and is sparse attention safe for a model?"""

from __future__ import annotations

import json
from typing import Any

import click

from ..errors import InvalidInput
from .backend import choose_backend
from .options import SectionedCommand, flag, in_section, output_options, prefill_attention_options, run_options, use_device
from .reading import MODEL, PROMPT_FLAGS, PhaseBar, Reading, open_reading

_audit_options = in_section(
    "What to audit",
    MODEL,
    *PROMPT_FLAGS,
    flag("--stages", is_flag=True, help="With --model: compare the backend's stages on the model's own q, k and v."),
    flag("--layer", "layers", type=int, multiple=True, metavar="N",
         help="With --stages: this layer. Can be given several times. Default: the first, the middle and the last."),
    flag("--heads", "all_heads", is_flag=True, help="Print a line for every head too."),
)  # fmt: skip


@click.command(cls=SectionedCommand, short_help="What does sparse attention lose? Does a backend compute right?")
@_audit_options
@prefill_attention_options
@run_options
@output_options
def audit(
    model_dir: str | None, prompt: str | None, text: str | None, raw: bool, stages: bool, layers: tuple[int, ...], all_heads: bool,
    attention: str, attention_flags: dict[str, Any], backend: str, dtype: str, chunk_size: int | None, max_context: int | None,
    device: int | None, as_json: bool, quiet: bool,
) -> None:  # fmt: skip
    """Check a backend against the reference, or a model's sparse attention against dense.

    Without a model: every stage of the backend on random q, k and v, against the NumPy reference in float64. Exit code 1
    on a mismatch. With a model and a prompt: what sparse attention changes in its predictions, how much of the true
    attention each layer and head keeps, where it loses most, and what would mend that, tried out.

    \b
    unisparse-np audit --backend reference
    unisparse-np audit -m examples/needle-llama -p examples/needle-llama/prompts/needle-2k.txt --raw
    unisparse-np audit -m examples/needle-llama -p examples/needle-llama/prompts/needle-2k.txt --raw --stages
    """
    _check_flags(model_dir, prompt, text, raw, stages, layers, all_heads, attention, attention_flags)
    if model_dir is None:
        use_device(device, backend)
        _audit_stages(choose_backend(backend, quiet, device), dtype, None, layers, as_json)
        return
    reading = open_reading(
        model_dir, prompt, text, raw, attention, attention_flags, backend, dtype, chunk_size, max_context, device, quiet
    )  # fmt: skip
    if stages:
        _audit_stages(reading.model.backend.name, dtype, reading, layers, as_json)
    else:
        _audit_model(reading, all_heads, as_json, quiet)


def _check_flags(
    model_dir: str | None, prompt: str | None, text: str | None, raw: bool, stages: bool, layers: tuple[int, ...], all_heads: bool,
    attention: str, attention_flags: dict[str, Any],
) -> None:  # fmt: skip
    """Refuse flags that nothing would use."""
    if model_dir is None:
        given = {
            "--prompt": prompt, "--text": text, "--raw": raw, "--stages": stages, "--layer": layers, "--heads": all_heads,
            "--attention dense": attention == "dense", "an attention flag": attention_flags,
        }  # fmt: skip
        useless = next((name for name, value in given.items() if value), None)
        if useless is not None:
            raise InvalidInput(f"{useless} needs a model: add --model DIR, or leave it out to audit a backend on random inputs")
    elif layers and not stages:
        raise InvalidInput("--layer has no effect without --stages: the audit of a model looks at every layer")
    elif stages and all_heads:
        raise InvalidInput("--heads has no effect with --stages: drop one of the two")


def _audit_stages(backend: str, dtype: str, reading: Reading | None, layers: tuple[int, ...], as_json: bool) -> None:
    """Print the stage table; exit code 1 on a mismatch."""
    from ..inspection.prompt import sparse_configs, sparse_layer
    from ..inspection.stage_audit import DTYPES, USUAL_DTYPES, as_dict, audit_layers, audit_random
    from ..inspection.stage_audit_text import stage_table

    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidInput(f"--dtype {dtype} is not known: give auto, {', '.join(DTYPES)}")
    chosen: list[int] | None = None
    if reading is not None and layers:
        count = reading.model.config.num_hidden_layers
        chosen = sorted({sparse_layer(layer, sparse_configs(reading.attention, count), count) for layer in layers})
    reports = list(audit_random(backend, USUAL_DTYPES if dtype == "auto" else (dtype,)))
    if reading is not None:
        reports += audit_layers(reading.model, reading.token_ids, reading.attention, chosen)
    click.echo(json.dumps(as_dict(reports)) if as_json else stage_table(reports))
    if not all(report.ok for _, report in reports):
        raise click.exceptions.Exit(1)


def _audit_model(reading: Reading, all_heads: bool, as_json: bool, quiet: bool) -> None:
    from ..inspection.model_audit import audit_model
    from ..inspection.model_audit_text import audit_text

    with PhaseBar(quiet) as bar:
        done = audit_model(reading.model, reading.token_ids, reading.attention, chunk_size=reading.chunk_size, progress=bar)
    click.echo(json.dumps(done.as_dict()) if as_json else audit_text(done, all_heads))
