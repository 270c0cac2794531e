"""GGUF files: how one is made, the folder to write, the exit code, and words of the refusal."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ..model.gguf_files import TinyModel
from .refusals import CHECKPOINT, USAGE, contents, refused


def half_a_file(folder: Path) -> Path:
    path = TinyModel().write(folder / "half.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    return path


CONVERSIONS: dict[str, tuple[Callable[[Path], Path], str, int, tuple[str, ...]]] = {
    "no file": (lambda folder: folder / "nothing.gguf", "out", USAGE, ("nothing.gguf", "not there", ".gguf")),
    "a directory": (lambda folder: folder, "out", USAGE, ("a directory", ".gguf")),
    "target a file": (lambda folder: TinyModel().write(folder / "a.gguf"), "taken", USAGE, ("taken is a file", "new folder")),
    "target exists": (lambda folder: TinyModel().write(folder / "a.gguf"), ".", USAGE, ("exists", "--force")),
    "cut": (half_a_file, "out", CHECKPOINT, ("half.gguf", "download it again")),
    "no GGUF": (lambda folder: folder / "taken", "out", CHECKPOINT, ("taken", "not a complete GGUF file")),
    "architecture unknown": (lambda folder: TinyModel("gemma").write(folder / "a.gguf"), "out", CHECKPOINT, ("gemma", "another model")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(tmp_path: Path, name: str) -> None:
    make, target, code, words = CONVERSIONS[name]
    (tmp_path / "taken").write_text("not a model")
    source = make(tmp_path)
    before = contents(tmp_path)
    refused("convert", source, tmp_path / target, code=code, words=words)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()
