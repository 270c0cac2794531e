"""Flags that several commands share, and how they become a config.

Every attention flag is unset unless given. What is unset comes from --preset, else from unisparse.json beside the
model, else from the default. `off` on the command line is None in the config.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ..attention import AttentionConfig
from ..config import PRESETS, UniSparseConfig
from ..config_file import CONFIG_FIELDS, CONFIG_FILE, read_config_file
from ..errors import InvalidInput

Attention = AttentionConfig | list[UniSparseConfig]  # one for all layers, or one a layer
OFF = "off"
_SIZE_UNITS = {"": 1, "K": 1024, "M": 1024**2}


class Size(click.ParamType):
    """A count of tokens, in which 8K means 8192 and 1M means 1048576."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+)([KM]?)", value.strip().upper())
        if match is None or int(match[1]) == 0:
            self.fail(f"{value!r} is not a size: give a whole number above 0, such as 8192 or 8K", param, ctx)
        return int(match[1]) * _SIZE_UNITS[match[2]]


class ShareOrOff(click.ParamType):
    """A number, or `off`. Its range is checked by UniSparseConfig."""

    name = "share|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if isinstance(value, float) or value.lower() == OFF:
            return value.lower() if isinstance(value, str) else value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor `{OFF}`", param, ctx)


class SizeOrOff(Size):
    """A count of tokens, or `off`."""

    name = "size|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.lower() == OFF:
            return OFF
        return super().convert(value, param, ctx)


class SectionedCommand(click.Command):
    """A command whose help lists its options under headings, in the order they were declared."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and not isinstance(param, click.Argument):  # the usage line names those
                sections.setdefault(getattr(param, "section", "Help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _SectionedOption(click.Option):
    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


def in_section(section: str, *declarations: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[Callable], Callable]:
    """A decorator that adds options, each (names, attributes of click.option), under one heading of the help."""

    def decorate(command: Callable) -> Callable:
        for names, attributes in reversed(declarations):
            command = click.option(*names, cls=_SectionedOption, section=section, **attributes)(command)
        return command

    return decorate


def flag(*names: str, **attributes: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """One option for in_section: its names and what click.option takes."""
    return names, attributes


_PREFILL = (
    flag("--attention", type=click.Choice(["unisparse", "dense"]), default="unisparse", show_default=True,
         help="How the prompt is read: sparse, or every token with every earlier one."),
)  # fmt: skip
_DECODE = (
    flag("--decode-attention", type=click.Choice(["dense", "unisparse"]), default="dense", show_default=True,
         help="How each new token looks back at the text."),
)  # fmt: skip
_KNOBS = (
    flag("--preset", type=click.Choice(list(PRESETS)),
         help=f"Start from a named set of the values below. Unset: {CONFIG_FILE} in the model's folder, else default."),
    flag("--attn-top-p", "top_p", type=ShareOrOff(),
         help="Keep the fewest key blocks that together hold this share of the estimated attention. Default: 0.95."),
    flag("--row-threshold", type=ShareOrOff(),
         help="Also keep a block that some few neighbouring queries alone give more than this share. Default: off."),
    flag("--block-size", type=Size(), help="Tokens in a block, the unit that is kept or dropped. Default: 128."),
    flag("--compress", type=Size(), help="Tokens averaged into one to score blocks; sets both of the next two. Default: 8."),
    flag("--q-compress", type=Size(), help="The same for queries alone."),
    flag("--k-compress", type=Size(), help="The same for keys alone."),
    flag("--top-p-compress", type=SizeOrOff(),
         help="Tokens averaged into one for --attn-top-p alone, beside --row-threshold, which keeps those above. Default: off."),
    flag("--head-compress", type=Size(), help="Neighbouring query heads averaged into one to score blocks. Default: 1 (off)."),
    flag("--key-anchors", type=int, help="Keys that stay visible in every dropped block, 0 to 8. Default: 1."),
    flag("--sink-blocks", type=int, help="Blocks at the start of the text that are always kept. Default: 1."),
    flag("--local-blocks", type=int, help="Blocks just before the current one that are always kept. Default: 1."),
)  # fmt: skip

_RUN_FLAGS = (
    flag("--backend", type=click.Choice(["auto", "reference", "numba", "cupy"]), default="auto", show_default=True,
         help="What computes. auto: cupy where CuPy and a GPU are present, else reference (NumPy)."),
    flag("--dtype", default="auto", show_default=True,
         help="How weights are held: float32, float16 or bfloat16. auto: as the backend computes best."),
    flag("--max-context", type=Size(), help="Allow prompt and answer together this many tokens, more than the model was made for."),
    flag("--device", type=int, help="Number of the GPU to use, where there are several."),
)  # fmt: skip
_CHUNK_FLAG = flag("--chunk-size", type=Size(), help="Tokens of the prompt read at a time. Bounds memory; does not change the answer.")

run_options = in_section("Running", *_RUN_FLAGS[:2], _CHUNK_FLAG, *_RUN_FLAGS[2:])
measuring_run_options = in_section("Running", *_RUN_FLAGS)  # for commands that choose their chunks themselves

check_finite_option = in_section(
    "Running",
    flag("--check-finite", is_flag=True, help="Look for NaN and infinity after every half layer and name the first place. Slower."),
)

output_options = in_section(
    "Output",
    flag("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of text."),
    flag("-q", "--quiet", is_flag=True, help="No progress and no statistics on stderr."),
)


def attention_options(command: Callable) -> Callable:
    """Attention of prefill and decode, and the knobs of the algorithm; knobs that were given arrive as one dict, `attention_flags`."""
    return in_section("Attention", *_PREFILL, *_DECODE, *_KNOBS)(_collecting_knobs(command))


def prefill_attention_options(command: Callable) -> Callable:
    """The same without the attention of decode, for commands that only read."""
    return in_section("Attention", *_PREFILL, *_KNOBS)(_collecting_knobs(command))


def config_options(command: Callable) -> Callable:
    """The knobs of the algorithm alone, for commands that set sparse beside dense."""
    return in_section("Attention", *_KNOBS)(_collecting_knobs(command))


def _collecting_knobs(command: Callable) -> Callable:
    @functools.wraps(command)
    def wrapped(*args: Any, **values: Any) -> Any:
        flags = {name: values.pop(name) for name in ("preset", "compress", *CONFIG_FIELDS)}
        given = {name: value for name, value in flags.items() if value is not None}
        return command(*args, attention_flags=given, **values)

    return wrapped


def resolve_attention(model_dir: str, attention: str, decode_attention: str, flags: dict[str, Any]) -> tuple[Attention, Attention]:
    """The attention of prefill and of decode, from the flags that were given; a list where unisparse.json gives one a layer.

    Raises:
        InvalidInput: a value breaks its rule, or flags were given that nothing would use.
        CheckpointError: unisparse.json is broken.
    """
    if attention == decode_attention == "dense":
        if flags:
            raise InvalidInput(f"--{flag_name(next(iter(flags)))} has no effect with --attention dense: drop one of the two")
        return "dense", "dense"
    config = config_from_flags(model_dir, flags)
    return (config if attention == "unisparse" else "dense"), (config if decode_attention == "unisparse" else "dense")


def config_from_flags(model_dir: str, flags: dict[str, Any]) -> UniSparseConfig | list[UniSparseConfig]:
    """The values given, over the preset named, or over unisparse.json beside the model, or over the default. Raises as above."""
    base = PRESETS[flags["preset"]]() if "preset" in flags else read_config_file(Path(model_dir)) or UniSparseConfig()
    changes: dict[str, Any] = {}
    if "compress" in flags:
        changes = {"q_compress": flags["compress"], "k_compress": flags["compress"]}
    changes |= {name: None if value == OFF else value for name, value in flags.items() if name in CONFIG_FIELDS}
    try:
        return replace(base, **changes) if isinstance(base, UniSparseConfig) else [replace(config, **changes) for config in base]
    except InvalidInput as error:
        raise InvalidInput(f"attention flags: {as_typed(str(error))}") from None


def flag_name(field: str) -> str:
    """What a config's field is called on the command line, without dashes in front."""
    return {"top_p": "attn-top-p"}.get(field, field.replace("_", "-"))


