"""unisparse.json: one config or one a layer, written whole, read back as it was, and refused when broken."""

import json
from pathlib import Path

import pytest

from unisparse_np import CheckpointError, UniSparseConfig
from unisparse_np.cli.options import config_from_flags
from unisparse_np.config_file import read_config_file, was_tuned, write_config_file

PER_LAYER = [UniSparseConfig.precise(), UniSparseConfig(block_size=64, q_compress=2, k_compress=4, top_p=None, row_threshold=0.05)]

COARSE = UniSparseConfig(q_compress=4, k_compress=2, row_threshold=0.02, top_p_compress=8)


def test_no_file_is_none(tmp_path: Path) -> None:
    assert read_config_file(tmp_path) is None and not was_tuned(tmp_path)


@pytest.mark.parametrize(
    "attention",
    [UniSparseConfig(), UniSparseConfig.balanced(), UniSparseConfig.precise(), UniSparseConfig(top_p=(0.9, 0.8)), PER_LAYER, COARSE],
)
def test_what_was_written_is_read_back(tmp_path: Path, attention: UniSparseConfig | list[UniSparseConfig]) -> None:
    write_config_file(tmp_path, attention, {"kl": 0.01})
    assert read_config_file(tmp_path) == attention and was_tuned(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["unisparse.json"]


def test_layers_hold_only_what_differs(tmp_path: Path) -> None:
    values = json.loads(write_config_file(tmp_path, PER_LAYER, {}).read_text())
    assert values["layers"] == [{"row_threshold": 0.02}, {"row_threshold": 0.05}]
    assert "row_threshold" not in values and values["block_size"] == 64


def test_flags_change_every_layer(tmp_path: Path) -> None:
    write_config_file(tmp_path, PER_LAYER, {})
    changed = config_from_flags(str(tmp_path), {"key_anchors": 2})
    assert [(config.key_anchors, config.row_threshold) for config in changed] == [(2, 0.02), (2, 0.05)]  # type: ignore[union-attr]
    assert config_from_flags(str(tmp_path), {"preset": "default"}) == UniSparseConfig()


def test_a_file_of_ones_own_is_not_taken_for_a_tuned_one(tmp_path: Path) -> None:
    (tmp_path / "unisparse.json").write_text('{"block_size": 64}')
    assert not was_tuned(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"layers": 3}', "layers is no list of objects"),
        ('{"layers": []}', "layers is no list of objects"),
        ('{"layers": [{"depth": 3}]}', "unknown field 'depth'"),
        ('{"layers": [3]}', "a int as a layer"),
        ('{"layers": [{"block_size": 100}]}', "does not divide block_size=100"),
    ],
)
def test_broken_layers_are_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "unisparse.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"unisparse\.json") as error:
        read_config_file(tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
