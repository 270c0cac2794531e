"""The walk through one query block: its numbers are those of the whole run, and its text says them."""

from dataclasses import replace

import numpy as np
import pytest

from unisparse_np import InvalidInput, UniSparseConfig, unisparse_attention
from unisparse_np.evaluation.cost import selection_share
from unisparse_np.inspection.costs import at_length, step_costs
from unisparse_np.inspection.reasons import Reason, reason_text, reasons_of
from unisparse_np.inspection.snippets import one_line
from unisparse_np.inspection.walkthrough import Walkthrough, pick, walk
from unisparse_np.inspection.walkthrough_text import walkthrough_text
from unisparse_np.problem import Problem

from .small import CONFIG, model_and_tokenizer, token_ids

LAYER, HEAD, BLOCK = 1, 5, 3
VARIANTS = [
    CONFIG,
    replace(CONFIG, head_compress=2, top_p=None, row_threshold=0.3),
    replace(CONFIG, top_p=(0.7, 0.8) * 4, row_threshold=0.4),
    replace(CONFIG, q_compress=8, key_anchors=0, sink_blocks=0, local_blocks=0),
    replace(CONFIG, q_compress=2, row_threshold=0.4, top_p_compress=16),
]


def whole_run(config: UniSparseConfig) -> dict:
    """The layer's whole attention call, seen by an observer of the same model."""
    seen = {}

    def observe(layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, out: np.ndarray, trace: object) -> None:
        if layer == LAYER:
            seen["q"], seen["k"], seen["v"] = q.copy(), k.copy(), v.copy()

    model = model_and_tokenizer()[0]
    model.prefill(token_ids(), model.new_cache(len(token_ids())), config, observer=observe)
    seen["out"], seen["trace"] = unisparse_attention(seen["q"], seen["k"], seen["v"], config, return_trace=True)
    seen["dense"] = unisparse_attention(seen["q"], seen["k"], seen["v"], "dense")
    return seen


