"""Model folders: what is done to the folder, and words of the refusal."""

from pathlib import Path

import numpy as np
import pytest

from .refusals import CHECKPOINT, USAGE, contents, refused
from .spoiling import WEIGHTS, Spoil, config, cut, delete, edit, header, sharded, tensors, with_nan, write

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"

CHECKPOINTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no config": (delete("config.json"), ("config.json", "is missing", "give a model folder")),
    "config cut": (cut("config.json", 40), ("config.json", "not JSON", "download or convert")),
    "config a list": (write("config.json", b"[]"), ("config.json", "list", "not an object")),
    "config not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), ("config.json", "not JSON", "download or convert")),
    "config an empty object": (write("config.json", b"{}"), ("model_type None", "llama, mistral, qwen2, qwen3")),
    "family unknown": (config(model_type="mamba"), ("'mamba'", "llama, mistral, qwen2, qwen3")),
    "heads do not divide": (config(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3", "whole groups")),
    "no heads": (config(num_attention_heads=0), ("num_attention_heads is 0", "at least 1")),
    "layers a text": (config(num_hidden_layers="two"), ("num_hidden_layers is 'two'", "whole number")),
    "hidden size left out": (config(hidden_size=...), ("hidden_size is missing", "download or convert")),
    "head_dim odd": (config(head_dim=33), ("head_dim 33", "even")),
    "epsilon negative": (config(rms_norm_eps=-1.0), ("rms_norm_eps is -1.0", "from 0 to below 1")),
    "activation unknown": (config(hidden_act="relu"), ("'relu'", "silu")),
    "quantized": (config(quantization_config={"bits": 4}), ("quantization_config", "use the unquantized model")),
    "rope unknown": (config(rope_scaling={"rope_type": "longrope"}), ("'longrope'", "default")),
    "rope incomplete": (config(rope_scaling={"rope_type": "linear"}), ("'linear' needs factor", "add it")),
    "rope theta zero": (config(rope_theta=0, rope_parameters=..., rope_scaling=...), ("rope_theta is 0", "above 0")),
    "no weights": (delete(WEIGHTS), ("neither model.safetensors nor model.safetensors.index.json", "give a folder")),
    "weights cut": (cut(WEIGHTS, -100), ("model.safetensors", "not a whole safetensors file", "download or convert")),
    "weights empty": (write(WEIGHTS, b""), ("model.safetensors", "not a whole safetensors file", "download or convert")),
    "header cut": (cut(WEIGHTS, 60), ("not a whole safetensors file",)),
    "header length absurd": (write(WEIGHTS, b"\xff" * 64), ("not a whole safetensors file",)),
    "header lies about offsets": (
        header(lambda table: table[Q_PROJ].update(data_offsets=[0, 10**9])), ("not a whole safetensors file", "download or convert")),
    "header overlaps": (header(lambda table: table[Q_PROJ].update(data_offsets=[0, 32768])), ("not a whole safetensors file",)),
    "dtype not read": (tensors(model__layers__0__self_attn__q_proj__weight=lambda a: a.astype(np.int8)), (Q_PROJ, "I8", "F32, F16, BF16")),
    "NaN weights": (tensors(model__layers__0__self_attn__q_proj__weight=with_nan), (Q_PROJ, "NaN", "download the model again")),
    "infinite weights": (tensors(model__norm__weight=lambda a: a * np.float32(np.inf)), ("model.norm.weight", "infinite")),
    "shape disagrees": (tensors(model__norm__weight=lambda a: a[:-1].copy()), ("model.norm.weight", "[63]", "[64]", "config.json")),
    "config and weights disagree": (config(intermediate_size=128), ("[64, 96]", "[64, 128]", "config.json that belongs")),
    "tensor missing": (tensors(model__layers__1__mlp__up_proj__weight=...), ("lacks model.layers.1.mlp.up_proj.weight", "download it")),
    "tensor unknown": (tensors(model__extra=np.ones(3, np.float32)), ("model.extra", "does not have", "config.json that belongs")),
    "shard missing": (sharded(model__extra="shard-2.safetensors"), ("shard-2.safetensors", "is missing", "download that shard")),
    "index names a path": (sharded(model__extra="../x.safetensors"), ("../x.safetensors", "plain file name")),
    "no tokenizer": (delete("tokenizer.json"), ("tokenizer.json does not exist", "save the model's tokenizer")),
    "tokenizer cut": (cut("tokenizer.json", 500), ("tokenizer.json", "not a valid tokenizer", "download or convert")),
    "tokenizer too large": (config(vocab_size=100), ("tokenizer.json", "100", "take the files from one place")),
    "EOS no token": (edit("generation_config.json", eos_token_id="stop"), ("eos_token_id", "'stop'", "token id")),
    "tokenizer settings no JSON": (write("tokenizer_config.json", b"{'a'"), ("tokenizer_config.json", "not JSON", "download or convert")),
    "chat template no Jinja": (write("chat_template.jinja", b"{% for %}"), ("chat_template.jinja", "--raw")),
    "chat template reaches out": (
        write("chat_template.jinja", b"{{ ''.__class__.__subclasses__() }}"), ("chat_template.jinja", "--raw")),
    "unisparse.json broken": (write("unisparse.json", b'{"block_size": 100}'), ("unisparse.json", "does not divide block_size=100")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(model: Path, name: str) -> None:
    spoil, words = CHECKPOINTS[name]
    spoil(model)
    before = contents(model)
    refused("generate", "-m", model, "--text", "hello", "--backend", "reference", code=CHECKPOINT, words=words)
    assert contents(model) == before


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused("generate", "-m", tmp_path / "nowhere", "--text", "a", code=CHECKPOINT, words=("nowhere", "is not a folder", "config.json"))
    refused("generate", "-m", tmp_path / "file", "--text", "a", code=CHECKPOINT, words=("file is not a folder", "config.json"))
    refused("generate", "--text", "a", code=USAGE, words=("Missing option", "--model"))
