"""unisparse-np explain: text, JSON and refusals."""

import json

import pytest
from click.testing import CliRunner, Result

from unisparse_np.cli import main

from ..inspection.small import FLAGS, NEEDLE_LLAMA, TEXT


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", "-m", str(NEEDLE_LLAMA), "--raw", *FLAGS, *arguments])


def test_the_last_block_of_the_middle_layer_by_default() -> None:
    result = run("--text", TEXT)
    assert result.exit_code == 0
    assert result.stdout.startswith("Layer 2, head 0 (reads KV head 0), query block ") and "Step 6" in result.stdout


def test_json_of_a_chosen_block() -> None:
    values = json.loads(run("--text", TEXT, "--layer", "-1", "--head", "3", "--block", "2", "--json", "-q").stdout)
    assert (values["layer"], values["head"], values["block"], len(values["key_blocks"])) == (3, 3, 2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", TEXT, "--layer", "7"], "--layer 7 is out of range: there are 4, so give 0 to 3"),
        (["--text", TEXT, "--head", "8"], "--head 8 is out of range: there are 8"),
        (["--text", TEXT, "--block", "100"], "--block 100 is out of range"),
        (["--text", "The sky"], "one block of 32 at most"),
        ([], "neither was given"),
    ],
)
def test_refusals(arguments: list[str], words: str) -> None:
    result = run(*arguments, "-q")
    assert (result.exit_code, result.stdout) == (2, "") and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
