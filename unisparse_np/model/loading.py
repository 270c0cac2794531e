"""load(): a model folder in, a model that runs and its tokenizer out."""

from __future__ import annotations

import sys
from pathlib import Path

from ..attention import choose_backend, load_model_backend
from .config import ModelConfig
from .llama import Llama
from .tokenizer import Tokenizer
from .weights import load_weights


def load(path: str | Path, backend: str = "auto", dtype: str = "auto", max_context: int | None = None) -> tuple[Llama, Tokenizer]:
    """Load a folder as transformers saves it: config.json, safetensors weights, tokenizer.json.

    Args:
        backend: auto (cupy where it can run, otherwise reference; which and why is printed on stderr), reference, numba or cupy.
        dtype: how weights are held: auto (the backend's measured choice), float32, float16, bfloat16, or float64, which
            also computes in float64 (for tests).
        max_context: the most positions a sequence may have, instead of the config's max_position_embeddings.

    Raises:
        CheckpointError: the folder is incomplete, damaged, or of a kind that is not supported.
        InvalidInput: an unknown backend or dtype, or a max_context below 1.
        BackendUnavailable: a backend asked for by name is not installed.
    """
    folder = Path(path)
    config = ModelConfig.from_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    if backend == "auto":
        backend, reason = choose_backend()
        print(f"backend   {backend} ({reason})", file=sys.stderr)
    engine = load_model_backend(backend)
    return Llama(config, load_weights(folder, config, engine.layers, dtype), engine, max_context), tokenizer