def as_typed(message: str) -> str:
    """A message about a config in the words of the command line: flags for fields, `off` for None."""
    message = re.sub(rf"\b({'|'.join(CONFIG_FIELDS)})\b", lambda field: f"--{flag_name(field[1])}", message)
    return re.sub(r"\bNone\b", OFF, message)


def config_file_decides(model_dir: str, flags: dict[str, Any]) -> bool:
    """Whether unisparse.json beside the model gives what the attention flags leave open."""
    return "preset" not in flags and (Path(model_dir) / CONFIG_FILE).is_file()


def note_config_file(model_dir: str, flags: dict[str, Any]) -> None:
    """Say on stderr that unisparse.json beside the model decides, where it does."""
    if config_file_decides(model_dir, flags):
        click.echo(f"attention {Path(model_dir) / CONFIG_FILE} (--preset default passes it by)", err=True)


def use_device(device: int | None, backend: str) -> None:
    """Let this process see one GPU only. Must run before CuPy or Numba is imported.

    Raises:
        InvalidInput: the reference backend has no device, or there is no GPU of that number.
    """
    if device is None:
        return
    if backend == "reference":
        raise InvalidInput(f"--device {device} picks a GPU, but --backend reference runs on the CPU: drop one of the two")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else None
    if device < 0 or (names is not None and device >= len(names)):
        raise InvalidInput(f"--device {device} is not a GPU of this machine: give 0 or higher" + (f", below {len(names)}" if names else ""))
    os.environ["CUDA_VISIBLE_DEVICES"] = names[device] if names else str(device)
