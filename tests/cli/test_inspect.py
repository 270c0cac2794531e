"""unisparse-np inspect: the table, the files, two configs, and the refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from unisparse_np.cli import main

from ..inspection.small import FLAGS, NEEDLE_LLAMA, TEXT


def run(*arguments: str, command: str = "inspect") -> Result:
    return CliRunner().invoke(main, [command, "-m", str(NEEDLE_LLAMA), "--raw", *FLAGS, *arguments])


def test_files_of_every_kind(tmp_path: Path) -> None:
    result = run(
        "--text", TEXT, "--html", str(tmp_path / "r.html"), "--png", str(tmp_path), "--npz", str(tmp_path / "a.npz"), "--layer", "1"
    )
    assert result.exit_code == 0 and result.stdout.startswith("density in percent")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "density.png", "layer_01.png", "r.html"]
    assert "<title>What sparse attention kept: needle-llama</title>" in (tmp_path / "r.html").read_text()
    with np.load(tmp_path / "a.npz") as arrays:
        assert arrays["layer_1_kept"].shape[0] == 8


def test_two_configs_as_json(tmp_path: Path) -> None:
    page = tmp_path / "two.html"
    result = run("--text", TEXT, "--compare", "--preset paper --block-size 64", "--json", "-q", "--html", str(page))
    first, second = json.loads(result.stdout)["configs"]
    assert second["label"] == "--preset paper --block-size 64" and first["label"].startswith("--compress 4 --block-size 32")
    assert first["density"] != second["density"] and len(first["layers"]) == 4
    assert '"block_size":64' in page.read_text() and '"block_size":32' in page.read_text()


def test_the_config_file_beside_the_model_is_named(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in NEEDLE_LLAMA.glob("*.*"):
        (model / path.name).symlink_to(path)
    (model / "unisparse.json").write_text(json.dumps({"block_size": 32, "q_compress": 4, "k_compress": 4}))
    result = CliRunner().invoke(main, ["inspect", "-m", str(model), "--raw", "--text", TEXT, "--local-blocks", "0"])
    assert "density in percent of the blocks (100 is dense), unisparse.json --local-blocks 0" in result.stdout
    assert f"attention {model / 'unisparse.json'} (--preset default passes it by)" in result.stderr
    result = CliRunner().invoke(main, ["inspect", "-m", str(model), "--raw", "--text", TEXT, *FLAGS, "--preset", "default"])
    assert "unisparse.json" not in result.stdout + result.stderr


def test_explain_writes_the_page_at_its_block(tmp_path: Path) -> None:
    page = tmp_path / "block.html"
    result = run("--text", TEXT, "--layer", "1", "--head", "3", "--block", "2", "--html", str(page), command="explain")
    assert result.exit_code == 0 and '"focus":{"layer":1,"head":3,"block":2}' in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", TEXT, "--layer", "4"], "--layer 4 is out of range: there are 4, so give 0 to 3"),
        (["--text", TEXT, "--png", "{folder}/nowhere/masks"], "nowhere does not exist: make it first"),
        (["--text", TEXT, "--html", "{folder}/nowhere/r.html"], "nowhere does not exist: make it first"),
        (["--text", TEXT, "--html", "{folder}/r.pdf"], "does not end in .html"),
        (["--text", TEXT, "--attention", "dense"], "--compress has no effect with --attention dense"),
        (["--text", "The sky", "--html", "{folder}/r.html"], "one block of 32 at most"),
        (["--text", TEXT, "--no-truth"], "--no-truth has no effect without --html or --npz"),
        (["--text", TEXT, "--compare", "--preset paper", "--npz", "{folder}/a.npz"], "--png and --npz hold one"),
        (["--text", TEXT, "--compare", "--preset nice"], "--compare '--preset nice': Invalid value"),
        (["--text", TEXT, "--compare", "paper"], "--compare 'paper': Got unexpected extra argument"),
        (["--text", TEXT, "--compare", ""], "names no change"),
        (["--text", TEXT, "--compare", "--block-size 4K"], "one block of 4096 at most"),
    ],
)
def test_refusals_write_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    result = run(*(argument.replace("{folder}", str(tmp_path)) for argument in arguments), "-q")
    assert (result.exit_code, result.stdout) == (2, "") and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_has_nothing_to_show() -> None:
    result = CliRunner().invoke(main, ["inspect", "-m", str(NEEDLE_LLAMA), "--raw", "--text", TEXT, "--attention", "dense", "-q"])
    assert result.exit_code == 2 and "0 layers are sparse" in result.stderr


def test_a_folder_for_pictures_is_made(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run("--text", TEXT, "--png", str(tmp_path / "masks"), "-q").exit_code == 0
    assert "density.png" in {path.name for path in (tmp_path / "masks").iterdir()}


def test_a_file_is_no_folder_for_pictures(tmp_path: Path) -> None:
    (tmp_path / "masks").write_text("taken")
    result = run("--text", TEXT, "--png", str(tmp_path / "masks"), "-q")
    assert result.exit_code == 2 and "masks is a file: name a folder" in result.stderr
