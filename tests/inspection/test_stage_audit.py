"""The stage audit on a model's own q, k and v: which chunk it takes, and that a small fault stands out."""

import types

import numpy as np
import pytest

from unisparse_np import InvalidInput, UniSparseConfig, audit, reference
from unisparse_np.comparison import room_for_large_logits
from unisparse_np.inspection.stage_audit import _Recorder, as_dict, audit_layers
from unisparse_np.problem import Problem

from .small import CONFIG, model_and_tokenizer, token_ids


def test_the_last_full_chunk_is_taken() -> None:
    recorder = _Recorder(reference, [3])
    for stop, tokens in ((64, 64), (128, 64), (129, 1)):
        recorder(3, np.zeros((2, tokens, 4)), np.zeros((1, stop, 4)), np.zeros((1, stop, 4)), None, types.SimpleNamespace())
        recorder(2, np.zeros((2, tokens, 4)), np.zeros((1, stop, 4)), np.zeros((1, stop, 4)), None, types.SimpleNamespace())
    assert list(recorder.last) == [3] and [x.shape[1] for x in recorder.last[3]] == [64, 128, 128]


def test_first_middle_and_last_sparse_layer_by_default() -> None:
    reports = list(audit_layers(model_and_tokenizer()[0], token_ids(), ["dense", CONFIG, CONFIG, CONFIG]))
    assert [label for label, _ in reports] == ["layer 1", "layer 2", "layer 3"]
    assert as_dict(reports)["ok"] and as_dict(reports)["cases"][0]["config"]["block_size"] == 32


def test_an_output_wrong_in_the_fourth_digit_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __getattr__(self, name: str) -> object:
            return getattr(reference, name)

        def sparse_attention(self, *arguments: object) -> tuple:
            out, lse = reference.sparse_attention(*arguments)
            return out * np.float32(1 + 2e-4), lse

    monkeypatch.setattr("unisparse_np.comparison.load_backend", lambda name: Wrong())
    [(_, report)] = audit_layers(model_and_tokenizer()[0], token_ids(), CONFIG, [2])
    assert [stage.stage for stage in report.stages if not stage.ok] == ["sparse_attention"]


def test_bounds_grow_only_with_large_logits() -> None:
    draw = np.random.default_rng(0)
    q, k = draw.standard_normal((4, 300, 64)), draw.standard_normal((2, 300, 64))
    problem = Problem(4, 2, 300, 300, 64, UniSparseConfig())
    assert room_for_large_logits(q, k, problem) == 1.0
    assert room_for_large_logits(20 * q, k, problem) == pytest.approx(2 * room_for_large_logits(10 * q, k, problem))


def test_arrays_that_do_not_fit_together_are_refused() -> None:
    q, k = np.zeros((4, 64, 8), np.float32), np.zeros((2, 64, 8), np.float32)
    with pytest.raises(InvalidInput, match="differ in shape"):
        audit(q, k, k[:1])
