"""Small models for the emulator's tests."""

from pathlib import Path
from typing import Any

from tests.llama_checkpoints import load_case, write_checkpoint
from unisparse_np.model.checkpoint import expected_tensors
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.weights import load_weights


def write_qwen3(folder: Path) -> Path:
    """The folder of a qwen3 model (norms of q and k) with biases and heads of 64, in bfloat16."""
    raw = load_case("qwen3_bias_head_dim_transformers5").config | {"head_dim": 64, "num_hidden_layers": 2, "layer_types": None}
    tensors = {name: list(slot.shape) for name, slot in expected_tensors(ModelConfig.from_dict(raw)).items()}
    return write_checkpoint(folder, raw, tensors, "bfloat16")


def open_model(folder: Path, backend: Any, max_context: int, dtype: str = "bfloat16", **options: Any) -> Llama:
    """The model of a folder on a backend, its weights held in dtype."""
    config = ModelConfig.from_folder(folder)
    return Llama(config, load_weights(folder, config, backend.layers, dtype), backend, max_context, **options)
