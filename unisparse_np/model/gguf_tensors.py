"""From the tensors of a GGUF file to a safetensors file, a few megabytes at a time.

The dequantisation is the `gguf` package's own. What is left to do here: names, shapes, the order of the rows of q and k,
a check that every number is finite and fits, and the safetensors format (an 8-byte length, a JSON header, the data).
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

DTYPES = {
    "float32": ("F32", np.dtype(np.float32)),
    "float16": ("F16", np.dtype(np.float16)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
PIECE_ELEMENTS = 1 << 22  # dequantised at a time: 16 MiB in float32
IGNORED_TENSORS = {"rope_freqs.weight"}  # becomes rope_scaling in config.json


@dataclass(frozen=True)
class Target:
    """One tensor of the converted model. interleaved_heads: the head_dim whose rows GGUF keeps in another order, or None."""

    name: str
    shape: tuple[int, ...]
    interleaved_heads: int | None = None


def targets(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Target]:
    """GGUF name -> Target, for every tensor that a model of this config.json must have, in the order of the forward pass."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config["head_dim"]
    q_rows, kv_rows = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    # llama.cpp rotates neighbouring pairs for Llama and therefore stores rows (0, d/2, 1, d/2 + 1, ...); Qwen's stay as they are.
    interleaved = head_dim if config["model_type"] == "llama" else None
    qkv_bias = config["model_type"] == "qwen2" or config["attention_bias"]
    o_bias = config.get("attention_bias", False)
    mlp_bias = config.get("mlp_bias", False)

    table = {"token_embd.weight": Target("model.embed_tokens.weight", (config["vocab_size"], hidden))}
    for layer in range(config["num_hidden_layers"]):
        gguf_prefix, prefix = f"blk.{layer}.", f"model.layers.{layer}."
        matrices = {
            "attn_q": ("self_attn.q_proj", q_rows, hidden, qkv_bias, interleaved),
            "attn_k": ("self_attn.k_proj", kv_rows, hidden, qkv_bias, interleaved),
            "attn_v": ("self_attn.v_proj", kv_rows, hidden, qkv_bias, None),
            "attn_output": ("self_attn.o_proj", hidden, q_rows, o_bias, None),
            "ffn_gate": ("mlp.gate_proj", inner, hidden, mlp_bias, None),
            "ffn_up": ("mlp.up_proj", inner, hidden, mlp_bias, None),
            "ffn_down": ("mlp.down_proj", hidden, inner, mlp_bias, None),
        }
        norms = {"attn_norm": ("input_layernorm", hidden), "ffn_norm": ("post_attention_layernorm", hidden)}
        if config["model_type"] == "qwen3":
            norms |= {"attn_q_norm": ("self_attn.q_norm", head_dim), "attn_k_norm": ("self_attn.k_norm", head_dim)}
        for gguf_name, (name, rows, columns, bias, heads) in matrices.items():
            table[f"{gguf_prefix}{gguf_name}.weight"] = Target(f"{prefix}{name}.weight", (rows, columns), heads)
            if bias:
                table[f"{gguf_prefix}{gguf_name}.bias"] = Target(f"{prefix}{name}.bias", (rows,), heads)
        for gguf_name, (name, size) in norms.items():
            table[f"{gguf_prefix}{gguf_name}.weight"] = Target(f"{prefix}{name}.weight", (size,))
    table["output_norm.weight"] = Target("model.norm.weight", (hidden,))
    if "output.weight" in shapes:
        table["output.weight"] = Target("lm_head.weight", (config["vocab_size"], hidden))
    return table


def check_tensors(path: str, table: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Every tensor there, none too many, each of its shape; raises CheckpointError that names the culprits."""
    if missing := [name for name in table if name not in shapes]:
        raise CheckpointError(f"{path} lacks {_listed(missing)}, which its metadata calls for; the file is incomplete, download it again.")
    if unknown := [name for name in shapes if name not in table and name not in IGNORED_TENSORS]:
        raise CheckpointError(f"{path} has {_listed(unknown)}, unknown to a model of its architecture; choose another model.")
    for name, target in table.items():
        if shapes[name] != target.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(shapes[name])}, but its metadata calls for {list(target.shape)}; the file is damaged."
            )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return f"tensor {shown}" if len(names) == 1 else f"tensors {shown}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def restore_row_order(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's order of q and k: each head's rows (0, d/2, 1, d/2 + 1, ...) become (0, 1, ..., d - 1).

    rows [heads * head_dim, ...] -> the same shape.
    """
    paired = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])  # [heads, d/2, 2, ...]
    return paired.swapaxes(1, 2).reshape(rows.shape)


def dequantised_pieces(tensor: Any, target: Target) -> Iterator[np.ndarray]:
    """A GGUF tensor as float32, whole rows at a time (whole heads where their rows must be reordered).

    Yields arrays [some rows, columns], or the one [size] of a vector.
    """
    from gguf.quants import dequantize

    unit = target.interleaved_heads or 1
    columns = int(np.prod(target.shape[1:]))
    step = max(PIECE_ELEMENTS // (columns * unit), 1) * unit
    for start in range(0, target.shape[0], step):
        # A quantised vector has no rows to cut, and vectors are small.
        data = tensor.data if len(target.shape) == 1 else tensor.data[start : start + step]
        with np.errstate(invalid="ignore", over="ignore"):  # damaged scales; narrow() reports them
            piece = dequantize(data, tensor.tensor_type)
        yield piece if target.interleaved_heads is None else restore_row_order(piece, target.interleaved_heads)
        if len(target.shape) == 1:
            return


def narrow(piece: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """float32 rounded to `dtype`; raises CheckpointError on a number that is not finite before or after."""
    if not np.isfinite(piece).all():
        broken = int(piece.size - np.isfinite(piece).sum())
        raise CheckpointError(f"{where} holds {broken} numbers that are NaN or infinite; the file is damaged, download it again.")
    with np.errstate(over="ignore"):
        narrowed = piece.astype(dtype)
    if not np.isfinite(narrowed).all():
        raise CheckpointError(f"{where} holds {np.abs(piece).max():.4g}, too large for {dtype.name}; convert with --dtype bfloat16.")
    return narrowed


def write_safetensors(
    path: Path,
    source: str,
    tensors: Mapping[str, Any],
    table: Mapping[str, Target],
    dtype: str,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Write the tensors of `table`, in its order, to a safetensors file; returns its size in bytes.

    tensors: the gguf package's ReaderTensor by name. Memory stays at a few pieces whatever the size of the model.
    progress(bytes written, bytes in all) is called after each piece.
    """
    kind, numpy_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in table.values():
        start, end = end, end + int(np.prod(target.shape)) * numpy_dtype.itemsize
        header[target.name] = {"dtype": kind, "shape": list(target.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        _write_data(file, source, tensors, table, numpy_dtype, end, progress)
    return 8 + len(encoded) + end


def _write_data(
    file: BinaryIO,
    source: str,
    tensors: Mapping[str, Any],
    table: Mapping[str, Target],
    dtype: np.dtype,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> None:
    done = 0
    for gguf_name, target in table.items():
        for piece in dequantised_pieces(tensors[gguf_name], target):
            narrowed = np.ascontiguousarray(narrow(piece, dtype, f"{source}: {gguf_name}"))
            done += file.write(narrowed.view(np.uint8).data)
            if progress is not None:
                progress(done, total)
