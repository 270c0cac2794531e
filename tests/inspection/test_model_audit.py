"""The audit of a model: predictions, worst layers and remedies, on the example model with small blocks."""

import json
from dataclasses import replace

import numpy as np
import pytest

from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.inspection.model_audit import ModelAudit, Trial, audit_model
from unisparse_np.inspection.model_audit_text import audit_text, help_line, verdict_line
from unisparse_np.inspection.predictions import compare_predictions, log_softmax, whole_blocks
from unisparse_np.inspection.prompt import encode_prompt, one_of, sparse_configs
from unisparse_np.inspection.remedies import remedies_for

from .small import CONFIG, TEXT, model_and_tokenizer, token_ids

PAPER = UniSparseConfig(block_size=32, q_compress=4, k_compress=4, top_p=0.7, key_anchors=0, sink_blocks=0, local_blocks=0)


@pytest.fixture(scope="module")
def audit() -> ModelAudit:
    return audit_model(model_and_tokenizer()[0], token_ids(), PAPER)


def test_predictions_are_those_of_two_whole_runs(audit: ModelAudit) -> None:
    model, ids = model_and_tokenizer()[0], token_ids()
    dense, sparse = (log_softmax(model.logits(ids, attention)) for attention in ("dense", PAPER))
    kl = (np.exp(dense) * (dense - sparse)).sum(axis=1)
    found = audit.predictions
    assert found.kl_mean == pytest.approx(kl.mean(), abs=1e-6) and found.kl_last == pytest.approx(kl[-1], abs=1e-6)
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99), abs=1e-6)
    assert found.top1_agreement == (dense.argmax(1) == sparse.argmax(1)).mean()
    rows, targets = np.arange(len(ids) - 1), np.array(ids[1:])
    assert found.perplexity_dense == pytest.approx(np.exp(-dense[rows, targets].mean()), rel=1e-6)
    assert found.perplexity_sparse == pytest.approx(np.exp(-sparse[rows, targets].mean()), rel=1e-6)


def test_keeping_everything_changes_nothing() -> None:
    [found] = compare_predictions(model_and_tokenizer()[0], token_ids(), [replace(CONFIG, top_p=1.0)])
    assert abs(found.kl_mean) < 1e-9 and found.top1_agreement == 1 and found.density == 1


def test_side_by_side_runs_are_cut_alike() -> None:
    assert whole_blocks(512, [CONFIG, replace(CONFIG, block_size=96)], 4) == 576
    assert whole_blocks(512, ["dense"], 4) == 512
    model, ids = model_and_tokenizer()[0], token_ids()[:100]
    two = compare_predictions(model, ids, [CONFIG, replace(CONFIG, block_size=48, q_compress=3)], chunk_size=64)
    assert two[0] == compare_predictions(model, ids, [CONFIG], chunk_size=96)[0]


def test_the_worst_are_the_worst(audit: ModelAudit) -> None:
    errors = {layer: np.mean([head.output_error for head in audit.of_layer(layer)]) for layer in range(4)}
    assert list(audit.worst_layers) == sorted(errors, key=lambda layer: -errors[layer])[:3]
    assert audit.worst_heads[0].output_error == max(head.output_error for head in audit.heads)
    assert audit.worst_output_error == pytest.approx(np.mean([errors[layer] for layer in audit.worst_layers]))


def test_remedies_were_tried_and_their_numbers_are_their_own_runs(audit: ModelAudit) -> None:
    assert {trial.flags for trial in audit.trials} == {
        "--sink-blocks 1", "--key-anchors 1", "--local-blocks 1", "--attn-top-p 0.94", "--q-compress 2 --k-compress 2",
        "--row-threshold 0.02",
    }  # fmt: skip
    run = [trial for trial in audit.trials if trial.predictions is not None]
    assert len(run) == 2 and audit.best_trial in run
    changed = {"--attn-top-p 0.94": {"top_p": 0.94}, "--row-threshold 0.02": {"row_threshold": 0.02}, "--sink-blocks 1": {"sink_blocks": 1},
               "--local-blocks 1": {"local_blocks": 1}, "--key-anchors 1": {"key_anchors": 1},
               "--q-compress 2 --k-compress 2": {"q_compress": 2, "k_compress": 2}}  # fmt: skip
    configs = [replace(PAPER, **changed[trial.flags]) for trial in run]
    assert [trial.predictions for trial in run] == compare_predictions(model_and_tokenizer()[0], token_ids(), configs)


