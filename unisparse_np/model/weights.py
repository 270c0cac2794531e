"""Weights: a checkpoint's tensors, checked against the config before the first large allocation, read one by one."""

from __future__ import annotations

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, InvalidInput
from .checkpoint import Slot, check_names, check_shapes, expected_tensors, locate, opened
from .config import ModelConfig
from .sharding import WHOLE, Index, Shard, own_tensors, vocabulary_rows

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Field = tuple[int | None, str]  # layer (None: of the whole model) and name of a field of LayerWeights or Weights
PIECE_BYTES = 16 << 20  # of a tensor that is converted, copied and looked at in one go
REOPEN_BYTES = 256 << 20  # read before a file is opened anew


@dataclass
class LayerWeights:
    """One layer. Matrices are [out, in]; q, k, v are stacked into one, and so are gate and up, so that each is one product."""

    input_norm: Any  # [hidden]
    qkv: Any  # [(Hq + 2 Hkv) d, hidden]
    output: Any  # [hidden, Hq d]
    post_attention_norm: Any  # [hidden]
    gate_up: Any  # [2 intermediate, hidden]
    down: Any  # [hidden, intermediate]
    qkv_bias: Any = None  # [(Hq + 2 Hkv) d]
    q_norm: Any = None  # [d]
    k_norm: Any = None  # [d]
    output_bias: Any = None  # [hidden]
    gate_up_bias: Any = None  # [2 intermediate]
    down_bias: Any = None  # [hidden]


@dataclass
class Weights:
    """The whole model. head is the embedding itself where the two are tied."""

    embedding: Any  # [vocab, hidden]
    layers: list[LayerWeights]
    norm: Any  # [hidden]
    head: Any  # [vocab, hidden]


def load_weights(
    folder: Path, config: ModelConfig, layers: Any, dtype: str = "auto", progress: Progress | None = None, shard: Shard = WHOLE
) -> Weights:
    """Read model.safetensors, or the shards of model.safetensors.index.json.

    A tensor at a time goes from the file to where the backend computes; the whole is never held twice.

    Args:
        layers: the backend's layers module, which decides how "auto" is held and where arrays live.
        dtype: how matrices are held: auto, float32, float16, bfloat16 or float64, of those that the backend offers.
        progress: called after each tensor with (bytes done, bytes in all), as held.
        shard: which part of the model this process holds (sharding.py); no more than that part is read.

    Raises:
        CheckpointError: a file is missing, truncated or not safetensors; a tensor is missing, unknown, of a wrong shape
            or dtype; the weights are larger than the memory that is free; a weight is not finite, or does not fit float16
            when that is asked for.
        InvalidInput: an unknown dtype.
    """
    if dtype != "auto" and dtype not in layers.HELD_DTYPES:
        raise InvalidInput(f"dtype={dtype!r} is not known: give auto, {', '.join(layers.HELD_DTYPES)}")
    slots = expected_tensors(config)
    where = locate(folder)
    check_names(where, slots, config)
    held = layers.held_dtype(dtype, check_shapes(folder, where, slots))
    own = own_tensors(config, shard)
    slots, parts = {name: slot for name, (slot, _) in own.items()}, {name: part for name, (_, part) in own.items()}
    _check_room(folder, slots, layers, held)
    try:
        fields = _filled(_allocate(slots, layers, held), folder, where, slots, parts, layers, progress)
    except MemoryError as error:
        traceback.clear_frames(error.__traceback__)  # their variables hold what was read so far
        if layers.memory is not None:
            layers.memory.release()
        raise CheckpointError(
            f"{folder}: the weights do not fit this machine's memory as {held}: try dtype='bfloat16', or a smaller model"
        ) from None
    whole = {field: array for (layer, field), array in fields.items() if layer is None}
    per_layer = [{} for _ in range(config.num_hidden_layers)]  # type: list[dict[str, Any]]
    for (layer, field), array in fields.items():
        if layer is not None:
            per_layer[layer][field] = array
    whole.setdefault("head", whole["embedding"][vocabulary_rows(config.vocab_size, shard)])
    return Weights(layers=[LayerWeights(**fields) for fields in per_layer], **whole)


