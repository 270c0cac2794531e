"""GGUF file -> a folder that this package, and transformers, can load.

Reading and dequantising are the `gguf` package's (pip install 'unisparse-np[gguf]'). Everything is checked before the
first byte is written; the folder appears under its own name only once it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BackendUnavailable, CheckpointError, InvalidInput
from .gguf_metadata import Metadata, hf_config
from .gguf_tensors import DTYPES, check_tensors, targets, write_safetensors
from .gguf_tokenizer import convert_tokenizer

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Conversion:
    """What convert() wrote. lost_bytes: UTF-8 byte values for which the tokenizer has no token (it drops them)."""

    folder: str
    architecture: str
    parameters: int
    dtype: str
    weight_bytes: int
    tokenizer: str
    has_chat_template: bool
    lost_bytes: int


def convert(
    gguf_path: str | Path,
    folder: str | Path,
    *,
    dtype: str = "auto",
    tokenizer_file: str | Path | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Conversion:
    """Convert the GGUF file `gguf_path` into the new folder `folder`.

    dtype: of the weights. "auto" keeps the type of matrices that are not quantised and takes float16 for those that are:
    a dequantised value is a float16 scale times a small integer, of which float16's 11 significant bits lose 7 times less
    than bfloat16's 8 (Q4_1, root mean square). "float32" loses nothing at twice the size.
    tokenizer_file: a tokenizer.json to copy in place of the tokenizer in the file.
    force: replace a folder that an earlier conversion wrote.
    progress(bytes written, bytes in all) is called as the weights are written.

    Raises InvalidInput for a path or dtype that cannot be, BackendUnavailable without the gguf package, CheckpointError
    for a broken or unsupported file, a full disk or a write that failed; then nothing is left behind.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InvalidInput(f"dtype {dtype!r} is unknown; give auto, {', '.join(DTYPES)}.")
    source = Path(gguf_path)
    target = _new_folder(source, Path(folder), force)
    metadata, tensors = _read(source)
    shapes = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in tensors.items()}
    dtype = _best_dtype(tensors) if dtype == "auto" else dtype

    rope_freqs = np.array(tensors["rope_freqs.weight"].data) if "rope_freqs.weight" in tensors else None
    config = hf_config(metadata, shapes, rope_freqs, dtype)
    if config["num_hidden_layers"] > len(tensors):
        raise CheckpointError(f"{source} claims {config['num_hidden_layers']} layers with {len(tensors)} tensors; the file is damaged.")
    table = targets(config, shapes)
    check_tensors(str(source), table, shapes)
    _check_kinds(source, tensors, table)
    text = convert_tokenizer(metadata, config["vocab_size"], None if tokenizer_file is None else Path(tokenizer_file))

    parameters = sum(int(np.prod(item.shape)) for item in table.values())
    with _complete_or_nothing(target, force, room=parameters * DTYPES[dtype][1].itemsize) as staging:
        weight_bytes = write_safetensors(staging / "model.safetensors", str(source), tensors, table, dtype, progress)
        (staging / "tokenizer.json").write_text(text.tokenizer_json, encoding="utf-8")
        _write_json(staging / "tokenizer_config.json", text.tokenizer_config)
        _write_json(staging / "generation_config.json", text.generation_config)
        _write_json(staging / "config.json", config)
    return Conversion(
        folder=str(folder),
        architecture=metadata.architecture,
        parameters=parameters,
        dtype=dtype,
        weight_bytes=weight_bytes,
        tokenizer=text.kind,
        has_chat_template="chat_template" in text.tokenizer_config,
        lost_bytes=text.lost_bytes,
    )


def _new_folder(source: Path, folder: Path, force: bool) -> Path:
    """The absolute path of `folder`, after checking that it can be written and `source` be read."""
    try:
        target = folder.resolve()
        _check_paths(source, target, force)
    except OSError as error:  # a name too long, a folder that may not be listed
        raise InvalidInput(f"{error.filename or folder} cannot be used ({error.strerror}); give another path.") from None
    except RuntimeError:  # what resolve() raises before Python 3.13
        raise InvalidInput(f"{folder} cannot be used (a symbolic link that leads to itself); give another path.") from None
    return target


