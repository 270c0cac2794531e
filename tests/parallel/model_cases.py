"""Models, prompts and attentions whose logits must not depend on how many ranks compute them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.llama_checkpoints import load_case, write_checkpoint
from unisparse_np import UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.sharding import Shard
from unisparse_np.model.weights import expected_tensors, load_weights
from unisparse_np.parallel import ONE_PROCESS, Ranks

NEEDLE_LLAMA = Path(__file__).parents[2] / "examples" / "needle-llama"
HEADS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "max_position_embeddings": 4096,
}
MODELS: dict[str, dict[str, Any]] = {  # changes to a stored config; vocabularies that nothing divides
    "llama with biases": {"case": "llama_mha_biases_transformers4", "vocab_size": 131, "tie_word_embeddings": False, **HEADS},
    "qwen3, tied": {"case": "qwen3_bias_head_dim_transformers5", "vocab_size": 97, "tie_word_embeddings": True, **HEADS},
}
TOP_P = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)
COMPOSITE_HEADS = UniSparseConfig(
    block_size=16, q_compress=2, k_compress=8, head_compress=2, top_p=(0.4, 0.5, 0.6, 0.7), row_threshold=0.2, key_anchors=2
)
COARSE = replace(COMPOSITE_HEADS, top_p_compress=16)
ACROSS_KV_HEADS = replace(TOP_P, head_compress=4)  # a composite head of two KV heads


class Case(NamedTuple):
    """One prompt on one model. tokens: its length; chunk_size: as it is read; decode: attention of three more tokens."""

    model: str
    attention: Any
    tokens: int
    chunk_size: int | None = None
    decode: Any = "dense"


CASES = {
    "dense": Case("llama with biases", "dense", 301),
    "ragged": Case("llama with biases", TOP_P, 333, decode=TOP_P),
    "in chunks, the last too short to share": Case("llama with biases", TOP_P, 333, chunk_size=128),
    "composite heads, values of their own": Case("llama with biases", COMPOSITE_HEADS, 297, decode=COMPOSITE_HEADS),
    "coarse composites for Top-P": Case("llama with biases", COARSE, 297, chunk_size=160, decode=COARSE),
    "across KV heads": Case("qwen3, tied", ACROSS_KV_HEADS, 320),
    "one attention a layer": Case("qwen3, tied", ["dense", TOP_P, COMPOSITE_HEADS], 211, chunk_size=160),
    "too short to share": Case("qwen3, tied", TOP_P, 5, decode=TOP_P),
    "needle-llama": Case("needle-llama", UniSparseConfig(block_size=64, top_p=0.8), 620, decode=UniSparseConfig(block_size=64)),
    "needle-llama, precise": Case("needle-llama", UniSparseConfig.precise(), 520),
    "needle-llama, balanced": Case("needle-llama", UniSparseConfig.balanced(), 520, chunk_size=256, decode=UniSparseConfig.balanced()),
}
# tensor x context, by the number of ranks. Two KV heads go to two tensor ranks at most, and so does a composite head of half the heads.
GRIDS = {1: [(1, 1)], 2: [(2, 1), (1, 2)], 4: [(4, 1), (2, 2), (1, 4)]}
AT_MOST_TWO = {"across KV heads", "needle-llama", "needle-llama, precise", "needle-llama, balanced"}


def grids(name: str, size: int) -> list[tuple[int, int]]:
    """The grids of `size` ranks on which a case can run."""
    return [(tensor, context) for tensor, context in GRIDS[size] if tensor <= 2 or name not in AT_MOST_TWO]


def write_models(folder: Path) -> None:
    """A checkpoint for each random model."""
    for name, changes in MODELS.items():
        case = load_case(changes["case"])
        raw = {**case.config, **{key: value for key, value in changes.items() if key != "case"}}
        shapes = {key: list(slot.shape) for key, slot in expected_tensors(ModelConfig.from_dict(raw)).items()}
        write_checkpoint(folder / name, raw, shapes)


def open_model(folder: Path, name: str, ranks: Ranks = ONE_PROCESS, backend: str = "reference", dtype: str = "float64") -> Llama:
    """In float64 no block decision can hang on rounding."""
    path = NEEDLE_LLAMA if name == "needle-llama" else folder / name
    config, engine = ModelConfig.from_folder(path), load_backend(backend)
    shard = Shard(ranks.tensor.rank, ranks.tensor.size)
    return Llama(config, load_weights(path, config, engine.layers, dtype, shard=shard), engine, ranks=ranks)


def results(model: Llama, case: Case) -> dict[str, np.ndarray]:
    """Logits of all positions, then of three steps; densities; of a prompt read in chunks also the logits that a prefill gives."""
    rng = np.random.default_rng(case.tokens)
    token_ids = rng.integers(0, model.config.vocab_size, case.tokens + 3).tolist()
    prompt, more = token_ids[: case.tokens], token_ids[case.tokens :]
    cache = model.new_cache(len(token_ids), case.attention)
    logits = model.logits(prompt, case.attention, chunk_size=case.chunk_size, cache=cache)
    steps = [model.step(token_id, cache, case.decode) for token_id in more]
    found = {"logits": logits, "steps": np.stack(steps), "densities": np.array(model.layer_densities(cache))}
    if case.chunk_size is not None:
        again = model.new_cache(len(prompt), case.attention)
        found["last"] = model.prefill(prompt, again, case.attention, chunk_size=case.chunk_size)
    return found
