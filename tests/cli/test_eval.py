"""unisparse-np eval: what it prints and writes, that it goes on after a kill, and what it refuses before any work."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.cli import main
from unisparse_np.cli.config_text import attentions_of
from unisparse_np.config_file import write_config_file

from ..evaluation.small_model import TEXT, write_small_model

NEEDLE_LLAMA = Path(__file__).parents[2] / "examples" / "needle-llama"
PROMPTS = NEEDLE_LLAMA / "prompts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    return tmp_path


def run(model_dir: Path, arguments: str) -> Result:
    return CliRunner().invoke(main, ["eval", "-m", str(model_dir), "--backend", "reference", *arguments.split()])


def test_needle_llama_answers_questions_as_well_with_sparse_attention() -> None:
    prompt = (PROMPTS / "needle-2k.txt").read_text()
    answers = json.loads((PROMPTS / "answers.json").read_text())["needle-2k"]["answers"]
    Path("q.jsonl").write_text(json.dumps({"prompt": prompt, "answers": answers, "max_tokens": 12}) + "\n")
    result = run(NEEDLE_LLAMA, "--suite questions --questions q.jsonl --config default --json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    dense, sparse = summary["rows"]
    assert dense["score"][0] == sparse["score"][0] == 1.0 and dense["density"] == 1.0 and sparse["density"] < 0.9
    assert summary["run"]["suite"] == "questions" and summary["run"]["configs"]["default"]["block_size"] == 128
    assert summary["complete"] and summary["results"] == "eval-needle-llama-questions.jsonl"


def test_ruler_on_a_small_model(model: Path) -> None:
    arguments = "--suite ruler --tasks fwe,niah_single_1 --length 512 --max-context 4K -n 1 --raw"
    result = run(model, arguments.replace("512", "2K"))
    assert result.exit_code == 0, result.stderr
    lines = Path("eval-tiny-ruler.jsonl").read_text().splitlines()
    assert [json.loads(line)["task"] for line in lines[1:]] == ["fwe", "niah_single_1"]
    for line in lines[1:]:
        for measured in json.loads(line)["configs"].values():
            assert measured["prompt_tokens"] <= 2048
    assert "niah_single_1" in result.stdout and "default" in result.stdout


def test_text_figures_and_picture(model: Path) -> None:
    arguments = "--suite text --text text.txt --length 256 -n 2 --config block-size=32,attn-top-p=0.3 --config paper,block-size=32"
    result = run(model, f"{arguments} --plot p.svg")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[0] == "Predictions of a text, over the second half of each window; tiny, seed 0"
    head = result.stdout.splitlines()[2]
    for name in ("KL [95%]", "top-1 agree", "perplexity", "density"):
        assert name in head
    assert "90-100%" in result.stdout and "paper,block-size=32" in result.stdout
    assert "<svg" in Path("p.svg").read_text() and sorted(path.name for path in Path().iterdir()) == [
        "eval-tiny-text.jsonl", "p.svg", "text.txt",
    ]  # fmt: skip


def test_copy_figures(model: Path) -> None:
    summary = json.loads(run(model, "--suite copy --text text.txt --length 400 -n 2 --json").stdout)
    assert [row["config"] for row in summary["rows"]] == ["dense", "default"] and summary["rows"][0]["nll"][0] > 0


def test_a_killed_run_goes_on_and_ends_the_same(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--suite text --text text.txt --length 256 -n 3 --json --results r.jsonl"
    whole = run(model, arguments).stdout
    path = Path("r.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:30])  # as a kill would leave it
    measured = count_measurements(monkeypatch)
    assert run(model, arguments).stdout == whole
    assert measured == [lines_number(lines[2]), lines_number(lines[3])] and path.read_bytes() == b"".join(lines)


def count_measurements(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    from unisparse_np.evaluation.text_suite import TextSuite

    seen: list[int] = []
    measure = TextSuite.measure

    def counted(self: TextSuite, example: Any, *others: Any) -> dict:
        if len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(example.number)
        return measure(self, example, *others)

    monkeypatch.setattr(TextSuite, "measure", counted)
    return seen


def lines_number(line: bytes) -> int:
    return json.loads(line)["number"]


def test_ctrl_c_reports_what_there_is(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count_measurements(monkeypatch, stop_after=1)
    result = run(model, "--suite text --text text.txt --length 256 -n 3")
    assert result.exit_code == 130 and "dense" in result.stdout
    assert "stopped after 1 of 3 examples: the same command goes on from eval-tiny-text.jsonl" in result.stderr


def test_a_smaller_count_reads_from_a_greater_run(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = "--suite text --text text.txt --length 256 --results r.jsonl --json -n"
    run(model, f"{arguments} 3")
    measured = count_measurements(monkeypatch)
    assert json.loads(run(model, f"{arguments} 2").stdout)["rows"][0]["n"] == 2 and measured == []


REFUSED = {
    "length beyond the model": ("--suite text --text text.txt --length 1K", ("--length 1024", "512 positions", "--max-context")),
    "length too short for a task": ("--suite ruler --length 512", ("--length 512 is too short for", "tokens at least")),
    "task unknown": ("--tasks niah,cwe --length 2K --max-context 2K", ("'niah'", "niah_single_1")),
    "text no file": ("--suite text --text nothing.txt", ("nothing.txt", "cannot be read")),
    "text empty": ("--suite text --text empty.txt", ("empty.txt is empty",)),
    "text not UTF-8": ("--suite text --text latin1.txt", ("latin1.txt", "not UTF-8")),
    "text shorter than a window": ("--suite text --text short.txt --length 512", ("fewer than one window of 512",)),
    "too few windows": ("--suite text --text text.txt --length 512 -n 500", ("fewer than the 500 asked for",)),
    "no questions": ("--suite questions", ("--questions FILE",)),
    "questions no file": ("--suite questions --questions nothing.jsonl", ("nothing.jsonl", "cannot be read")),
    "questions for another suite": ("--suite text --questions q.jsonl", ("--questions has no effect with --suite text",)),
    "tasks for another suite": ("--suite copy --tasks vt", ("--tasks has no effect with --suite copy",)),
    "raw for a text": ("--suite text --raw", ("--raw has no effect with --suite text",)),
    "length for questions": ("--suite questions --questions q.jsonl --length 512", ("--length has no effect with --suite questions",)),
    "two lengths for a text": ("--suite text --length 256 --length 512", ("--length is given 2 times", "takes one")),
    "config unknown": ("--config fast", ("'fast' is neither a setting", "precise", "tuned")),
    "config setting unknown": ("--config paper,depth=3", ("'depth=3'", "name=value")),
    "config value": ("--config attn-top-p=most", ("top_p", "'most'", "off")),
    "config size": ("--config k-compress=0", ("k_compress", "'0' is not a size")),
    "config breaks a rule": ("--config compress=7", ("compress=7", "does not divide block-size=128")),
    "config twice": ("--config paper --config paper", ("paper is given twice",)),
    "tuned without a file": ("--config tuned", ("has no unisparse.json", "unisparse-np tune")),
    "picture of another kind": ("--suite text --text text.txt --length 256 --plot p.doc", ("p.doc", ".png")),
    "picture in no folder": ("--suite text --text text.txt --length 256 --plot no/p.png", ("no/p.png", "does not exist")),
    "results of another run": ("--suite text --text text.txt --length 128 --results r.jsonl", ("another run", "length", "256")),
    "results that are none": ("--suite text --text text.txt --length 128 --results text.txt", ("text.txt", "not a results file")),
    "results in no folder": ("--suite text --text text.txt --length 128 --results no/r.jsonl", ("no/r.jsonl", "cannot be written")),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence_and_nothing_is_lost(model: Path, folder: Path, name: str) -> None:
    Path("empty.txt").write_text("")
    Path("short.txt").write_text("a few words")
    Path("latin1.txt").write_bytes("café".encode("latin-1"))
    if "--results r.jsonl" in REFUSED[name][0]:
        assert run(model, "--suite text --text text.txt --length 256 -n 1 --results r.jsonl").exit_code == 0
    before = {path: path.read_bytes() for path in folder.iterdir()}
    arguments, words = REFUSED[name]
    result = run(model, arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    sentence = result.stderr.strip()
    assert sentence.startswith("Error: ") and "\n" not in sentence
    for word in words:
        assert word in sentence, f"{word!r} is not in: {sentence}"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_picture_without_matplotlib_is_refused_before_any_work(model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run(model, "--suite text --text text.txt --length 256 --plot p.png")
    assert (result.exit_code, result.stdout) == (1, "") and "pip install 'unisparse-np[plot]'" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["text.txt"]


def test_another_model_is_another_run(model: Path, tmp_path: Path) -> None:
    arguments = "--suite text --text text.txt --length 256 -n 1 --results r.jsonl"
    assert run(model, arguments).exit_code == 0
    result = run(NEEDLE_LLAMA, arguments)
    assert result.exit_code == 2 and "belongs to another run" in result.stderr


# ---- the text of a config ----


def test_configs_from_text(model: Path, tmp_path: Path) -> None:
    texts = ("dense", "balanced", "paper,attn-top-p=0.9,k-compress=4", "row-threshold=0.02,top_p=off,compress=4", "default,block-size=1K",
             "row-threshold=0.02,compress=4,top-p-compress=16", "row-threshold=0.02,top-p-compress=off")  # fmt: skip
    assert attentions_of(str(tmp_path), texts) == {
        "dense": "dense",
        "balanced": UniSparseConfig.balanced(),
        texts[2]: UniSparseConfig(top_p=0.9, k_compress=4, key_anchors=0, sink_blocks=0, local_blocks=0),
        texts[3]: UniSparseConfig(top_p=None, row_threshold=0.02, q_compress=4, k_compress=4),
        texts[4]: UniSparseConfig(block_size=1024),
        texts[5]: UniSparseConfig(row_threshold=0.02, q_compress=4, k_compress=4, top_p_compress=16),
        texts[6]: UniSparseConfig(row_threshold=0.02),
    }


def test_without_a_text_it_is_what_generate_uses(tmp_path: Path) -> None:
    assert attentions_of(str(tmp_path), ()) == {"dense": "dense", "default": UniSparseConfig()}
    layers = [UniSparseConfig(top_p=0.9), UniSparseConfig(top_p=0.8)]
    write_config_file(tmp_path, layers, {})
    assert attentions_of(str(tmp_path), ()) == {"dense": "dense", "tuned": layers}
    assert attentions_of(str(tmp_path), ("tuned,key-anchors=0",))["tuned,key-anchors=0"][1].key_anchors == 0  # type: ignore[index,union-attr]


def test_a_tuned_config_for_another_number_of_layers_is_refused(model: Path, tmp_path: Path) -> None:
    import shutil

    copied = Path(shutil.copytree(model, tmp_path / "copied"))
    write_config_file(copied, [UniSparseConfig(top_p=0.9), UniSparseConfig(top_p=0.8), UniSparseConfig()], {})
    result = run(copied, "--suite text --text text.txt --length 256")
    assert result.exit_code == 2 and "attention lists 3 configs, but the model has 2 layers" in result.stderr


def test_config_text_raises_the_projects_own_error() -> None:
    with pytest.raises(InvalidInput, match="head_compress"):
        attentions_of("nowhere", ("head-compress=x",))
