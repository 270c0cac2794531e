"""Ways to spoil a model folder."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

Spoil = Callable[[Path], None]
WEIGHTS = "model.safetensors"


def edit(name: str, **changes: Any) -> Spoil:
    """Set keys of a JSON file; None in `changes` writes null, ... deletes the key."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return spoil


def config(**changes: Any) -> Spoil:
    return edit("config.json", **changes)


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None


def delete(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: int) -> Spoil:
    """Keep the first `keep` bytes; below 0 drops that many from the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def tensors(**changes: Any) -> Spoil:
    """Replace tensors (dots written as __): a function of the old array, an array, or ... to leave it out."""

    def spoil(folder: Path) -> None:
        arrays = load_file(folder / WEIGHTS)
        for name, change in ((name.replace("__", "."), change) for name, change in changes.items()):
            if change is ...:
                del arrays[name]
            else:
                arrays[name] = change(arrays[name]) if callable(change) else change
        save_file(arrays, folder / WEIGHTS)

    return spoil


def header(change: Callable[[dict], Any]) -> Spoil:
    """Rewrite the safetensors header and leave the data as it is."""

    def spoil(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


def sharded(**more: str) -> Spoil:
    """Turn the file into the one shard of an index, and name further tensors (dots written as __) and their files in it."""

    def spoil(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), "shard-1.safetensors")
        names |= {name.replace("__", "."): file for name, file in more.items()}
        (folder / WEIGHTS).rename(folder / "shard-1.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))

    return spoil
