"""unisparse-np generate: what goes to stdout, what to stderr, and how it ends. The model is real where a test says so."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from unisparse_np import BackendUnavailable, CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.cli import main
from unisparse_np.model.generate import Piece
from unisparse_np.model.statistics import Statistics
from unisparse_np.parallel import ONE_PROCESS

NEEDLE_LLAMA = Path(__file__).parents[2] / "examples" / "needle-llama"
PROMPTS = NEEDLE_LLAMA / "prompts"
STATISTICS = Statistics(
    prompt_tokens=8150, prefill_seconds=2.0, prefill_tokens_per_second=4075.0, time_to_first_token=2.1, generated_tokens=3,
    decode_seconds=0.5, decode_tokens_per_second=4.0, densities=[0.2, 0.4], density_mean=0.3, density_lowest=0.2, density_highest=0.4,
    peak_memory_bytes=153 * 2**20,
)  # fmt: skip


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["generate", "-m", str(NEEDLE_LLAMA), *arguments])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Put a model in place that answers "one two three", and record what it was asked."""
    recorded: list[dict[str, Any]] = []

    def load(path: str, **options: Any) -> tuple[str, str]:
        recorded.append({"path": path, **options})
        return "model", "tokenizer"

    def stream_generate(model: str, tokenizer: str, prompt: str, **options: Any) -> Iterator[Piece]:
        recorded.append({"prompt": prompt, **options})
        return iter([Piece("one", 1), Piece(" two", 2), Piece(" three", 3, "eos", STATISTICS)])

    monkeypatch.setattr("unisparse_np.model.loading.load", load)
    monkeypatch.setattr("unisparse_np.model.generate.stream_generate", stream_generate)
    return recorded


def test_text_on_stdout_and_statistics_on_stderr(calls: list) -> None:
    result = run("--text", "hello", "--backend", "reference")
    assert result.exit_code == 0
    assert result.stdout == "one two three\n"
    for words in ("8,150 tokens in 2.00 s", "first token after 2.10 s", "mean 0.300, lowest layer 0.200, highest 0.400", "153 MiB", "load"):
        assert words in result.stderr


def test_quiet_leaves_stderr_empty(calls: list) -> None:
    result = run("--text", "hello", "-q")
    assert (result.stdout, result.stderr) == ("one two three\n", "")


def test_json_is_one_object_on_stdout(calls: list) -> None:
    result = run("--text", "hello", "--json", "--backend", "reference")
    answer = json.loads(result.stdout)
    assert answer["text"] == "one two three" and answer["finish_reason"] == "eos"
    assert answer["statistics"]["density_mean"] == 0.3 and answer["statistics"]["load_seconds"] >= 0
    assert result.stderr == ""


def test_auto_says_which_backend_it_chose_and_why(calls: list) -> None:
    result = run("--text", "hello")
    assert result.stderr.startswith("backend   ")
    assert calls[0]["backend"] in ("reference", "cupy") and f"backend   {calls[0]['backend']} (" in result.stderr


def test_every_flag_arrives(calls: list) -> None:
    flags = (
        "--text hello -n 1K --system be-brief --temp 0.7 --top-k 40 --top-p 0.9 --min-p 0.05 --repetition-penalty 1.1 --seed 7 "
        "--stop END --stop . --raw "
        "--attn-top-p 0.8 --decode-attention unisparse --backend reference --dtype float32 --chunk-size 2K --max-context 16K --check-finite"
    )
    assert run(*flags.split()).exit_code == 0
    loaded, asked = calls
    assert callable(loaded.pop("progress")) and loaded.pop("ranks") is ONE_PROCESS
    assert loaded == {
        "path": str(NEEDLE_LLAMA), "backend": "reference", "dtype": "float32", "max_context": 16384, "check_finite": True
    }  # fmt: skip
    assert asked.pop("progress") is None  # nobody sees a bar here
    assert asked == {
        "prompt": "hello", "attention": UniSparseConfig(top_p=0.8), "decode_attention": UniSparseConfig(top_p=0.8), "max_tokens": 1024,
        "temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1, "seed": 7, "stop": ("END", "."),
        "system": "be-brief", "raw": True, "chunk_size": 2048,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("error", "code"),
    [(InvalidInput("a is b: give c"), 2), (CheckpointError("a is b: give c"), 1), (BackendUnavailable("a is b: give c"), 1)],
)
def test_our_errors_are_one_line_and_a_code(calls: list, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("unisparse_np.model.loading.load", fail)
    result = run("--text", "hello", "-q", "--json")
    assert (result.exit_code, result.stdout, result.stderr) == (code, "", "Error: a is b: give c\n")


def test_a_bug_keeps_its_traceback(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisparse_np.model.loading.load", lambda *_, **__: 1 / 0)
    assert isinstance(run("--text", "hello").exception, ZeroDivisionError)


@pytest.mark.parametrize("as_json", [False, True])
def test_ctrl_c_keeps_what_was_printed(calls: list, monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    def interrupted(*_: Any, **__: Any) -> Iterator[Piece]:
        yield Piece("one", 1)
        raise KeyboardInterrupt

    monkeypatch.setattr("unisparse_np.model.generate.stream_generate", interrupted)
    result = run("--text", "hello", "-q", *(["--json"] if as_json else []))
    assert result.exit_code == 130 and result.stderr == ""
    if as_json:
        assert json.loads(result.stdout) == {"text": "one", "finish_reason": "interrupted", "statistics": None}
    else:
        assert result.stdout == "one\n"


def test_notes_are_one_line_without_code(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    def warn(*_: Any, **__: Any) -> Iterator[Piece]:
        warnings.warn("the model has no chat template", UserWarning, stacklevel=1)
        return iter([Piece("x", 1, "eos", STATISTICS)])

    monkeypatch.setattr("unisparse_np.model.generate.stream_generate", warn)
    assert run("--text", "hello", "-q").stderr == "Note: the model has no chat template\n"


# ---- with needle-llama ----


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "unisparse_np", "generate", "-m", str(NEEDLE_LLAMA), *arguments]


def test_needle_llama_finds_the_needle() -> None:
    result = run("-p", str(PROMPTS / "needle-2k.txt"), "--raw", "--stop", ".", "--json", "--backend", "reference")
    answer = json.loads(result.stdout)
    expected = json.loads((PROMPTS / "answers.json").read_text())["needle-2k"]["answers"]
    assert result.exit_code == 0 and [answer["text"].strip()] == expected
    assert answer["finish_reason"] == "stop" and 0 < answer["statistics"]["density_lowest"] < answer["statistics"]["density_highest"] <= 1
    assert answer["statistics"]["prompt_tokens"] == 2038


def test_the_prompt_from_a_pipe_and_a_reader_that_leaves(tmp_path: Path) -> None:
    """The reader takes one byte and goes: no complaint, no traceback."""
    arguments = command("-p", "-", "--raw", "-n", "2000", "-q", "--backend", "reference")
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write(b"One of the special magic numbers")
        process.stdin.close()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=60) in (0, 1)
        assert process.stderr.read() == b""


def test_ctrl_c_on_the_real_program() -> None:
    arguments = command("--text", "One of the special magic numbers", "--raw", "-n", "8000", "-q", "--backend", "reference")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, **pipes, env=environment(), preexec_fn=listening_to_ctrl_c) as process:
        assert process.stdout and process.stderr
        first = process.stdout.read(1)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert (first + rest).endswith(b"\n") and b"Traceback" not in errors


def listening_to_ctrl_c() -> None:
    """What runs in the background of a shell ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(NEEDLE_LLAMA.parents[1])}
