"""Tiny GGUF files for the tests: random Hugging Face weights, put into llama.cpp's names and row order, and written."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from tokenizers.pre_tokenizers import ByteLevel

from unisparse_np.model import gguf as converter

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "12 3", "4 5", "Ġ Ġ"]
CONTROL_TOKENS = ["<|begin|>", "<|im_end|>", "<|eot_id|>"]
TOKENS = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES), *CONTROL_TOKENS, "<tool>"]
TOKEN_TYPES = [CONTROL if token in CONTROL_TOKENS else USER_DEFINED if token == "<tool>" else NORMAL for token in TOKENS]
BOS, EOS = TOKENS.index("<|begin|>"), TOKENS.index("<|im_end|>")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
PRE_TOKENIZER = {"llama": "smollm", "qwen2": "qwen2", "qwen3": "qwen2"}


@dataclass
class TinyModel:
    """A model of 2 layers. `values` and `tensors` are what will be written; a test spoils them before write()."""

    architecture: str = "llama"
    kind: str = "F32"  # type of the matrices; vectors are always float32, as llama.cpp writes them
    hidden: int = 64
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    inner: int = 96
    layers: int = 2
    tied: bool = False
    biased: bool = False  # llama with attention_bias and mlp_bias
    values: dict[str, Any] = field(default_factory=dict)  # GGUF key -> value
    tensors: dict[str, np.ndarray] = field(default_factory=dict)  # GGUF name -> [rows, columns] float32
    originals: dict[str, np.ndarray] = field(default_factory=dict)  # Hugging Face name -> the same in its own row order
    raw: dict[str, tuple[np.ndarray, str]] = field(default_factory=dict)  # GGUF name -> (bytes or numbers as they are, type)

    def __post_init__(self) -> None:
        arch = self.architecture
        self.values = {
            f"{arch}.block_count": self.layers,
            f"{arch}.context_length": 512,
            f"{arch}.embedding_length": self.hidden,
            f"{arch}.feed_forward_length": self.inner,
            f"{arch}.attention.head_count": self.num_heads,
            f"{arch}.attention.head_count_kv": self.num_kv_heads,
            f"{arch}.attention.key_length": self.head_dim,
            f"{arch}.attention.value_length": self.head_dim,
            f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
            f"{arch}.rope.freq_base": 50000.0,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": PRE_TOKENIZER.get(arch, "smollm"),
            "tokenizer.ggml.tokens": list(TOKENS),
            "tokenizer.ggml.token_type": list(TOKEN_TYPES),
            "tokenizer.ggml.merges": list(MERGES),
            "tokenizer.ggml.bos_token_id": BOS,
            "tokenizer.ggml.eos_token_id": EOS,
            "tokenizer.chat_template": TEMPLATE,
        }
        rng = np.random.default_rng(7)
        for name, hf_name, shape, heads in self._layout():
            weights = (rng.standard_normal(shape) * 0.05).astype(np.float32)
            self.originals[hf_name] = weights
            self.tensors[name] = weights[interleaved_order(heads, self.head_dim)] if heads and arch == "llama" else weights

    def _layout(self) -> list[tuple[str, str, tuple[int, ...], int]]:
        """(GGUF name, Hugging Face name, shape, heads whose rows llama.cpp reorders or 0)."""
        q_rows, kv_rows = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        qkv_bias = self.biased or self.architecture == "qwen2"
        layout = [("token_embd.weight", "model.embed_tokens.weight", (len(TOKENS), self.hidden), 0)]
        for index in range(self.layers):
            for name, hf_name, rows, columns, heads, bias in (
                ("attn_q", "self_attn.q_proj", q_rows, self.hidden, self.num_heads, qkv_bias),
                ("attn_k", "self_attn.k_proj", kv_rows, self.hidden, self.num_kv_heads, qkv_bias),
                ("attn_v", "self_attn.v_proj", kv_rows, self.hidden, 0, qkv_bias),
                ("attn_output", "self_attn.o_proj", self.hidden, q_rows, 0, self.biased),
                ("ffn_gate", "mlp.gate_proj", self.inner, self.hidden, 0, self.biased),
                ("ffn_up", "mlp.up_proj", self.inner, self.hidden, 0, self.biased),
                ("ffn_down", "mlp.down_proj", self.hidden, self.inner, 0, self.biased),
            ):
                layout.append((f"blk.{index}.{name}.weight", f"model.layers.{index}.{hf_name}.weight", (rows, columns), heads))
                if bias:
                    layout.append((f"blk.{index}.{name}.bias", f"model.layers.{index}.{hf_name}.bias", (rows,), heads))
            norms = [("attn_norm", "input_layernorm", self.hidden), ("ffn_norm", "post_attention_layernorm", self.hidden)]
            if self.architecture == "qwen3":
                norms += [("attn_q_norm", "self_attn.q_norm", self.head_dim), ("attn_k_norm", "self_attn.k_norm", self.head_dim)]
            layout += [
                (f"blk.{index}.{name}.weight", f"model.layers.{index}.{hf_name}.weight", (size,), 0) for name, hf_name, size in norms
            ]
        layout.append(("output_norm.weight", "model.norm.weight", (self.hidden,), 0))
        if not self.tied:
            layout.append(("output.weight", "lm_head.weight", (len(TOKENS), self.hidden), 0))
        return layout

    def write(self, path: Path, byte_order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE) -> Path:
        writer = gguf.GGUFWriter(path, self.architecture, endianess=byte_order)
        for key, value in self.values.items():
            _adder(writer, value)(key, value)
        for name, weights in self.tensors.items():
            kind = gguf.GGMLQuantizationType[self.kind if weights.ndim > 1 else "F32"]
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
        for name, (data, kind_name) in self.raw.items():
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind_name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def convert(tmp_path: Path, model: TinyModel, **options: Any) -> Path:
    """Write `model` to tmp_path/tiny.gguf, convert it and return the folder, tmp_path/out."""
    converter.convert(model.write(tmp_path / "tiny.gguf"), tmp_path / "out", **options)
    return tmp_path / "out"


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def interleaved_order(num_heads: int, head_dim: int) -> list[int]:
    """Row r of llama.cpp's q is row interleaved_order[r] of Hugging Face's: pairs (i, i + d/2) become neighbours."""
    return [head * head_dim + half * head_dim // 2 + pair for head in range(num_heads) for pair in range(head_dim // 2) for half in (0, 1)]


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    if isinstance(value, bool):
        return writer.add_bool
    return {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}[type(value)]