@pytest.mark.parametrize("config", VARIANTS, ids=["default", "row rule, two heads", "both rules", "paper", "coarse composites for Top-P"])
@pytest.mark.parametrize("block", [BLOCK, -1])
def test_numbers_are_those_of_the_whole_run(config: UniSparseConfig, block: int) -> None:
    run = whole_run(config)
    found = walk(model_and_tokenizer()[0], token_ids(), config, layer=LAYER, head=HEAD, block=block, chunk_size=64)
    rows, visible = slice(found.first, found.last + 1), found.block + 1
    np.testing.assert_allclose(found.scores, run["trace"].mean[HEAD // config.head_compress, found.block, :visible], atol=1e-6)
    np.testing.assert_array_equal(found.kept, run["trace"].mask[HEAD, found.block, :visible])
    np.testing.assert_allclose(found.sparse, run["out"][HEAD, rows], atol=1e-4)
    np.testing.assert_allclose(found.dense, run["dense"][HEAD, rows], atol=1e-4)
    assert found.running[-1] == pytest.approx(1, abs=1e-5) and found.attention.sum(axis=1) == pytest.approx(1, abs=1e-5)
    if found.peaks is not None:
        np.testing.assert_allclose(found.peaks, run["trace"].peak[HEAD // config.head_compress, found.block, :visible], atol=1e-5)
    if config.top_p_compress is not None:
        per_block = np.add.reduceat(found.coarse_attention.mean(axis=0), range(0, found.coarse_attention.shape[1], 2))
        np.testing.assert_allclose(found.scores, per_block, atol=1e-6)
    assert found.true_mass.sum() == pytest.approx(1, abs=1e-5)
    assert found.density == pytest.approx(run["trace"].density)
    if config.top_p is not None:
        top_p = config.top_p[HEAD] if isinstance(config.top_p, tuple) else config.top_p
        assert found.running[found.top_p_blocks - 1] >= top_p
        assert found.top_p_blocks == 1 or found.running[found.top_p_blocks - 2] < top_p


@pytest.fixture(scope="module")
def walked() -> Walkthrough:
    return walk(model_and_tokenizer()[0], token_ids(), replace(CONFIG, row_threshold=0.4), layer=LAYER, head=HEAD)


def test_text_has_every_step_and_its_numbers(walked: Walkthrough) -> None:
    text = walkthrough_text(walked, token_ids(), model_and_tokenizer()[1])
    for n, words in enumerate(("compress", "compressed attention", "aggregate", "select", "force", "attend"), start=1):
        assert f"Step {n}, {words}" in text
    best = walked.order[0]
    assert f"{walked.scores[best]:9.4f}{walked.running[0]:9.4f}{walked.peaks[best]:9.4f}{walked.true_mass[best]:9.4f}" in text
    assert f"{walked.output_error:.2%}" in text and "at 131,072 tokens" in text and "The sun is yellow" in text
    assert "Top-P stops" in text and f"kept in all: {walked.kept.sum()} of {len(walked.scores)} blocks" in text


def test_text_names_the_composite_tokens_of_top_p() -> None:
    config = replace(CONFIG, q_compress=2, row_threshold=0.4, top_p_compress=16)
    model, tokenizer = model_and_tokenizer()
    found = walk(model, token_ids(), config, layer=LAYER, head=HEAD, block=BLOCK)
    text = walkthrough_text(found, token_ids(), tokenizer)
    assert "into 2 queries and 8 keys of 16 tokens" in text and "A' [2, 8]: the same over the composite tokens of Top-P" in text
    assert "from A' [2, 8]: 2 rows, 2 columns a block" in text and "R [4]: the same from A [16, 32]" in text


def test_json_is_the_same(walked: Walkthrough) -> None:
    values = walked.as_dict()
    assert [block["kept_by"] != "dropped" for block in values["key_blocks"]] == list(walked.kept)
    best = min(values["key_blocks"], key=lambda block: block["rank"])
    assert best["score"] == walked.scores.max() == best["running_sum"] and set(values["costs"]) == {str(len(token_ids())), "131072"}


def test_costs_are_those_that_the_algorithm_states() -> None:
    layer = at_length(Problem(32, 8, 4096, 4096, 128, UniSparseConfig()), 131072)
    costs = {cost.step: cost for cost in step_costs(layer, 0.25, 2)}
    assert costs["2-3 score"].flop == pytest.approx(1.1e12, rel=0.01)
    assert costs["dense"].flop == pytest.approx(140.7e12, rel=0.001)
    assert costs["6 attend"].flop == pytest.approx(0.25 * costs["dense"].flop)
    assert costs["1 compress"].bytes == 40 * 131072 * 128 * 2 + 40 * 16384 * 128 * 4
    both = UniSparseConfig(block_size=64, q_compress=4, k_compress=2, row_threshold=0.02, top_p_compress=8)
    costs = {cost.step: cost for cost in step_costs(replace(layer, config=both), 0.25, 2)}
    assert costs["2-3 score"].flop == pytest.approx(140.7e12 * selection_share(both), rel=0.01)
    assert costs["2-3 score"].shape.startswith("A 32768 x 65536 and 16384 x 16384 a head")
    assert "q~ [32, 32768 and 16384, 128], k~ [8, 65536 and 16384, 128]" in costs["1 compress"].shape
    no_future = Problem(2, 2, 64, 128, 16, UniSparseConfig(block_size=32), causal=False)
    assert step_costs(no_future, 1.0, 4)[-1].flop == 2 * 64 * 128 * 4 * 16


def test_reasons_of_every_kind() -> None:
    problem = Problem(1, 1, 40, 80, 8, UniSparseConfig(block_size=8, top_p=0.5, row_threshold=0.2, sink_blocks=2))
    mean, peak = np.zeros((1, 5, 10)), np.zeros((1, 5, 10))
    mean[0, 4, [3, 9]], peak[0, 4, 5] = [0.6, 0.4], 0.3
    mask = np.zeros((1, 5, 10), bool)
    mask[0, 4, [0, 1, 3, 5, 6, 8, 9]] = True
    assert list(reasons_of(mask, mean, peak, problem)[0, 4]) == [
        Reason.SINK, Reason.SINK, 0, Reason.TOP_P, 0, Reason.ROW_THRESHOLD, Reason.TOP_P, 0, Reason.LOCAL, Reason.DIAGONAL,
    ]  # fmt: skip
    assert reason_text(Reason.TOP_P | Reason.SINK) == "Top-P, forced: sink" and reason_text(0) == "dropped"


def test_layer_head_and_block_out_of_range_are_refused() -> None:
    model, ids = model_and_tokenizer()[0], token_ids()
    for chosen, words in (((4, 0, 0), "--layer 4"), ((0, 8, 0), "--head 8"), ((0, 0, 99), "--block 99"), ((0, 0, -99), "--block -99")):
        with pytest.raises(InvalidInput, match=f"{words} is out of range: there are "):
            pick(model, ids, CONFIG, *chosen)
    with pytest.raises(InvalidInput, match=r"--layer 0 is dense.*give one of 1, 2, 3"):
        pick(model, ids, ["dense", CONFIG, CONFIG, CONFIG], 0, 0, 0)
    assert pick(model, ids, ["dense", CONFIG, CONFIG, CONFIG], None, -1, 0) == (2, 7, 0)


def test_snippets_are_one_safe_line() -> None:
    tokenizer = model_and_tokenizer()[1]
    assert one_line(tokenizer, tokenizer.encode("The sky\n is \x1b[31mblue", add_bos=False), 60).count("\n") == 0
    assert "\x1b" not in one_line(tokenizer, tokenizer.encode("The \x1b[31mblue", add_bos=False), 60)
    short = one_line(tokenizer, token_ids(), 40)
    assert len(short) == 40 and "..." in short
