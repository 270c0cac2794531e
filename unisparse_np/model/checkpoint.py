"""What a checkpoint's files hold, by their headers: which tensors there must be, where each is, and whether it fits the config."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from .config import ModelConfig, read_json_object

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
READABLE = ("F32", "F16", "BF16")
NAMES_SHOWN = 4  # of missing or unknown tensors in one sentence


@dataclass(frozen=True)
class Slot:
    """Where one stored tensor belongs: rows `start ..` of field `field` of layer `layer` (None: of the whole model)."""

    layer: int | None
    field: str
    start: int
    shape: tuple[int, ...]


def expected_tensors(config: ModelConfig) -> dict[str, Slot]:
    """Every tensor that a model of this config has, by transformers' name."""
    hidden, vocab = config.hidden_size, config.vocab_size
    slots = {
        "model.embed_tokens.weight": Slot(None, "embedding", 0, (vocab, hidden)),
        "model.norm.weight": Slot(None, "norm", 0, (hidden,)),
    }
    if not config.tie_word_embeddings:
        slots["lm_head.weight"] = Slot(None, "head", 0, (vocab, hidden))
    for layer in range(config.num_hidden_layers):
        for name, (field, start, shape) in _layer_tensors(config).items():
            slots[f"model.layers.{layer}.{name}"] = Slot(layer, field, start, shape)
    return slots


def _layer_tensors(config: ModelConfig) -> dict[str, tuple[str, int, tuple[int, ...]]]:
    """One layer's tensors: name -> (field, first row in it, shape)."""
    hidden, inner, d = config.hidden_size, config.intermediate_size, config.head_dim
    q_rows, kv_rows = config.num_attention_heads * d, config.num_key_value_heads * d
    tensors: dict[str, tuple[str, int, tuple[int, ...]]] = {
        "input_layernorm.weight": ("input_norm", 0, (hidden,)),
        "post_attention_layernorm.weight": ("post_attention_norm", 0, (hidden,)),
    }
    if config.query_key_norm:
        tensors["self_attn.q_norm.weight"] = ("q_norm", 0, (d,))
        tensors["self_attn.k_norm.weight"] = ("k_norm", 0, (d,))
    matrices = {
        "self_attn.q_proj": ("qkv", 0, (q_rows, hidden), config.attention_bias),
        "self_attn.k_proj": ("qkv", q_rows, (kv_rows, hidden), config.attention_bias),
        "self_attn.v_proj": ("qkv", q_rows + kv_rows, (kv_rows, hidden), config.attention_bias),
        "self_attn.o_proj": ("output", 0, (hidden, q_rows), config.attention_output_bias),
        "mlp.gate_proj": ("gate_up", 0, (inner, hidden), config.mlp_bias),
        "mlp.up_proj": ("gate_up", inner, (inner, hidden), config.mlp_bias),
        "mlp.down_proj": ("down", 0, (hidden, inner), config.mlp_bias),
    }
    for name, (field, start, shape, has_bias) in matrices.items():
        tensors[f"{name}.weight"] = (field, start, shape)
        if has_bias:
            tensors[f"{name}.bias"] = (f"{field}_bias", start, shape[:1])
    return tensors


def locate(folder: Path) -> dict[str, str]:
    """Which file of the folder holds each tensor."""
    if (folder / SINGLE_FILE).exists():
        with opened(folder / SINGLE_FILE) as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    if not (folder / INDEX_FILE).exists():
        raise CheckpointError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}: give a folder with safetensors weights")
    where = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{folder / INDEX_FILE} has no weight_map of tensor names to files: download the model again")
    for shard in sorted(set(where.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{folder / INDEX_FILE} names {shard!r}, which is not a plain file name: download the model again")
        if not (folder / shard).exists():
            raise CheckpointError(f"{folder / shard} is missing, but the index names it: download that shard again")
    for shard in sorted(set(where.values())):
        with opened(folder / shard) as file:
            absent = {name for name, holder in where.items() if holder == shard} - set(file.keys())
        if absent:
            raise CheckpointError(f"{folder / shard} lacks {_listed(absent)}, which the index says it holds: download that shard again")
    return where


def check_names(where: dict[str, str], slots: dict[str, Slot], config: ModelConfig) -> None:
    if missing := slots.keys() - where.keys():
        raise CheckpointError(
            f"the checkpoint lacks {_listed(missing)}, which a {config.model_type} model of this config.json needs: download it again"
        )
    unknown = {name for name in where.keys() - slots.keys() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        unknown.discard("lm_head.weight")  # a copy of the embedding
    if unknown:
        raise CheckpointError(
            f"the checkpoint holds {_listed(unknown)}, which a {config.model_type} model of this config.json does not have: "
            "use the config.json that belongs to these weights"
        )


def check_shapes(folder: Path, where: dict[str, str], slots: dict[str, Slot]) -> str:
    """Compare every shape and dtype with the config; returns the embedding's dtype."""
    stored = ""
    for shard in sorted({where[name] for name in slots}):
        with opened(folder / shard) as file:
            for name in sorted(name for name in slots if where[name] == shard):
                header = file.get_slice(name)
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if shape != slots[name].shape:
                    raise CheckpointError(
                        f"{name} has shape {list(shape)}, but config.json makes it {list(slots[name].shape)}: "
                        "use the config.json that belongs to these weights"
                    )
                if dtype not in READABLE:
                    raise CheckpointError(f"{name} is stored as {dtype}, but only {', '.join(READABLE)} are read: convert it first")
                if name == "model.embed_tokens.weight":
                    stored = dtype
    return stored


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not a whole safetensors file ({reason}): download or convert it again") from None


def _listed(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
