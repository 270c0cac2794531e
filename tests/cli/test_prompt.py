"""Where the prompt comes from, and what is refused."""

import io
from pathlib import Path
from types import SimpleNamespace

import pytest

from unisparse_np import InvalidInput
from unisparse_np.cli.prompt import read_prompt


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("Grüße, 世界\r\n".encode())
    assert read_prompt(str(path), None) == "Grüße, 世界\r\n"


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("\ufeffGrüße".encode())
    assert read_prompt(str(path), None) == "Grüße"


def test_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InvalidInput, match="standard input is closed: give a file with --prompt"):
        read_prompt("-", None)


def test_text_is_taken_as_it_is() -> None:
    assert read_prompt(None, "README.md") == "README.md"


def test_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO("aus der Röhre".encode())))
    assert read_prompt("-", None) == "aus der Röhre"


def test_a_missing_file_points_at_text() -> None:
    with pytest.raises(InvalidInput, match=r"'What is the capital\?' names no file: to give the prompt itself, use --text"):
        read_prompt("What is the capital?", None)
