"""What the quality benchmarks measure by, against the same figures from whole logits; and every picture from rows alone."""

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from unisparse_np import UniSparseConfig
from unisparse_np.evaluation.divergence import divergence

from .small_model import TEXT, small_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in [name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).startswith(str(BENCHMARKS))]:
        del sys.modules[name]


def test_window_measures_what_whole_logits_give(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = import_module("losses")
    monkeypatch.setattr(losses, "ROWS_AT_ONCE", 32)
    model, tokenizer = small_model()
    token_ids = tokenizer.encode(TEXT)[:256]
    config = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.5)
    window = losses.Window(model, token_ids)
    loss = window.loss(config)
    dense, sparse = (model.logits(token_ids[:-1], attention)[128:] for attention in ("dense", config))
    expected = divergence(dense, sparse, np.array(token_ids[129:]))
    assert loss["kl"] == pytest.approx(expected.kl.mean(), abs=1e-6) and loss["kl"] > 1e-3
    assert loss["top1"] == expected.top1.mean()
    assert loss["nll_rise"] == pytest.approx((expected.nll - expected.dense_nll).mean(), abs=1e-5)
    assert 0 < loss["density"] < 1
    assert window.loss("dense")["kl"] == pytest.approx(0, abs=1e-6)


def test_experiments_draw_their_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiments, plots = import_module("experiments"), import_module("experiment_plots")
    rows = [{"model": "SmolLM2", "c": str(c), "kl": 0.1 / c, "density": 0.2, "selection_ms": 1.0 / c} for c in (4, 8)]
    rows += [{"model": "needle-llama", "c": str(c), "share_of_dense": 0.9, "density": 0.3} for c in (4, 8)]
    panels = experiments.EXPERIMENTS["composite-size"].panels(rows)
    assert [panel.names for panel in panels] == [("c 4", "c 8")] * 3
    assert panels[0].lines["SmolLM2"] == ([0.25, 0.125], [0.025, 0.0125])
    assert plots.draw(panels, tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_questions_are_the_same_every_time() -> None:
    losses = import_module("losses")
    first, second = ([(task, [int(t) for t in example[0]]) for task, example in losses.questions(512, 3)] for _ in range(2))
    assert first == second and [task for task, _ in first] == losses.needle_tasks().TASKS[:3]
    assert all(len(token_ids) <= 512 for _, token_ids in first)


def test_rules_are_summed_up_beside_dense() -> None:
    rules = import_module("selection_rules")
    scores = {"dense": [1.0, 0.5, 0.0, 0.5], "S 64": [0.5, 0.5, 0.0, 0.0], "c 4": [1.0]}  # two questions of each of two tasks
    records = [
        {"item": f"{'solved' if n < 2 else 'hard'} {n}", "rule": rule, "score": score, "density": 0.25}
        for rule, of_rule in scores.items()
        for n, score in enumerate(of_rule)
    ]
    result = rules.summary(rules.suite_of("needles:1024"), "reference", records, {"date": "today"})
    row = next(row for row in result["rows"] if row["rule"] == "S 64")
    assert row["share_of_dense"] == 0.5 and row["worse_than_dense"] == 2 and row["items"] == 4
    assert result["dense_by_task"] == {"hard": 0.25, "solved": 0.75} and row["solved_tasks"] == 0
    records += [{"item": f"solved {n}", "rule": rule, "score": 1.0, "density": 0.25} for n in (4, 5) for rule in ("dense", "S 64")]
    row = next(row for row in rules.summary(rules.suite_of("needles:1024"), "reference", records, {})["rows"] if row["rule"] == "S 64")
    assert row["solved_tasks"] == 1 and row["share_on_solved_tasks"] == pytest.approx(3 / 3.5)

    quotes = {"dense": [1.0, 2.0], "S 64": [1.5, 2.5]}
    records = [
        {"item": f"prose 0 {n}", "rule": rule, "nll": nll, "exact": 0.0, "right_in_a_row": 1.0, "density": 0.2}
        for rule, of_rule in quotes.items()
        for n, nll in enumerate(of_rule)
    ]
    (row,) = rules.summary(rules.suite_of("copy:1024"), "reference", records, {})["rows"]
    assert row["nll_over_dense"] == 0.5 and row["nll_interval"] == (0.5, 0.5) and row["nll_dense"] == 1.5
    for wrong in ("text", "text:1000", "poems:1024", "copy:many"):
        with pytest.raises(argparse.ArgumentTypeError, match=wrong):
            rules.suite_of(wrong)


def test_only_what_is_missing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = import_module("selection_rules")
    suite = rules.suite_of("needles:1024")
    options = argparse.Namespace(rules=["S 64", "c 4", "c 16", "c 32"], questions=2)
    monkeypatch.setattr(rules, "questions", lambda length, count: [("vt", ("a",)), ("cwe", ("b",))])
    known = [{"item": "vt 0", "rule": rule} for rule in ("dense", "c 4")]
    assert [(job.item, job.rules) for job in rules.missing(suite, options, known)] == [
        ("vt 0", ["S 64", "c 16", "c 32"]), ("cwe 1", ["dense", "S 64", "c 4"]), ("cwe 1", ["c 16", "c 32"]),
    ]  # fmt: skip


def test_values_per_head_are_rules_like_others() -> None:
    named, rules = import_module("rules"), import_module("selection_rules")
    assert set(named.PER_HEAD) <= set(named.RULES)  # both fits are among the results
    for rule, layers in named.PER_HEAD.items():
        assert len(layers) == 30 and all(len(layer.top_p) == 9 for layer in layers)  # SmolLM2-135M
        described = rules.described(layers)
        assert described["config"]["top_p"] == "per head" and described["config"]["block_size"] == 64
        assert described["config"]["row_threshold"] == ("per head" if "tau" in rule else None)
    common = UniSparseConfig.balanced()
    assert rules.described(common)["config"]["top_p"] == common.top_p and rules.described(common)["selection"] == (1 / 4 + 1 / 64) / 2


def test_heads_are_fitted_between_the_windows_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, heads = import_module("losses"), import_module("head_values")

    class Positions:
        def encode(self, text: str) -> list[int]:
            return list(range(len(text)))

    texts = {"prose": lambda: " " * 10_000}
    monkeypatch.setattr(heads, "TEXTS", texts)
    monkeypatch.setattr(losses, "TEXTS", texts)
    measured = {position for *_, token_ids in losses.text_windows(Positions(), 1000, heads.MEASURED, ["prose"]) for position in token_ids}
    for fitted in heads.windows_between(Positions(), 1000, 3):
        assert len(fitted) == 1000 and not measured & set(fitted)
    with pytest.raises(SystemExit, match="does not fit between"):
        heads.windows_between(Positions(), 2000, 1)


def test_licences_are_different_texts() -> None:
    pytest.importorskip("identify")
    text = import_module("common").licences()
    assert len(text) > 150_000 and all(text.count(name) for name in ("Mozilla", "Apache License", "Eclipse Public", "European Union"))
