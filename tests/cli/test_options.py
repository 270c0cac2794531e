"""How attention flags, --preset and unisparse.json become a config, and in which order they win."""

import json
import os
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from unisparse_np import CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.cli.options import OFF, Size, attention_options, resolve_attention, use_device


def flags_of(*arguments: str) -> dict[str, Any]:
    """What attention_options hands to a command for these arguments."""
    seen: dict[str, Any] = {}

    @click.command()
    @attention_options
    def command(**values: Any) -> None:
        seen.update(values)

    result = CliRunner().invoke(command, list(arguments))
    assert result.exit_code == 0, result.output
    return seen


def config_of(folder: Path, *arguments: str) -> object:
    """The prefill attention that these arguments ask for."""
    values = flags_of(*arguments)
    return resolve_attention(str(folder), values["attention"], values["decode_attention"], values["attention_flags"])[0]


def test_nothing_given_is_nothing_set(tmp_path: Path) -> None:
    assert flags_of() == {"attention": "unisparse", "decode_attention": "dense", "attention_flags": {}}
    assert config_of(tmp_path) == UniSparseConfig()


def test_flag_beats_preset_beats_file_beats_default(tmp_path: Path) -> None:
    (tmp_path / "unisparse.json").write_text(json.dumps({"block_size": 64, "top_p": 0.9}))
    assert config_of(tmp_path) == UniSparseConfig(block_size=64, top_p=0.9)
    assert config_of(tmp_path, "--preset", "paper") == UniSparseConfig.paper()
    assert config_of(tmp_path, "--attn-top-p", "0.8") == UniSparseConfig(block_size=64, top_p=0.8)
    assert config_of(tmp_path, "--preset", "paper", "--attn-top-p", "0.8") == UniSparseConfig.paper(0.8)
    assert config_of(tmp_path, "--preset", "default") == UniSparseConfig()


def test_off_is_none(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--attn-top-p", OFF, "--row-threshold", "0.02")
    assert config == UniSparseConfig(top_p=None, row_threshold=0.02)
    assert config_of(tmp_path, "--preset", "precise", "--row-threshold", "OFF", "--attn-top-p", "0.9") == UniSparseConfig(
        block_size=64, q_compress=2, k_compress=4, top_p=0.9, row_threshold=None
    )


def test_composite_tokens_for_top_p_can_be_turned_off(tmp_path: Path) -> None:
    (tmp_path / "unisparse.json").write_text(json.dumps({"row_threshold": 0.02, "q_compress": 4, "top_p_compress": 16}))
    assert config_of(tmp_path) == UniSparseConfig(q_compress=4, row_threshold=0.02, top_p_compress=16)
    assert config_of(tmp_path, "--top-p-compress", "Off") == UniSparseConfig(q_compress=4, row_threshold=0.02)
    with pytest.raises(InvalidInput, match="attention flags: --top-p-compress=16 with --row-threshold=off"):
        config_of(tmp_path, "--row-threshold", "off")


def test_compress_sets_both_and_the_finer_flag_wins(tmp_path: Path) -> None:
    assert config_of(tmp_path, "--compress", "4") == UniSparseConfig(q_compress=4, k_compress=4)
    assert config_of(tmp_path, "--compress", "4", "--k-compress", "2") == UniSparseConfig(q_compress=4, k_compress=2)


def test_zero_is_a_value_and_not_unset(tmp_path: Path) -> None:
    config = config_of(tmp_path, "--key-anchors", "0", "--sink-blocks", "0", "--local-blocks", "0")
    assert config == UniSparseConfig.paper()


def test_every_field_of_the_config_has_a_flag(tmp_path: Path) -> None:
    given = (
        "--block-size 256 --q-compress 4 --k-compress 16 --head-compress 2 --attn-top-p 0.5 --row-threshold 0.1 --key-anchors 3 "
        "--sink-blocks 2 --local-blocks 4 --top-p-compress 32"
    )
    assert config_of(tmp_path, *given.split()) == UniSparseConfig(256, 4, 16, 2, 0.5, 0.1, 3, 2, 4, 32)


def test_dense_and_decode_attention() -> None:
    config = UniSparseConfig(block_size=64)
    assert resolve_attention("nowhere", "dense", "dense", {}) == ("dense", "dense")
    assert resolve_attention("nowhere", "unisparse", "unisparse", {"block_size": 64}) == (config, config)
    assert resolve_attention("nowhere", "dense", "unisparse", {"block_size": 64}) == ("dense", config)


def test_flags_that_nothing_would_use_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--attn-top-p has no effect with --attention dense"):
        resolve_attention("nowhere", "dense", "dense", {"top_p": 0.9})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "a list"),
        ('{"blok_size": 64}', "unknown field 'blok_size'"),
        ('{"block_size": 100}', "does not divide block_size=100"),
        ('{"top_p": "high"}', "top_p='high' is not a number"),
    ],
)
def test_a_broken_unisparse_json_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "unisparse.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as error:
        config_of(tmp_path)
    assert "unisparse.json" in str(error.value)
    assert config_of(tmp_path, "--preset", "default") == UniSparseConfig()


@pytest.mark.parametrize(("text", "tokens"), [("8K", 8192), ("8k", 8192), ("1M", 1048576), ("100", 100), (" 2K ", 2048)])
def test_sizes(text: str, tokens: int) -> None:
    assert Size().convert(text, None, None) == tokens


@pytest.mark.parametrize("text", ["0", "-1", "8KB", "1.5K", "", "many", "0K"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is not a size"):
        Size().convert(text, None, None)


def test_device_hides_the_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    use_device(None, "auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"
    with pytest.raises(InvalidInput, match="--device 2"):
        use_device(2, "auto")
    use_device(1, "cupy")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
