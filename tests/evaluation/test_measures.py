"""What the text and copy suites measure, against plain float64 computations over whole windows; intervals and tables by hand."""

import math
from itertools import pairwise

import numpy as np
import pytest

from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.evaluation.copy_suite import CUE_TOKENS, QUOTE_TOKENS, CopySuite
from unisparse_np.evaluation.divergence import divergence, row_blocks
from unisparse_np.evaluation.intervals import mean_estimate, ratio_estimate, share_estimate
from unisparse_np.evaluation.report import as_tables, summarise
from unisparse_np.evaluation.suite import chunk_unit
from unisparse_np.evaluation.text_suite import TextSuite, pieces
from unisparse_np.evaluation.windows import Windows

from .small_model import TEXT, small_model

# No anchors: equal tokens have keys of equal norm in the first layer, and rounding, which depends on the pieces, breaks the tie.
SPARSE = UniSparseConfig(block_size=32, q_compress=4, k_compress=4, top_p=0.3, key_anchors=0, sink_blocks=0, local_blocks=0)
OTHER = UniSparseConfig(block_size=48, q_compress=4, k_compress=4, top_p=0.5, key_anchors=0)
KL_TOLERANCE = 2e-6  # float32 exponentials of log-probabilities around 10, summed in float64


def float64_log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return (
        logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True)) - logits.max(axis=1, keepdims=True)
    )


def test_divergence_against_float64() -> None:
    random = np.random.default_rng(0)
    dense = 8 * random.standard_normal((37, 501)).astype(np.float32)
    sparse = dense + random.standard_normal((37, 501)).astype(np.float32)
    targets = random.integers(501, size=37)
    measured = divergence(dense, sparse, targets)
    p, q = float64_log_softmax(dense), float64_log_softmax(sparse)
    np.testing.assert_allclose(measured.kl, (np.exp(p) * (p - q)).sum(axis=1), atol=KL_TOLERANCE, rtol=1e-5)
    np.testing.assert_allclose(measured.nll, -q[np.arange(37), targets], rtol=1e-5)
    np.testing.assert_allclose(measured.dense_nll, -p[np.arange(37), targets], rtol=1e-5)
    assert (measured.top1 == (p.argmax(axis=1) == q.argmax(axis=1))).all()
    assert (divergence(dense, dense, targets).kl == 0).all()


def test_row_blocks_cover_all_rows_once() -> None:
    for rows, vocab in ((1, 5), (1000, 1 << 20), (513, 1 << 16)):
        assert [n for block in row_blocks(rows, vocab) for n in range(rows)[block]] == list(range(rows))


def test_text_suite_is_what_whole_windows_give() -> None:
    """Pieces of 512 tokens would hide a mistake at their edges: the window of 500 is read in pieces of 96."""
    model, tokenizer = small_model()
    suite = TextSuite(Windows(tokenizer, TEXT, 500, seed=3, count=1))
    attentions = {"dense": "dense", "sparse": SPARSE, "other": OTHER}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unisparse_np.evaluation.text_suite._TOKENS_AT_ONCE", 90)
        measured = suite.measure(suite.examples()[0], model, tokenizer, attentions, lambda: None)
    token_ids = suite.windows[0]
    dense = float64_log_softmax(model.logits(token_ids[:-1], "dense"))
    for label in ("sparse", "other"):
        sparse = float64_log_softmax(model.logits(token_ids[:-1], attentions[label]))
        kl = (np.exp(dense) * (dense - sparse)).sum(axis=1)
        nll = -sparse[np.arange(len(sparse)), token_ids[1:]]
        assert kl.mean() > 1e-4  # something was left out
        np.testing.assert_allclose(measured[label]["kl"], [part.mean() for part in np.array_split(kl, 10)], atol=KL_TOLERANCE, rtol=1e-4)
        np.testing.assert_allclose(measured[label]["nll"], [part.mean() for part in np.array_split(nll, 10)], rtol=1e-5)
    assert measured["dense"]["kl"] == [0.0] * 10 and measured["dense"]["density"] == 1.0 and measured["sparse"]["density"] < 1


def test_pieces_are_whole_blocks_of_every_config() -> None:
    unit = chunk_unit([SPARSE, "dense", [OTHER, SPARSE]])
    assert unit == 96
    parts = list(pieces(3000, unit))
    assert parts[0][0] == 0 and parts[-1][1] == 3000 and all(start % unit == 0 for start, _ in parts)
    assert all(before[1] == after[0] for before, after in pairwise(parts))


