"""The model folder that the rows spoil."""

import shutil
from pathlib import Path

import pytest

from unisparse_np.model.gguf import convert

from ..model.gguf_files import TinyModel


@pytest.fixture(scope="session")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: 2 layers, 4 query heads, 2 KV heads, context 512, a chat template."""
    folder = tmp_path_factory.mktemp("model")
    convert(TinyModel().write(folder / "tiny.gguf"), folder / "tiny", dtype="float32")
    return folder / "tiny"


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_model, tmp_path / "model"))
