"""ModelConfig: the shape of a Llama-like model, read from the config.json that transformers 4 or 5 wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .rope import RopeParameters

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")

# What transformers assumes where config.json is silent. None for num_key_value_heads: as many as query heads.
# None for head_dim: hidden_size / num_attention_heads.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "sliding_window": 4096},
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class ModelConfig:
    """Fields as named in config.json. Lengths are tokens.

    sliding_window is the tokens a query sees in the layers that slide, None where none does. It is not computed:
    a sequence that fits inside it runs (the window then hides nothing), a longer one is refused.

    Raises:
        CheckpointError: from `from_folder` and `from_dict`, for any field that is missing, broken or not supported.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    query_key_norm: bool
    sliding_window: int | None
    rope_parameters: RopeParameters

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read DIR/config.json.

        Raises:
            CheckpointError: no such folder or file, not JSON, or anything `from_dict` refuses.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder: give the folder that holds config.json and model.safetensors")
        return cls.from_dict(read_json_object(folder / "config.json"))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Check every field and fill in what transformers would assume."""
        family = _family(raw)
        _refuse_unsupported(raw)
        given = {**_DEFAULTS[family], **{name: value for name, value in raw.items() if value is not None}}
        sizes = {name: _positive_integer(given, name) for name in _SIZES}
        query_heads = sizes["num_attention_heads"]
        if given["num_key_value_heads"] is None or raw.get("num_key_value_heads", 0) is None:
            given["num_key_value_heads"] = query_heads
        kv_heads = _positive_integer(given, "num_key_value_heads")
        if query_heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads {query_heads} is not a multiple of num_key_value_heads {kv_heads}: "
                "query heads share key heads in whole groups"
            )
        max_position_embeddings = _positive_integer(given, "max_position_embeddings")
        bias = _boolean(given, "attention_bias") if family in ("llama", "qwen3") else family == "qwen2"
        return cls(
            model_type=family,
            **sizes,
            num_key_value_heads=kv_heads,
            head_dim=_head_dim(given, sizes["hidden_size"], query_heads),
            rms_norm_eps=_epsilon(given),
            max_position_embeddings=max_position_embeddings,
            tie_word_embeddings=_boolean(given, "tie_word_embeddings"),
            attention_bias=bias,
            attention_output_bias=bias and family != "qwen2",
            mlp_bias=family == "llama" and _boolean(given, "mlp_bias"),
            query_key_norm=family == "qwen3",
            sliding_window=_sliding_window(family, raw, given, sizes["num_hidden_layers"]),
            rope_parameters=RopeParameters.from_config(raw, max_position_embeddings),
        )


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model folder that holds one object.

    Raises:
        CheckpointError: the file is missing, unreadable, not UTF-8, not JSON, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: give a model folder as transformers saves it") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): make it a readable file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} is not JSON ({reason}): download or convert the model again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object: download or convert the model again")
    return value


def _family(raw: Mapping[str, Any]) -> str:
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise CheckpointError(f"config.json: model_type {family!r} is not supported: use a model of one of {', '.join(FAMILIES)}")
    return family


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    activation = raw.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"config.json: hidden_act {activation!r} is not supported: the feed-forward layers must use 'silu'")
    if raw.get("quantization_config") is not None:
        raise CheckpointError(
            "config.json has a quantization_config, but only F32, F16 and BF16 weights are read: use the unquantized model"
        )


def _positive_integer(given: Mapping[str, Any], name: str) -> int:
    value = given.get(name)
    if value is None:
        raise CheckpointError(f"config.json: {name} is missing: download or convert the model again")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"config.json: {name} is {value!r}: it must be a whole number of at least 1")
    return value


def _boolean(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} is {value!r}: it must be true or false")
    return value


def _epsilon(given: Mapping[str, Any]) -> float:
    value = given.get("rms_norm_eps", 1e-6)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise CheckpointError(f"config.json: rms_norm_eps is {value!r}: it must be a number from 0 to below 1")
    return float(value)


def _head_dim(given: Mapping[str, Any], hidden_size: int, query_heads: int) -> int:
    if given["head_dim"] is None:
        if hidden_size % query_heads:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} is not a multiple of num_attention_heads {query_heads}: give head_dim explicitly"
            )
        given = {"head_dim": hidden_size // query_heads}
    head_dim = _positive_integer(given, "head_dim")
    if head_dim % 2 or head_dim < 4:
        raise CheckpointError(f"config.json: head_dim {head_dim} cannot be rotated in pairs: it must be even and at least 4")
    return head_dim


def _sliding_window(family: str, raw: Mapping[str, Any], given: Mapping[str, Any], num_layers: int) -> int | None:
    """The window of the layers that slide, None where all layers see everything (transformers' rules per family)."""
    if family == "llama" or raw.get("sliding_window", 0) is None:
        return None
    if family == "mistral":
        return _positive_integer(given, "sliding_window")
    if not _boolean(given, "use_sliding_window"):
        return None
    layer_types = given.get("layer_types")
    if layer_types is None:
        first_sliding = given.get("max_window_layers", 28)
        if isinstance(first_sliding, bool) or not isinstance(first_sliding, int) or first_sliding < 0:
            raise CheckpointError(f"config.json: max_window_layers is {first_sliding!r}: it must be a whole number of at least 0")
        slides = first_sliding < num_layers
    else:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise CheckpointError(f"config.json: layer_types must list one type for each of the {num_layers} layers, not {layer_types!r}")
        for layer_type in layer_types:
            if layer_type not in ("full_attention", "sliding_attention"):
                raise CheckpointError(f"config.json: layer type {layer_type!r} is not supported: use full_attention or sliding_attention")
        slides = "sliding_attention" in layer_types
    return _positive_integer(given, "sliding_window") if slides else None