def test_copy_suite_is_what_whole_windows_give() -> None:
    model, tokenizer = small_model()
    suite = CopySuite(Windows(tokenizer, TEXT, 400, seed=1, count=2))
    for example in suite.examples():
        token_ids = suite.quotation(example.number)
        passage = token_ids[-CUE_TOKENS - QUOTE_TOKENS :]
        context = token_ids[: -CUE_TOKENS - QUOTE_TOKENS]
        assert len(token_ids) == 400
        assert any(context[n : n + len(passage)] == passage for n in range(len(context)))
        measured = suite.measure(example, model, tokenizer, {"dense": "dense", "sparse": SPARSE}, lambda: None)
        logits = float64_log_softmax(model.logits(token_ids[:-1], SPARSE))[-QUOTE_TOKENS:]
        targets = token_ids[-QUOTE_TOKENS:]
        assert measured["sparse"]["nll"] == pytest.approx(-logits[np.arange(QUOTE_TOKENS), targets].mean(), rel=1e-5)
        right = logits.argmax(axis=1) == targets
        assert measured["sparse"]["exact"] == right.all() and measured["sparse"]["right_in_a_row"] == [*right, False].index(False)


def test_windows() -> None:
    _, tokenizer = small_model()
    windows = Windows(tokenizer, TEXT, 200, seed=1)
    more = Windows(tokenizer, TEXT, 200, seed=1, count=len(windows) - 2)
    assert [windows[n] for n in range(len(more))] == [more[n] for n in range(len(more))]  # a greater count adds to them
    assert {len(windows[n]) for n in range(len(windows))} == {200}
    assert Windows(tokenizer, TEXT, 200, seed=2)[0] != windows[0]
    if opening := tokenizer.encode("", add_bos=True):
        assert windows[0][: len(opening)] == opening
    for arguments, words in (((100_000,), "fewer than one window"), ((200, 0, 500), "fewer than the 500 asked"), ((8,), "at least 32")):
        with pytest.raises(InvalidInput, match=words):
            Windows(tokenizer, TEXT, *arguments)
    with pytest.raises(InvalidInput, match="too short to quote from"):
        CopySuite(Windows(tokenizer, TEXT, 100))


def test_intervals_by_hand() -> None:
    mean = mean_estimate([1.0, 2.0, 3.0])
    assert mean.value == 2 and mean.high - 2 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)  # t of 2 degrees, standard deviation 1
    assert math.isnan(mean_estimate([1.0]).low) and mean_estimate([0.0, 1.0], lowest=0).low == 0
    all_right = share_estimate([1.0] * 10)
    assert all_right.value == all_right.high == 1 and all_right.low == pytest.approx(0.722, abs=1e-3)  # Wilson, 10 of 10
    half = share_estimate([1.0] * 50 + [0.0] * 50)
    assert (half.low, half.high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))


def test_the_ratio_interval_is_paired() -> None:
    dense = np.random.default_rng(1).integers(2, size=200).astype(float)
    assert ratio_estimate(dense, dense) == (1, 1, 1)
    ratio = ratio_estimate(dense * (np.arange(200) % 10 > 0), dense)
    assert ratio.low < ratio.value < ratio.high and ratio.high - ratio.low < 0.15
    assert math.isnan(ratio_estimate([0, 0], [0, 0]).value)


def question_record(number: int, task: str, dense: float, sparse: float) -> dict:
    shared = {"answer": "", "prefill_seconds": 1.0, "prompt_tokens": 9}
    return {
        "length": 1024, "task": task, "number": number,
        "configs": {"dense": {"score": dense, "density": 1.0, **shared}, "default": {"score": sparse, "density": 0.25, **shared}},
    }  # fmt: skip


def test_question_figures() -> None:
    records = [question_record(n, task, 1.0, float(n != 3)) for n in range(4) for task in ("vt", "cwe")]
    summary = summarise("ruler", records)
    dense, default = summary["rows"]
    assert dense["score"][0] == 1 and default["score"][0] == 0.75 and default["share_of_dense"][0] == 0.75 and default["density"] == 0.25
    assert [(row["task"], row["configs"]["default"]) for row in summary["details"]] == [("vt", 0.75), ("cwe", 0.75)]
    shown = as_tables("ruler", summary)
    assert "75.0% [40.9, 92.9]" in shown and "1,024" in shown
    assert as_tables("ruler", summarise("ruler", [])) == "no example was measured"


def test_text_figures_are_of_the_second_half() -> None:
    dense = {"kl": [0.0] * 10, "top1": [1.0] * 10, "nll": [2.0] * 10, "density": 1.0}
    sparse = {"kl": [0.0] * 5 + [0.02] * 5, "top1": [1.0] * 5 + [0.9] * 5, "nll": [2.0] * 5 + [2.1] * 5, "density": 0.3}
    records = [{"length": 512, "task": "text", "number": n, "configs": {"dense": dense, "default": sparse}} for n in range(2)]
    summary = summarise("text", records)
    row = summary["rows"][1]
    assert row["kl"][0] == pytest.approx(0.02) and row["top1"][0] == pytest.approx(0.9) and row["nll_rise"][0] == pytest.approx(0.1)
    assert row["perplexity"] == pytest.approx(math.exp(2.1)) and row["dense_perplexity"] == pytest.approx(math.exp(2.0))
    assert [detail["configs"]["default"] for detail in summary["details"]] == pytest.approx([0.0] * 5 + [0.02] * 5)
