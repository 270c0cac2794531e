"""Random small models, rebuilt from names and shapes alone, so that only configs and expected logits need storing."""

import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "data" / "llama_logits"
CASES = sorted(path.stem for path in FOLDER.glob("*.json"))
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


class Case(NamedTuple):
    """One stored case: config.json as transformers wrote it, what the checkpoint holds, and the expected logits."""

    config: dict[str, Any]
    transformers: str  # the version that wrote the config and computed the logits
    dtype: str  # of the stored weights
    shards: int
    tensors: dict[str, list[int]]  # name -> shape
    token_ids: np.ndarray  # [T]
    logits: np.ndarray  # [T, vocab] float32


def load_case(name: str) -> Case:
    description = json.loads((FOLDER / f"{name}.json").read_text())
    with np.load(FOLDER / f"{name}.npz") as arrays:
        return Case(**description, token_ids=arrays["token_ids"], logits=arrays["logits"])


def random_tensor(name: str, shape: list[int]) -> np.ndarray:
    """A weight that depends on its name and shape only: [out, in] of size 1/sqrt(in), norms around 1, biases around 0."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("norm.weight"):
        return (1 + 0.2 * values).astype(np.float32)
    if name.endswith(".bias"):
        return (0.3 * values).astype(np.float32)
    sharper = 2.0 if "q_proj" in name or "k_proj" in name else 1.0  # attention that is far from uniform
    return (sharper * values / np.sqrt(shape[-1])).astype(np.float32)


def write_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, list[int]], dtype: str = "float32", shards: int = 1, **replaced: Any
) -> Path:
    """A model folder without a tokenizer. `replaced` gives single tensors instead of random ones (dots written as __)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {name: random_tensor(name, shape).astype(DTYPES[dtype]) for name, shape in tensors.items()}
    arrays.update({name.replace("__", "."): value for name, value in replaced.items()})
    if shards == 1:
        save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {name: f"model-{n % shards + 1:05}-of-{shards:05}.safetensors" for n, name in enumerate(sorted(arrays))}
    for shard in sorted(set(weight_map.values())):
        save_file({name: arrays[name] for name in arrays if weight_map[name] == shard}, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": sum(array.nbytes for array in arrays.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
