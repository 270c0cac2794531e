"""unisparse-np tune: what it writes beside the model, that generate and eval use it, that it goes on, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from unisparse_np import UniSparseConfig
from unisparse_np.cli import main
from unisparse_np.config_file import read_config_file
from unisparse_np.evaluation import search
from unisparse_np.evaluation.probe import Probe, Prober

from ..evaluation.small_model import TEXT, write_small_model


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(good_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the model to write to, text beside it, and a search of fewer kinds."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    monkeypatch.setattr(search, "COMPOSITES", ((8, 8), (2, 8)))
    monkeypatch.setattr(search, "ANCHORS", (0,))
    return Path(shutil.copytree(good_model, tmp_path / "tiny"))


def run(command: str, model: Path, arguments: str) -> Result:
    return CliRunner().invoke(main, [command, "-m", str(model), "--backend", "reference", *arguments.split()])


TUNE = "--text text.txt --length 384 --windows 1 --held-out 1"


def test_from_tune_to_eval_and_generate(model: Path) -> None:
    result = run("tune", model, f"{TUNE} --max-kl 0.3")
    assert result.exit_code == 0, result.stderr
    for words in ("Search windows, read off where KL reaches 0.3", "Held-out windows", "tuned", "default preset", "Cost by composites"):
        assert words in result.stdout
    assert f"wrote {model / 'unisparse.json'}: generate, audit and eval use it from now on" in result.stderr
    tuned = json.loads((model / "unisparse.json").read_text())["tuned"]
    assert 0 < tuned["kl"] <= 0.3 and 0 < tuned["cost"] < 1 and tuned["cost_is"] == "model"
    assert sorted(path.name for path in Path().iterdir()) == ["text.txt", "tiny", "tune-tiny.jsonl"]

    evaluated = json.loads(run("eval", model, "--suite text --text text.txt --length 384 -n 1 --json").stdout)
    assert [row["config"] for row in evaluated["rows"]] == ["dense", "tuned"]
    answer = run("generate", model, "--text hello --raw -n 2")
    assert answer.exit_code == 0 and f"attention {model / 'unisparse.json'}" in answer.stderr


def test_a_stopped_run_goes_on_and_ends_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("tune", model, f"{TUNE} --max-kl 0.3 --json")
    written = (model / "unisparse.json").read_bytes()
    records = Path("tune-tiny.jsonl").read_bytes().splitlines(keepends=True)
    Path("tune-tiny.jsonl").write_bytes(b"".join(records[:8]))
    (model / "unisparse.json").unlink()
    measured = 0
    measure = Prober._measure

    def stop_after_three(self: Prober, *arguments: object) -> dict:
        nonlocal measured
        measured += 1
        if measured == 4:
            raise KeyboardInterrupt
        return measure(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Prober, "_measure", stop_after_three)
    stopped = run("tune", model, f"{TUNE} --max-kl 0.3")
    assert stopped.exit_code == 130 and "goes on from tune-tiny.jsonl" in stopped.stderr and "Search windows" in stopped.stdout
    assert not (model / "unisparse.json").exists()
    again = run("tune", model, f"{TUNE} --max-kl 0.3 --json")
    assert again.stdout == whole.stdout and (model / "unisparse.json").read_bytes() == written
    assert Path("tune-tiny.jsonl").read_bytes() == b"".join(records)


def test_a_tuned_file_is_written_anew_and_read_back(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prober, "__call__", loss_of_looseness)
    assert run("tune", model, f"{TUNE} --max-kl 0.02").exit_code == 0
    first = read_config_file(model)
    assert run("tune", model, f"{TUNE} --max-kl 0.01").exit_code == 0
    second = read_config_file(model)
    assert isinstance(first, UniSparseConfig) and isinstance(second, UniSparseConfig)
    assert first != second


def loss_of_looseness(self: Prober, attention: object, windows: object) -> Probe:
    """A made-up model: the looser, the more loss and the less cost; all layers and heads alike."""
    layers = attention if isinstance(attention, list) else [attention] * 2
    loose = [0.0 if a == "dense" else float(np.mean(a.row_threshold if a.top_p is None else np.subtract(1, a.top_p))) for a in layers]
    densities = [1 - 2 * one**0.5 if one else 1.0 for one in loose]
    return Probe(sum(loose) / 4, max(0.05, sum(densities) / 2), densities, [sum(loose) / 4])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--max-kl 0", ("--max-kl 0", "above 0")),
        ("--max-kl nan", ("--max-kl nan", "above 0")),
        ("--length 1K", ("--length 1024", "512 positions", "--max-context")),
        ("--windows 500", ("fewer than the 501 asked for",)),
        ("--text nothing.txt", ("nothing.txt", "cannot be read")),
        ("--text short.txt", ("fewer than one window",)),
        ("--results text.txt", ("text.txt", "not a results file")),
        ("--seed 1 --results r.jsonl", ("r.jsonl", "another run")),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(model: Path, arguments: str, words: tuple[str, ...]) -> None:
    Path("short.txt").write_text("a few words")
    if "r.jsonl" in arguments:
        from unisparse_np.evaluation.results import ResultsFile

        with ResultsFile(Path("r.jsonl"), {"seed": 0}):
            pass
    before = contents(model.parent)
    result = run("tune", model, f"{TUNE} {arguments}")
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    sentence = result.stderr.strip()
    assert sentence.startswith("Error: ") and "\n" not in sentence
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"
    assert contents(model.parent) == before


def test_a_bound_that_nothing_meets_names_the_best(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prober, "__call__", lambda *_: Probe(0.5, 0.4, [0.4, 0.4], [0.5]))
    result = run("tune", model, f"{TUNE} --max-kl 0.02")
    assert result.exit_code == 2 and result.stdout == ""
    sentence = result.stderr.strip()
    assert "no config keeps KL at 0.02" in sentence and "KL 0.5 at a cost of 0.400" in sentence and "\n" not in sentence
    assert not (model / "unisparse.json").exists()


def test_a_config_of_ones_own_is_kept(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Prober, "__call__", loss_of_looseness)
    (model / "unisparse.json").write_text('{"block_size": 64}')
    result = run("tune", model, TUNE)
    assert result.exit_code == 2 and "was not written by tune" in result.stderr and "--force" in result.stderr
    assert (model / "unisparse.json").read_text() == '{"block_size": 64}'
    assert run("tune", model, f"{TUNE} --force").exit_code == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
