"""The report page as a file: what it holds, exactly; that nothing in it can break out; that it asks for nothing outside."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from unisparse_np import InvalidInput
from unisparse_np.inspection import report_page as page_module
from unisparse_np.inspection.capture import Capture, LayerCapture, capture
from unisparse_np.inspection.report_page import Focus, block_texts, flags_of, report_page

from .small import CONFIG, model_and_tokenizer, token_ids

ATTACK = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>&amp;\u2028"


def page_and_data(captures: list[Capture], ids: tuple[int, ...] | list[int], name: str = "a model") -> tuple[str, dict]:
    page = report_page(captures, ids, model_and_tokenizer()[1], name, Focus(1, 2, -1)).decode()
    return page, json.loads(page.split('<script type="application/json" id="data">')[1].split("</script>")[0])


def test_the_data_come_back_as_they_went_in() -> None:
    captured = capture(model_and_tokenizer()[0], token_ids(), CONFIG)
    _, data = page_and_data([captured], token_ids())
    assert data["focus"] == {"layer": 1, "head": 2, "block": -1} and data["tokens"] == len(token_ids())
    layer, raw = captured.layers[1], data["views"][0]["layers"][1]
    rows, columns = np.tril_indices(raw["blocks"])
    kinds = {"scores": "<u2", "ranks": "u1", "reasons": "u1", "true_mass": "<u2"}
    decoded = {name: np.frombuffer(base64.b64decode(raw[name]), kind) for name, kind in kinds.items()}
    for name, expected in (("scores", layer.scores), ("true_mass", layer.true_mass)):
        assert expected is not None
        np.testing.assert_allclose((decoded[name] / 65535) ** 2, expected[:, rows, columns].ravel(), atol=2e-5)
    np.testing.assert_array_equal(decoded["reasons"], layer.reasons[:, rows, columns].ravel())
    last_row = decoded["ranks"].reshape(8, -1)[3, -raw["blocks"] :]
    np.testing.assert_array_equal(np.argsort(last_row), np.argsort(-layer.scores[3, -1], kind="stable"))


def test_more_than_256_blocks_need_wider_ranks() -> None:
    blocks = 300
    scores = np.tril(np.random.default_rng(0).random((1, blocks, blocks))).astype(np.float32)
    layer = LayerCapture(replace(CONFIG, block_size=4), scores, np.zeros(scores.shape, np.uint8), None)
    _, data = page_and_data([Capture("", {1: layer})], list(token_ids()) * 5)
    ranks = np.frombuffer(base64.b64decode(data["views"][0]["layers"][0]["ranks"]), "<u2")
    np.testing.assert_array_equal(np.argsort(ranks[-blocks:]), np.argsort(-scores[0, -1], kind="stable"))


def test_text_cannot_break_out_of_the_page() -> None:
    tokenizer = model_and_tokenizer()[1]
    ids = tokenizer.encode(ATTACK * 6)
    captured = capture(model_and_tokenizer()[0], ids, CONFIG, layers=[1], label=ATTACK, with_truth=False)
    page, data = page_and_data([captured], ids, name=ATTACK)
    assert page.count("<script") == 2 and page.count("</script>") == 2 and "<img" not in page
    assert "".join(data["texts"]["32"]).count("</script>") >= 6  # the text itself is whole
    assert data["views"][0]["label"] == ATTACK


def test_the_page_asks_for_nothing_outside() -> None:
    page, _ = page_and_data([capture(model_and_tokenizer()[0], token_ids()[:64], CONFIG, layers=[1])], token_ids()[:64])
    assert "default-src 'none'" in page
    addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"']*", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address that is loaded
    assert not re.search(r"\b(?:src|href)=(?!\"data:,\")", page)


def test_texts_are_of_their_blocks_and_spell_special_tokens() -> None:
    texts = block_texts(token_ids(), 32, model_and_tokenizer()[1])
    assert len(texts) == -(-len(token_ids()) // 32) and texts[0].startswith("<|begin_of_text|>One of the special magic")


def test_a_config_in_one_line() -> None:
    assert flags_of(CONFIG) == "Top-P 0.8; blocks of 32, compress 4; sink 1, local 1, anchors 2"
    other = replace(CONFIG, top_p=(0.7, 0.9), row_threshold=0.02, q_compress=2, head_compress=2)
    assert (
        flags_of(other)
        == "Top-P 0.7 to 0.9 by head, row threshold 0.02; blocks of 32, compress 2 x 4, 2 heads pooled; sink 1, local 1, anchors 2"
    )


def test_composite_tokens_for_top_p_are_in_the_line() -> None:
    config = replace(CONFIG, row_threshold=0.02, q_compress=2, top_p_compress=8)
    assert flags_of(config) == "Top-P 0.8, row threshold 0.02; blocks of 32, compress 2 x 4 (8 for Top-P); sink 1, local 1, anchors 2"


def test_a_page_too_large_for_a_browser_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(model_and_tokenizer()[0], token_ids()[:64], CONFIG, layers=[1])
    monkeypatch.setattr(page_module, "MOST_BYTES", 10)
    with pytest.raises(InvalidInput, match="more than a browser opens quickly: choose some with --layer"):
        page_and_data([captured], token_ids()[:64])
