"""unisparse-np audit: both audits, their exit codes and their refusals."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from unisparse_np import UniSparseConfig, reference
from unisparse_np.cli import main
from unisparse_np.inspection.model_audit import ModelAudit, audit_model

from ..inspection.small import FLAGS, NEEDLE_LLAMA, TEXT

PROMPT = ["-m", str(NEEDLE_LLAMA), "--text", TEXT, "--raw", *FLAGS]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["audit", *arguments])


@pytest.fixture
def one_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisparse_np.inspection.stage_audit.RANDOM_CONFIGS", {"precise": UniSparseConfig.precise()})


def test_the_reference_agrees_with_itself() -> None:
    result = run("--backend", "reference", "--dtype", "float32")
    assert result.exit_code == 0 and "6 of 6 inputs agree" in result.stdout
    for words in ("random, precise", "later chunk", "sparse_attention", "bfloat16", "2x a plain 16-bit program"):
        assert words in result.stdout


@pytest.mark.usefixtures("one_config")
def test_every_dtype_by_default() -> None:
    result = run("--backend", "reference")
    assert result.exit_code == 0 and "6 of 6 inputs agree" in result.stdout
    for dtype in ("float32", "float16", "bfloat16"):
        assert result.stdout.count(f" {dtype} ") == 2


@pytest.mark.usefixtures("one_config")
def test_a_wrong_stage_is_named_and_the_exit_code_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisparse_np.comparison.load_backend", lambda name: Wrong())
    result = run("--backend", "reference", "--dtype", "float32")
    assert result.exit_code == 1 and "BAD select_blocks" in result.stdout and "0 of 2 inputs agree" in result.stdout
    as_json = run("--backend", "reference", "--dtype", "float32", "--json")
    found = json.loads(as_json.stdout)
    assert as_json.exit_code == 1 and not found["ok"]
    assert [stage["stage"] for stage in found["cases"][0]["stages"] if not stage["ok"]] == ["select_blocks"]


class Wrong:
    """The reference with its selection turned around."""

    def __getattr__(self, name: str) -> object:
        if name == "select_blocks":
            return lambda *arguments: ~reference.select_blocks(*arguments)
        return getattr(reference, name)


def test_stages_on_a_models_own_layers() -> None:
    result = run(*PROMPT, "--stages", "--layer", "1", "--layer", "-1", "--dtype", "float32")
    assert result.exit_code == 0 and "layer 1 " in result.stdout and "layer 3 " in result.stdout and "layer 0 " not in result.stdout


def test_a_model_is_audited_as_text_and_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    audits = []

    def audit_once(*arguments: Any, **options: Any) -> ModelAudit:
        audits.append(audits[0] if audits else audit_model(*arguments, **options))
        return audits[0]

    monkeypatch.setattr("unisparse_np.inspection.model_audit.audit_model", audit_once)
    result = run(*PROMPT)
    assert result.exit_code == 0 and len(audits) == 1
    for words in ("KL per token", "top-1 agreement", "perplexity", "mass kept", "rank corr", "worst heads", "what would help", "verdict"):
        assert words in result.stdout
    values = json.loads(run(*PROMPT, "--json", "-q").stdout)
    assert values["tokens"] > 100 and values["verdict"] in ("safe", "doubtful", "unsafe") and len(values["heads"]) == 32


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "a"], "--text needs a model: add --model DIR"),
        (["--attn-top-p", "0.9"], "an attention flag needs a model"),
        (["--dtype", "int8"], "--dtype int8 is not known: give auto, float32"),
        ([*PROMPT, "--layer", "1"], "--layer has no effect without --stages"),
        ([*PROMPT, "--heads", "--stages"], "--heads has no effect with --stages"),
        ([*PROMPT, "--stages", "--layer", "9"], "--layer 9 is out of range: there are 4"),
        (["-m", str(NEEDLE_LLAMA)], "neither was given"),
        (["-m", str(NEEDLE_LLAMA), "--text", "The sky is", "--raw"], "one block of 128 at most"),
        (["-m", str(NEEDLE_LLAMA), "--text", TEXT, "--raw", "--attention", "dense"], "0 layers are sparse"),
    ],
)
def test_refusals(arguments: list[str], words: str) -> None:
    result = run(*arguments, "-q", *([] if "--backend" in arguments else ["--backend", "reference"]))
    assert (result.exit_code, result.stdout) == (2, "") and words in result.stderr and len(result.stderr.strip().splitlines()) == 1
