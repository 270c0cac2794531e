"""load(): a model folder in, a model that runs and its tokenizer out."""

from __future__ import annotations

import sys
from pathlib import Path

from ..attention import choose_backend, load_model_backend
from ..parallel import ONE_PROCESS, Ranks
from .config import ModelConfig
from .llama import Llama
from .sharding import Shard, check_split
from .tokenizer import Tokenizer
from .weights import Progress, load_weights


def load(
    path: str | Path,
    backend: str = "auto",
    dtype: str = "auto",
    max_context: int | None = None,
    *,
    check_finite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[Llama, Tokenizer]:
    """Load a folder as transformers saves it: config.json, safetensors weights, tokenizer.json.

    Args:
        backend: auto (cupy where it can run, otherwise reference; which and why is printed on stderr), reference, numba or cupy.
        dtype: how weights are held: auto (the backend's measured choice), float32, float16, bfloat16, or float64, which
            also computes in float64 (reference and numba, for tests).
        max_context: the most positions a sequence may have, instead of the config's max_position_embeddings.
        check_finite: look for NaN and infinity after every half layer and name where they first appear; slower.
        progress: called with (bytes loaded, bytes in all) after each tensor.
        ranks: the processes that run the model together, each with its part of it (parallel.arrange); every one makes this call.

    Raises:
        CheckpointError: the folder is incomplete, damaged, of a kind that is not supported, or larger than the GPU's free memory.
        InvalidInput: an unknown backend or dtype, a max_context below 1, or ranks that cannot share the model evenly.
        BackendUnavailable: a backend asked for by name is not installed.
    """
    folder = Path(path)
    config = ModelConfig.from_folder(folder)
    check_split(config, ranks.tensor.size)
    if backend == "auto":
        backend, reason = choose_backend()
        print(f"backend   {backend} ({reason})", file=sys.stderr)
    engine = load_model_backend(backend)
    engine.layers.get_ready()
    tokenizer = Tokenizer.from_folder(folder)
    weights = load_weights(folder, config, engine.layers, dtype, progress, Shard(ranks.tensor.rank, ranks.tensor.size))
    return Llama(config, weights, engine, max_context, check_finite=check_finite, ranks=ranks), tokenizer