def _dtype_of(shape: tuple[int, ...], layers: Any, held: np.dtype) -> np.dtype:
    """Matrices as held, vectors (norms and biases) in what the backend adds and multiplies them in."""
    dtype: np.dtype = held if len(shape) > 1 else layers.vector_dtype(held)
    return dtype


def _bytes_of(slots: dict[str, Slot], layers: Any, held: np.dtype) -> int:
    return sum(prod(slot.shape) * _dtype_of(slot.shape, layers, held).itemsize for slot in slots.values())


def _check_room(folder: Path, slots: dict[str, Slot], layers: Any, held: np.dtype) -> None:
    """Raises CheckpointError where a device has less memory free than the weights will take. A host pages; it is not asked."""
    if layers.memory is None:
        return
    needed, free = _bytes_of(slots, layers, held), layers.memory.free_bytes()
    if needed > free:
        raise CheckpointError(
            f"{folder}: the checkpoint needs {needed / 2**30:.1f} GiB as {held}, and the GPU has {free / 2**30:.1f} GiB free: "
            "end what else runs on it, hold the weights in 16 bits (--dtype bfloat16), or use a smaller model or --backend reference"
        )


def _allocate(slots: dict[str, Slot], layers: Any, held: np.dtype) -> dict[Field, Any]:
    """One array for each field."""
    rows: dict[Field, int] = {}
    for slot in slots.values():
        key = (slot.layer, slot.field)
        rows[key] = max(rows.get(key, 0), slot.start + slot.shape[0])
    widths = {(slot.layer, slot.field): slot.shape[1:] for slot in slots.values()}
    return {key: layers.xp.empty((rows[key], *width), dtype=_dtype_of((1, *width), layers, held)) for key, width in widths.items()}


def _filled(
    fields: dict[Field, Any], folder: Path, where: dict[str, str], slots: dict[str, Slot], parts: dict[str, Index], layers: Any,
    progress: Progress | None,
) -> dict[Field, Any]:  # fmt: skip
    """The fields with every tensor in its place; numbers that are not finite are looked for there, on a device if there is one."""
    total, done = sum(prod(slot.shape) * fields[slot.layer, slot.field].dtype.itemsize for slot in slots.values()), 0
    broken: list[tuple[str, Any]] = []  # a device's answers are read when all is copied
    for name, tensor in _read(folder, where, parts):
        slot = slots[name]
        target = fields[slot.layer, slot.field][slot.start : slot.start + slot.shape[0]]
        rows = max(1, PIECE_BYTES * len(tensor) // max(1, tensor.nbytes))
        for start in range(0, len(tensor), rows):
            with np.errstate(over="ignore"):
                piece = tensor[start : start + rows].astype(target.dtype, copy=False)
            layers.from_host(target[start : start + rows], piece)
            broken.append((name, layers.holds_not_finite(target[start : start + rows])))
        done += prod(slot.shape) * target.dtype.itemsize
        if progress is not None:
            progress(done, total)
    for name, is_broken in broken:
        if is_broken:
            raise CheckpointError(_not_finite(folder, where, name))
    return fields


def _read(folder: Path, where: dict[str, str], parts: dict[str, Index]) -> Iterator[tuple[str, np.ndarray]]:
    """The part to be read of every expected tensor, one at a time, shard by shard.

    A file is opened anew now and then: pages of an open mapping count as memory in use, and the whole file's would add up.
    """
    left = deque(sorted(parts, key=lambda name: (where[name], name)))
    while left:
        shard, read = where[left[0]], 0
        with opened(folder / shard) as file:
            while left and where[left[0]] == shard and read < REOPEN_BYTES:
                name = left.popleft()
                tensor = file.get_slice(name)[parts[name]]
                read += tensor.nbytes
                yield name, tensor


def _not_finite(folder: Path, where: dict[str, str], name: str) -> str:
    """What is wrong with a tensor that is not finite as it is held."""
    with opened(folder / where[name]) as file:
        stored = file.get_tensor(name)
    if np.isfinite(stored).all():
        return f"{name} holds weights beyond float16's largest number 65504: use dtype='bfloat16' or 'float32'"
    return f"{name} holds NaN or infinite weights: the file is damaged or the training failed, download the model again"
