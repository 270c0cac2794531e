"""unisparse.json beside a model: the attention that suits it, for one config or one a layer.

One object with the fields of UniSparseConfig. `layers`, where present, is a list of objects, one a layer, with the fields
in which that layer differs. `tuned`, where present, says how the values were found, and changes nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from .config import UniSparseConfig
from .errors import CheckpointError, InvalidInput

CONFIG_FILE = "unisparse.json"
CONFIG_FIELDS = tuple(field.name for field in fields(UniSparseConfig))


def read_config_file(folder: Path) -> UniSparseConfig | list[UniSparseConfig] | None:
    """What unisparse.json in `folder` holds: one config, a list with one a layer, or None where there is no such file.

    Raises:
        CheckpointError: it is broken, or a value breaks its rule.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return None
    values = _read_object(path)
    values.pop("tuned", None)
    layers = values.pop("layers", None)
    _check_fields(path, values)
    if layers is None:
        return _config(path, values)
    if not isinstance(layers, list) or not layers:
        raise CheckpointError(f"{path}: layers is no list of objects: give one object a layer, with the fields in which it differs")
    for changes in layers:
        _check_fields(path, changes)
    return [_config(path, values | changes) for changes in layers]


def write_config_file(folder: Path, attention: UniSparseConfig | Sequence[UniSparseConfig], tuned: dict[str, Any]) -> Path:
    """Write unisparse.json so that it is whole or as it was before; what all layers share stands at the top."""
    configs = [asdict(attention)] if isinstance(attention, UniSparseConfig) else [asdict(config) for config in attention]
    content: dict[str, Any] = dict(configs[0])
    if len(configs) > 1:
        differing = [name for name in CONFIG_FIELDS if any(config[name] != configs[0][name] for config in configs)]
        content = {name: value for name, value in configs[0].items() if name not in differing}
        content["layers"] = [{name: config[name] for name in differing} for config in configs]
    path = folder / CONFIG_FILE
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content | {"tuned": tuned}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def was_tuned(folder: Path) -> bool:
    """Whether unisparse.json in `folder` was written by `write_config_file`, so that it may be written anew."""
    path = folder / CONFIG_FILE
    return path.is_file() and "tuned" in _read_object(path)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}): mend it, delete it, or name a --preset to pass it by") from None
    if not isinstance(values, dict):
        raise CheckpointError(
            f"{path} holds a {type(values).__name__}, but must be one object with fields among {', '.join(CONFIG_FIELDS)}"
        )
    return values


def _check_fields(path: Path, values: Any) -> None:
    if not isinstance(values, dict) or (unknown := sorted(set(values) - set(CONFIG_FIELDS))):
        found = f"unknown field {unknown[0]!r}" if isinstance(values, dict) else f"a {type(values).__name__} as a layer"
        raise CheckpointError(f"{path} holds {found}, but must be one object with fields among {', '.join(CONFIG_FIELDS)}")


def _config(path: Path, values: dict[str, Any]) -> UniSparseConfig:
    try:
        return UniSparseConfig(**values)
    except InvalidInput as error:
        raise CheckpointError(f"{path}: {error}") from None
