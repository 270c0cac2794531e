"""unisparse-np bench: every time is there, and wrong flags are named."""

import json

import pytest
from click.testing import CliRunner

from unisparse_np.cli import main

SMALL = ["bench", "--backend", "reference", "--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--block-size", "16", "--repeats", "1"]


def test_json_holds_every_length_and_time():
    result = CliRunner().invoke(main, [*SMALL, "--length", "64", "--length", "100", "--attn-top-p", "0.3", "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert [row["length"] for row in answer["rows"]] == [64, 100]
    assert answer["config"]["top_p"] == 0.3
    for row in answer["rows"]:
        assert 0 < row["density"] <= 1
        assert all(row[kind] > 0 for kind in ("first", "selection", "attention", "whole", "dense"))


def test_table_has_a_line_a_length():
    result = CliRunner().invoke(main, [*SMALL, "--length", "64"])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("reference, float32, q [2, L, 8]")
    assert lines[2].split()[:2] == ["L", "density"]
    assert lines[3].split()[0] == "64"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-heads", "3"], "num_q_heads=2 is not a multiple of num_kv_heads=3"),
        (["--attn-top-p", "2"], "--attn-top-p=2.0"),
        (["--length", "0"], "not a size"),
    ],
)
def test_bad_flags_exit_2_and_say_why(flags, message):
    result = CliRunner().invoke(main, [*SMALL, *flags])
    assert result.exit_code == 2
    assert message in result.output
