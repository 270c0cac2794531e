"""Makes tests/data/llama_logits: what transformers computes for random small models of every supported kind.

Run from the project's root, once with transformers 4 and once with transformers 5 (and PyTorch):

    PYTHONPATH=. python tests/data/make_llama_logits.py

Each version makes its own cases and writes each config.json in its own style. The tests need neither library.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.llama_checkpoints import FOLDER, write_checkpoint

STYLE = int(transformers.__version__.split(".")[0])
SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}


def rope(theta: float, **parameters: object) -> dict:
    """Rotary parameters as keyword arguments of this version's config classes."""
    if STYLE == 4:
        return {"rope_theta": theta, "rope_scaling": parameters or None}
    return {"rope_parameters": {"rope_theta": theta, "rope_type": "default", **parameters}}


# name -> (versions of transformers, config class, arguments, tokens, stored dtype, shards)
CASES = {
    "llama": ((4, 5), LlamaConfig, rope(10000.0), 48, "float32", 1),
    "llama_tied_bfloat16": ((5,), LlamaConfig, {"tie_word_embeddings": True, **rope(5e5)}, 48, "bfloat16", 1),
    "llama_mha_biases": ((4,), LlamaConfig, {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}, 48, "float32", 1),
    "llama_mqa_head_dim": ((4, 5), LlamaConfig, {"num_key_value_heads": 1, "head_dim": 32}, 48, "float32", 1),
    "llama_sharded_float16": ((5,), LlamaConfig, rope(10000.0), 48, "float16", 3),
    "llama_linear": ((4, 5), LlamaConfig, rope(10000.0, rope_type="linear", factor=2.5), 80, "float32", 1),
    "llama_dynamic_inside": ((4,), LlamaConfig, rope(10000.0, **DYNAMIC), 80, "float32", 1),
    "llama_dynamic_beyond": ((4, 5), LlamaConfig, {"max_position_embeddings": 32, **rope(10000.0, **DYNAMIC)}, 80, "float32", 1),
    "llama_llama3": ((4, 5), LlamaConfig, rope(10000.0, **LLAMA3), 80, "float32", 1),
    "llama_yarn": ((4, 5), LlamaConfig, rope(10000.0, **YARN), 80, "float32", 1),
    "llama_yarn_mscale": ((5,), LlamaConfig, rope(10000.0, **YARN, mscale=0.8, mscale_all_dim=0.4, beta_fast=16.0), 80, "float32", 1),
    "llama_yarn_attention_factor": ((5,), LlamaConfig, rope(10000.0, **YARN, attention_factor=1.3, truncate=False), 80, "float32", 1),
    "mistral": ((4, 5), MistralConfig, {"sliding_window": None, "head_dim": 24}, 48, "float32", 1),
    "mistral_inside_window": ((5,), MistralConfig, {"sliding_window": 64, "tie_word_embeddings": True}, 48, "float32", 1),
    "qwen2": ((4, 5), Qwen2Config, rope(1e6), 48, "float32", 1),
    "qwen2_tied_inside_window": ((4, 5), Qwen2Config, {"tie_word_embeddings": True, **SLIDING}, 48, "float32", 1),
    "qwen3": ((4, 5), Qwen3Config, {"head_dim": 16, **rope(1e6)}, 48, "float32", 1),
    "qwen3_bias_head_dim": ((5,), Qwen3Config, {"head_dim": 32, "attention_bias": True, "tie_word_embeddings": True}, 48, "bfloat16", 1),
}  # fmt: skip


def make(name: str) -> None:
    _, config_class, arguments, length, dtype, shards = CASES[name]
    empty = AutoModelForCausalLM.from_config(config_class(**{**SMALL, **arguments}))
    tensors = {key: list(value.shape) for key, value in sorted(empty.state_dict().items())}
    if empty.config.tie_word_embeddings:
        del tensors["lm_head.weight"]  # transformers does not store it twice
    token_ids = np.random.default_rng(len(name)).integers(0, SMALL["vocab_size"], length)
    with tempfile.TemporaryDirectory() as folder:
        empty.config.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        config["architectures"] = [type(empty).__name__]
        write_checkpoint(Path(folder), config, tensors, dtype, shards)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(token_ids)[None]).logits[0].numpy()
    stem = f"{name}_transformers{STYLE}"
    description = {"config": config, "transformers": transformers.__version__, "dtype": dtype, "shards": shards, "tensors": tensors}
    (FOLDER / f"{stem}.json").write_text(json.dumps(description, indent=1) + "\n")
    np.savez_compressed(FOLDER / f"{stem}.npz", token_ids=token_ids.astype(np.int32), logits=logits)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case, (styles, *_) in CASES.items():
        if STYLE in styles:
            make(case)
            print(case, file=sys.stderr)