def test_dense_layers_stay_dense_and_are_not_measured() -> None:
    found = audit_model(model_and_tokenizer()[0], token_ids()[:100], ["dense", PAPER, "dense", PAPER])
    assert {head.layer for head in found.heads} == {1, 3} and set(found.worst_layers) == {1, 3}
    assert found.predictions.densities[0] == found.predictions.densities[2] == 1


def test_verdict_follows_the_rules_of_thumb(audit: ModelAudit) -> None:
    def verdict(kl: float, agreement: float) -> str:
        return replace(audit, predictions=replace(audit.predictions, kl_mean=kl, top1_agreement=agreement)).verdict

    assert [verdict(0.009, 0.98), verdict(0.009, 0.95), verdict(0.05, 0.99), verdict(0.2, 0.99), verdict(0.001, 0.8)] == [
        "safe", "doubtful", "doubtful", "unsafe", "unsafe",
    ]  # fmt: skip


def test_text_names_the_worst_and_what_would_help(audit: ModelAudit) -> None:
    text = audit_text(audit, all_heads=True)
    assert f"worst layers: {', '.join(map(str, audit.worst_layers))}" in text
    assert f"layer {audit.worst_heads[0].layer} head {audit.worst_heads[0].head}" in text
    assert audit.best_trial is not None and f"what would help: {audit.best_trial.flags} (" in text
    assert text.count("\n    3     ") == 8  # every head of layer 3
    assert verdict_line(audit) in text


def test_a_remedy_that_does_not_help_is_not_recommended(audit: ModelAudit) -> None:
    worse = replace(audit.predictions, kl_mean=audit.predictions.kl_mean * 2)
    found = replace(audit, trials=(Trial("--sink-blocks 1", "why", 0.5, 0.1, 0.9, worse),))
    assert found.best_trial is None and "none of the changes tried" in help_line(found)


def test_json_has_everything_and_no_nan(audit: ModelAudit) -> None:
    values = json.loads(json.dumps(audit.as_dict(), allow_nan=False))
    assert len(values["heads"]) == 32 and values["verdict"] == audit.verdict and values["attention"][0]["top_p"] == 0.7


def test_remedies_leave_out_what_is_on_already() -> None:
    flags = {remedy.flags(UniSparseConfig()) for remedy in remedies_for(UniSparseConfig())}
    assert flags == {"--attn-top-p 0.99", "--q-compress 4 --k-compress 4", "--block-size 64", "--row-threshold 0.02"}
    per_head = UniSparseConfig(top_p=(0.9, 1.0), row_threshold=(0.1, 0.2), q_compress=1, k_compress=1, block_size=32)
    changed = [remedy.change(per_head) for remedy in remedies_for(per_head)]
    coarse = UniSparseConfig(block_size=128, q_compress=4, k_compress=2, row_threshold=0.02, top_p_compress=128)
    flags = {remedy.flags(coarse) for remedy in remedies_for(coarse)}
    assert "--q-compress 2 --k-compress 1" in flags and "--block-size 64" not in flags  # 128 does not divide 64
    odd = UniSparseConfig(block_size=90, q_compress=9, k_compress=45, row_threshold=0.02, top_p_compress=90)  # 4 divides none of them
    assert "--q-compress 3 --k-compress 15" in {remedy.flags(odd) for remedy in remedies_for(odd)}
    assert [config.top_p for config in changed] == [(0.98, 1.0), (0.9, 1.0)] and changed[1].row_threshold == (0.05, 0.1)


def test_a_prompt_of_one_block_and_a_dense_model_are_refused() -> None:
    model, tokenizer = model_and_tokenizer()
    with pytest.raises(InvalidInput, match=r"6 tokens, one block of 32 at most.*longer prompt"):
        encode_prompt(model, tokenizer, "The sky is", CONFIG, raw=True)
    with pytest.raises(InvalidInput, match="0 layers are sparse"):
        encode_prompt(model, tokenizer, TEXT, ["dense"] * 4, raw=True)
    with pytest.raises(InvalidInput, match="0 layers are sparse"):
        sparse_configs("dense", 4)
    with pytest.raises(InvalidInput, match="--layer 4 is out of range: there are 4, so give 0 to 3"):
        one_of("--layer", 4, 4)
    assert one_of("--layer", -1, 4) == 3
