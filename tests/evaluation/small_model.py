"""A random model of two layers with context 512, and text for it: quick enough for whole runs in tests."""

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from safetensors.numpy import load_file, save_file

from unisparse_np.model.gguf import convert
from unisparse_np.model.llama import Llama
from unisparse_np.model.loading import load
from unisparse_np.model.tokenizer import Tokenizer

from ..llama_checkpoints import random_tensor
from ..model.gguf_files import TinyModel

TEXT = " ".join(f"Line {n} says that {n * n} is the square of {n}, and hello world." for n in range(60))


def write_small_model(folder: Path) -> Path:
    """The model folder; its tokenizer works on bytes and has a chat template. Its attention is far from uniform."""
    folder.mkdir(exist_ok=True)
    convert(TinyModel().write(folder / "tiny.gguf"), folder / "tiny", dtype="float32")
    weights = folder / "tiny" / "model.safetensors"
    tensors = load_file(weights)
    save_file({name: random_tensor(name, list(tensor.shape)) for name, tensor in tensors.items()}, weights, metadata={"format": "pt"})
    return folder / "tiny"


@cache
def small_model() -> tuple[Llama, Tokenizer]:
    """The same model, loaded once for all tests; in float64, so that rounding cannot tip a block decision."""
    return load(write_small_model(Path(mkdtemp())), backend="reference", dtype="float64")
