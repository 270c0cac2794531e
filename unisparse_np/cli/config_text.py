"""A config in one piece of text, as --config takes it: `precise`, or `paper,attn-top-p=0.9,k-compress=4`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..config import PRESETS
from ..config_file import CONFIG_FIELDS, CONFIG_FILE
from ..errors import InvalidInput
from .options import Attention, ShareOrOff, Size, SizeOrOff, config_from_flags

TUNED = "tuned"
_TYPES: dict[str, click.ParamType] = {
    "top_p": ShareOrOff(), "row_threshold": ShareOrOff(), "key_anchors": click.INT, "sink_blocks": click.INT, "local_blocks": click.INT,
    "top_p_compress": SizeOrOff(),
}  # fmt: skip


def attentions_of(model_dir: str, texts: Sequence[str]) -> dict[str, Attention]:
    """Label -> attention: dense first, then what each text says; without any text what `generate` would use.

    Raises:
        InvalidInput: a text that says nothing, or the same as another.
        CheckpointError: unisparse.json is broken.
    """
    has_file = (Path(model_dir) / CONFIG_FILE).is_file()
    labels = list(texts) or [TUNED if has_file else "default"]
    attentions: dict[str, Attention] = {"dense": "dense"}
    for label in labels:
        if label == "dense":
            continue
        if label in attentions:
            raise InvalidInput(f"--config {label} is given twice: drop one")
        attentions[label] = _attention(model_dir, label, has_file)
    return attentions


def _attention(model_dir: str, text: str, has_file: bool) -> Attention:
    first, *rest = [part.strip() for part in text.split(",")]
    flags: dict[str, Any] = {}
    if first == TUNED:
        if not has_file:
            raise InvalidInput(f"--config {text}: {model_dir} has no {CONFIG_FILE}: make one with unisparse-np tune")
    elif first in PRESETS:
        flags["preset"] = first
    else:
        flags["preset"] = "default"
        rest = [first, *rest]
    for part in rest:
        name, equals, value = part.partition("=")
        name = {"attn-top-p": "top-p"}.get(name, name).replace("-", "_")
        if not equals or name not in ("compress", *CONFIG_FIELDS):
            raise InvalidInput(
                f"--config {text}: {part!r} is neither a setting nor, in first place, one of dense, {', '.join(PRESETS)}, {TUNED}: "
                "give settings as name=value, named as the attention flags of generate, such as attn-top-p=0.9 or k-compress=4"
            )
        try:
            flags[name] = _TYPES.get(name, Size()).convert(value, None, None)
        except click.BadParameter as error:
            raise InvalidInput(f"--config {text}: {name}: {error.message}") from None
    try:
        return config_from_flags(model_dir, flags)
    except InvalidInput as error:
        raise InvalidInput(f"--config {text}: {str(error).removeprefix('attention flags: ').replace('--', '')}") from None
