"""What a GGUF file says about its model, turned into the fields of a Hugging Face config.json.

GGUF keys are documented at https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Architectures are written there
under llama.cpp's names: `llama` stands for the Llama and the Mistral family alike.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from ..errors import CheckpointError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Keys that change what the model computes, with the one value under which they change nothing.
INERT_VALUES: dict[str, float] = {
    "expert_count": 0,
    "attention.sliding_window": 0,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.temperature_scale": 0,
    "attention.causal": True,
    "use_parallel_residual": False,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
# Llama 3.1 and later: the wavelength bounds are the same in every published model, only `factor` differs.
LLAMA3_LOW_FREQ_FACTOR, LLAMA3_HIGH_FREQ_FACTOR, LLAMA3_ORIGINAL_CONTEXT = 1.0, 4.0, 8192
LLAMA3_TOLERANCE = 1e-5  # the table is float32, and computed from float32 frequencies: some 2^-22 relative


class Metadata:
    """The key-value pairs of a GGUF file with checked types; `{arch}` in a key stands for the architecture."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self.path = path
        self.values = values
        self.architecture = str(self.require("general.architecture", str))

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key` as a `kind` (int, float, bool, str or list), or `default` where the file lacks it."""
        key = key.format(arch=getattr(self, "architecture", ""))
        if key not in self.values:
            return default
        value = self.values[key]
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise CheckpointError(f"{self.path}: {key} is {_shorten(value)}, but must be of type {kind.__name__}; the file is damaged.")
        return value

    def require(self, key: str, kind: type) -> Any:
        """The same for a key the file must have. Raises CheckpointError."""
        value = self.get(key, kind)
        if value is None:
            named = key.format(arch=getattr(self, "architecture", ""))
            raise CheckpointError(f"{self.path} has no {named}, which a language model must have; use a complete model file.")
        return value

    def positive(self, key: str) -> int:
        """A required count of at least 1; a list of equal counts, one a layer, counts as that one."""
        full = key.format(arch=self.architecture)
        value = self.values.get(full)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if isinstance(value, list):
            self.refuse(f"{full} differs between layers ({_shorten(value)})", "only models whose layers are all alike can run")
        if value is None:
            return int(self.require(key, int))
        if type(value) is not int or value < 1:
            raise CheckpointError(f"{self.path}: {full} is {_shorten(value)}, but must be a whole number of at least 1.")
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0, required unless there is a default; the shortest decimal that is this float32.

        GGUF keeps 1e-5 as float32, 9.99999975e-06, which is not what was meant.
        """
        value = self.require(key, float) if default is None else self.get(key, float, default)
        if not 0.0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {key.format(arch=self.architecture)} is {value}, but must be a number above 0.")
        return _rounded(value)

    def refuse(self, finding: str, rule: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: {finding}, but {rule}; choose another model.")


def _shorten(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def hf_config(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], rope_freqs: np.ndarray | None, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    shapes: every tensor of the file by its GGUF name, in row-major order; rope_freqs [head_dim / 2] float32 is the tensor
    of that name where the file has one; dtype: what the weights are written as. Raises CheckpointError for another
    architecture, for a part of a split file and for anything that the three families do not compute.
    """
    architecture = metadata.architecture
    if architecture not in ARCHITECTURES:
        metadata.refuse(f"its architecture is {architecture!r}", f"only {', '.join(ARCHITECTURES)} can be converted")
    if metadata.get("split.count", int, 0) > 1:
        raise CheckpointError(
            f"{metadata.path} is one of {metadata.values['split.count']} parts; "
            "join them first: llama-gguf-split --merge FIRST_PART OUT.gguf"
        )
    for suffix, inert in INERT_VALUES.items():
        value = metadata.values.get(f"{architecture}.{suffix}", inert)
        if value != inert:
            metadata.refuse(f"{architecture}.{suffix} is {_shorten(value)}", f"only {inert!r} is supported")

    hidden_size = metadata.positive("{arch}.embedding_length")
    num_heads = metadata.positive("{arch}.attention.head_count")
    has_kv_count = f"{architecture}.attention.head_count_kv" in metadata.values
    num_kv_heads = metadata.positive("{arch}.attention.head_count_kv") if has_kv_count else num_heads
    head_dim = metadata.get("{arch}.attention.key_length", int) or _even_share(metadata, hidden_size, num_heads)
    for key in ("{arch}.attention.value_length", "{arch}.rope.dimension_count"):
        if (value := metadata.get(key, int, head_dim)) != head_dim:
            metadata.refuse(f"{key.format(arch=architecture)} is {value}", f"it must equal the head_dim of {head_dim}")
    if head_dim % 2:
        metadata.refuse(f"head_dim is {head_dim}", "rotary embeddings need an even one")
    if num_heads % num_kv_heads:
        metadata.refuse(f"{num_heads} query heads do not divide among {num_kv_heads} key heads", "they must")
    if "token_embd.weight" not in shapes:
        raise CheckpointError(f"{metadata.path} has no tensor token_embd.weight, so it holds no language model; use a complete model file.")

    theta = metadata.positive_number("{arch}.rope.freq_base", default=10000.0)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata.positive("{arch}.feed_forward_length"),
        "num_hidden_layers": metadata.positive("{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": metadata.positive("{arch}.context_length"),
        "rms_norm_eps": metadata.positive_number("{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _rope_scaling(metadata, rope_freqs, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in shapes,
        "torch_dtype": dtype,
    }
    if architecture == "qwen2":
        config["use_sliding_window"] = False
    else:
        config["attention_bias"] = "blk.0.attn_q.bias" in shapes
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in shapes
    for name in ("bos", "eos"):
        if (token := metadata.get(f"tokenizer.ggml.{name}_token_id", int)) is not None:
            config[f"{name}_token_id"] = token
    return config


def _even_share(metadata: Metadata, hidden_size: int, num_heads: int) -> int:
    if hidden_size % num_heads:
        metadata.refuse(f"embedding_length {hidden_size} does not divide into {num_heads} heads", "without attention.key_length it must")
    return hidden_size // num_heads


def _rounded(value: float) -> float:
    return float(str(np.float32(value)))


def _rope_scaling(metadata: Metadata, rope_freqs: np.ndarray | None, theta: float, head_dim: int) -> dict[str, Any] | None:
    """config.json's rope_scaling; None where positions are not scaled."""
    kind = metadata.get("{arch}.rope.scaling.type", str)
    factor = metadata.get("{arch}.rope.scaling.factor", float) or metadata.get("{arch}.rope.scale_linear", float) or 1.0
    original = metadata.get("{arch}.rope.scaling.original_context_length", int)
    if kind is None:
        kind = "none" if factor == 1.0 else "linear"
    if rope_freqs is not None:
        if kind != "none":
            metadata.refuse(f"it has both rope_freqs.weight and rope scaling of type {kind!r}", "only one of them can hold")
        return _llama3_scaling(metadata, rope_freqs, theta, head_dim, original or LLAMA3_ORIGINAL_CONTEXT)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if not 1.0 <= factor < math.inf:
        metadata.refuse(f"its rope scaling factor is {factor:g}", "it must be at least 1")
    if kind == "linear":
        return {"rope_type": "linear", "factor": _rounded(factor)}
    if kind != "yarn":
        metadata.refuse(f"its rope scaling is of type {kind!r}", "only none, linear, yarn and Llama 3's rope_freqs.weight are supported")
    if original is None:
        metadata.refuse("it scales positions with yarn", "rope.scaling.original_context_length is missing")
    scaling = {"rope_type": "yarn", "factor": _rounded(factor), "original_max_position_embeddings": original}
    for name in ("beta_fast", "beta_slow"):
        if (value := metadata.get(f"{{arch}}.rope.scaling.yarn_{name}", float)) is not None:
            scaling[name] = _rounded(value)
    return scaling


def llama3_frequency_divisors(theta: float, head_dim: int, factor: float, original: int) -> np.ndarray:
    """What Llama 3.1 divides each rotary frequency by: 1 for short wavelengths, `factor` for long ones, blended between.

    Returns [head_dim / 2] float64, the content of rope_freqs.weight.
    """
    frequency = theta ** (-np.arange(0, head_dim, 2) / head_dim)  # [head_dim / 2], radians a token
    turns = original * frequency / (2 * math.pi)  # turns within the original context
    blend = np.clip((turns - LLAMA3_LOW_FREQ_FACTOR) / (LLAMA3_HIGH_FREQ_FACTOR - LLAMA3_LOW_FREQ_FACTOR), 0.0, 1.0)
    return 1.0 / ((1.0 - blend) / factor + blend)


def _llama3_scaling(metadata: Metadata, rope_freqs: np.ndarray, theta: float, head_dim: int, original: int) -> dict[str, Any] | None:
    if rope_freqs.shape != (head_dim // 2,) or not np.isfinite(rope_freqs).all() or rope_freqs.min() < 1.0 - LLAMA3_TOLERANCE:
        metadata.refuse(
            f"rope_freqs.weight of shape {list(rope_freqs.shape)} is no table of divisors", f"it needs {head_dim // 2} of at least 1"
        )
    factor = _rounded(float(rope_freqs.max()))
    if factor == 1.0:
        return None
    expected = llama3_frequency_divisors(theta, head_dim, factor, original)  # [head_dim / 2]
    if not np.allclose(rope_freqs, expected, rtol=LLAMA3_TOLERANCE, atol=0.0):
        metadata.refuse(
            "rope_freqs.weight follows no Llama 3 rule (factor of its largest entry, frequency factors 1 and 4, "
            f"original context {original})",
            "only that rule is supported",
        )
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LLAMA3_LOW_FREQ_FACTOR,
        "high_freq_factor": LLAMA3_HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": original,
    }
