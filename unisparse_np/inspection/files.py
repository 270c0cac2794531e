"""Files that are whole or not there."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import InvalidInput
from .capture import Capture


def check_file(flag: str, path: str, ending: str) -> Path:
    """The path to write later. Raises InvalidInput when its folder does not exist or the name has another ending."""
    target = Path(path)
    if target.suffix.lower() != ending:
        raise InvalidInput(f"{flag} {path} does not end in {ending}: name it so, such as report{ending}")
    if target.is_dir():
        raise InvalidInput(f"{flag} {path} is a folder: name a file in it, such as {target / ('report' + ending)}")
    check_folder(flag, str(target.parent))
    return target


def check_folder(flag: str, path: str) -> Path:
    """The folder to write into. Raises InvalidInput when it does not exist or may not be written."""
    folder = Path(path)
    if not folder.is_dir():
        raise InvalidInput(f"{flag}: the folder {path} does not exist: make it first, or name one that does")
    if not os.access(folder, os.W_OK):
        raise InvalidInput(f"{flag}: the folder {path} may not be written: name another")
    return folder


def check_new_folder(flag: str, path: str) -> Path:
    """A folder that is there, or that can be made in one that is. Raises InvalidInput when neither holds."""
    folder = Path(path)
    if folder.is_dir():
        return check_folder(flag, path)
    if folder.exists():
        raise InvalidInput(f"{flag} {path} is a file: name a folder")
    check_folder(flag, str(folder.parent))
    return folder


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename: a reader never sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written ({error.strerror}): free some space, or name another place") from None
    finally:
        temporary.unlink(missing_ok=True)


def as_npz(captured: Capture, token_ids: Sequence[int]) -> bytes:
    """token_ids [T], and for each layer N layer_N_scores, _kept, _reasons and, where measured, _true_mass [Hq, blocks, blocks]."""
    arrays: dict[str, np.ndarray] = {"token_ids": np.asarray(token_ids, dtype=np.int32)}
    for number, layer in captured.layers.items():
        arrays |= {f"layer_{number}_scores": layer.scores, f"layer_{number}_kept": layer.kept, f"layer_{number}_reasons": layer.reasons}
        if layer.true_mass is not None:
            arrays[f"layer_{number}_true_mass"] = layer.true_mass
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()