def _check_paths(source: Path, target: Path, force: bool) -> None:
    if not source.is_file():
        raise InvalidInput(f"{source} is {'a directory' if source.is_dir() else 'not there'}; give the path of a .gguf file.")
    if not target.exists():
        if not (above := _nearest_existing(target)).is_dir():
            raise InvalidInput(f"{target} cannot be made, since {above} is a file or a broken link; give the name of a new folder.")
        return
    if not target.is_dir():
        raise InvalidInput(f"{target} is a file; give the name of a new folder.")
    if not force:
        raise InvalidInput(f"{target} exists; give the name of a new folder, or --force to replace what an earlier convert wrote there.")
    if others := sorted(entry.name for entry in target.iterdir() if entry.name not in FILES):
        raise InvalidInput(f"{target} also holds {others[0]}, which convert did not write and --force would delete; move it away first.")


def _read(source: Path) -> tuple[Metadata, dict[str, Any]]:
    """The metadata, and the gguf package's ReaderTensor by name (mapped, not read)."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise BackendUnavailable("Reading GGUF needs the package gguf, which is not installed: pip install 'unisparse-np[gguf]'") from None
    try:
        reader = GGUFReader(source)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError) as error:  # what its parsing of damaged bytes raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{source} is not a complete GGUF file ({reason}); download it again.") from None
    except OSError as error:
        raise CheckpointError(f"{source} cannot be read ({error.strerror}); check the path and its permissions.") from None
    if reader.byte_order == "S":  # the gguf package does not swap the bytes of tensors
        raise CheckpointError(f"{source} was written for processors of the other byte order; use the usual, little-endian file.")
    return Metadata(str(source), values), {tensor.name: tensor for tensor in reader.tensors}


def _best_dtype(tensors: dict[str, Any]) -> str:
    kinds = {tensor.tensor_type.name for tensor in tensors.values() if len(tensor.shape) > 1}
    return {frozenset({"BF16"}): "bfloat16", frozenset({"F32"}): "float32"}.get(frozenset(kinds), "float16")


def _check_kinds(source: Path, tensors: dict[str, Any], table: dict[str, Any]) -> None:
    """Every tensor of a type that the installed gguf package can dequantise, tried on its first row."""
    from gguf.quants import dequantize

    for name in table:
        try:
            dequantize(np.atleast_2d(tensors[name].data)[:1], tensors[name].tensor_type)
        except NotImplementedError:
            kind = tensors[name].tensor_type.name
            raise CheckpointError(
                f"{source}: {name} is of type {kind}, which the installed gguf package cannot dequantise; choose another quantisation."
            ) from None


@contextmanager
def _complete_or_nothing(target: Path, force: bool, room: int) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, or vanishes if anything goes wrong.

    It lies beside `target`, or in the nearest folder above that exists, so that the last step is one rename.
    room: bytes that must be free before anything is written.
    """
    above = _nearest_existing(target)
    staging = above / f".{target.name}.{os.getpid()}.partial"
    replaced = staging.with_suffix(".replaced")
    try:
        if (free := shutil.disk_usage(above).free) < room:
            raise CheckpointError(f"{target} needs {_megabytes(room)} but {above} has {_megabytes(free)} free; free some space.")
        staging.mkdir()
        yield staging
        _sync(staging)
        if force and target.exists():
            target.rename(replaced)
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.rename(target)
    except OSError as error:
        raise CheckpointError(
            f"Writing {target} failed ({error.strerror}), nothing was kept; free some space or choose another folder."
        ) from None
    finally:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        for leftover in (staging, replaced):
            shutil.rmtree(leftover, ignore_errors=True)


def _nearest_existing(path: Path) -> Path:
    """The nearest thing above path, a link that leads nowhere included."""
    return next(parent for parent in path.parents if os.path.lexists(parent))


def _sync(folder: Path) -> None:
    """Force the files to the disk: some file systems report that they are full only now."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
