"""The tokenizer of a GGUF file, rebuilt: where words are cut, which ids come out, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from unisparse_np.errors import CheckpointError, InvalidInput
from unisparse_np.model import gguf as converter
from unisparse_np.model.gguf_metadata import Metadata
from unisparse_np.model.gguf_tokenizer import KINDS, ConvertedTokenizer, convert_tokenizer
from unisparse_np.model.loading import load

from .gguf_files import BOS, EOS, MERGES, TEMPLATE, TOKEN_TYPES, TOKENS, TinyModel


def converted(pre: str = "smollm", tokenizer_file: Path | None = None, **changes) -> ConvertedTokenizer:
    """Convert the tokenizer of the tiny model; `changes` are keys after `tokenizer.ggml.`, None removes one."""
    values = {**TinyModel().values, "general.architecture": "llama", "tokenizer.ggml.pre": pre}
    for name, value in changes.items():
        values[f"tokenizer.ggml.{name}"] = value
    present = {key: value for key, value in values.items() if value is not None}
    return convert_tokenizer(Metadata("tiny.gguf", present), len(TOKENS), tokenizer_file)


def rebuilt(pre: str = "smollm", **changes) -> Tokenizer:
    return Tokenizer.from_str(converted(pre, **changes).tokenizer_json)


def words(pre: str, text: str) -> list[str]:
    """Where the text is cut; a tokenizer without merges would hide it, so ask the pre-tokenizer."""
    cuts = rebuilt(pre).pre_tokenizer.pre_tokenize_str(text)
    return [text[start:end] for _, (start, end) in cuts]


# Cut by hand from the published rule of each tokenizer.
WORDS = {
    "gpt-2": [
        ("Hello  world's 12345", ["Hello", " ", " world", "'s", " 12345"]),
        ("I'LL x_y2", ["I", "'", "LL", " x", "_", "y", "2"]),
        ("a\n\n  b\t(c)!!\n", ["a", "\n\n ", " b", "\t", "(", "c", ")!!", "\n"]),
        ("½²x 日本", ["½²", "x", " 日本"]),
    ],
    "smollm": [
        ("Hello  world's 12345", ["Hello", " ", " world", "'s", " ", "1", "2", "3", "4", "5"]),
        ("I'LL x_y2", ["I", "'", "LL", " x", "_", "y", "2"]),
        ("a\n\n  b\t(c)!!\n", ["a", "\n\n ", " b", "\t", "(", "c", ")!!", "\n"]),
        ("½²x 日本", ["½", "²", "x", " 日本"]),
    ],
    "qwen2": [
        ("Hello  world's 12345", ["Hello", " ", " world", "'s", " ", "1", "2", "3", "4", "5"]),
        ("I'LL x_y2", ["I", "'LL", " x", "_y", "2"]),
        ("a\n\n  b\t(c)!!\n", ["a", "\n\n", " ", " b", "\t", "(c", ")!!\n"]),
        ("½²x 日本", ["½", "²", "x", " 日本"]),
    ],
    "llama-bpe": [
        ("Hello  world's 12345", ["Hello", " ", " world", "'s", " ", "123", "45"]),
        ("I'LL x_y2", ["I", "'LL", " x", "_y", "2"]),
        ("a\n\n  b\t(c)!!\n", ["a", "\n\n", " ", " b", "\t", "(c", ")!!\n"]),
        ("½²x 日本", ["½²", "x", " 日本"]),
    ],
}


@pytest.mark.parametrize("pre", WORDS)
def test_words_are_cut_by_the_rule_of_each_kind(pre):
    for text, expected in WORDS[pre]:
        assert words(pre, text) == expected


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["123", "45", "1"]),
        ("smollm", ["1", "2", "3", "4", "5", "1"]),
        ("qwen2", ["1", "2", "3", "4", "5", "1"]),
        ("llama-bpe", ["123", "45", "1"]),
    ],
)
def test_digits(pre, tokens):
    assert rebuilt(pre).encode("123451", add_special_tokens=False).tokens == tokens


@pytest.mark.parametrize("pre", KINDS)
def test_ids_are_those_of_the_file(pre):
    tokenizer = rebuilt(pre)
    assert tokenizer.get_vocab_size() == len(TOKENS)
    assert [tokenizer.id_to_token(index) for index in range(len(TOKENS))] == TOKENS
    assert tokenizer.encode("hello world", add_special_tokens=False).tokens == ["hello", "Ġw", "o", "r", "l", "d"]


@pytest.mark.parametrize("pre", KINDS)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_text_comes_back(pre, text):
    tokenizer = TOKENIZERS[pre]
    expected = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == expected


TOKENIZERS = {pre: rebuilt(pre) for pre in KINDS}


def test_only_qwen_composes_unicode():
    decomposed, composed = "e\u0301", "\u00e9"
    assert TOKENIZERS["qwen2"].encode(decomposed).ids == TOKENIZERS["qwen2"].encode(composed).ids
    for pre in ("gpt-2", "smollm", "llama-bpe"):
        assert TOKENIZERS[pre].encode(decomposed).ids != TOKENIZERS[pre].encode(composed).ids


def test_llama3_takes_a_word_that_is_a_token_whole():
    """Some tokens of Llama 3 cannot be reached by its merges at all."""
    without_last_merge = [merge for merge in MERGES if merge != "hell o"]
    assert rebuilt("llama-bpe", merges=without_last_merge).encode("hello", add_special_tokens=False).tokens == ["hello"]
    assert rebuilt("gpt-2", merges=without_last_merge).encode("hello").tokens == ["hell", "o"]


def test_control_tokens_are_special_and_user_defined_ones_are_text():
    ids = TOKENIZERS["smollm"].encode("<|im_end|>hello<tool>").ids
    assert ids == [EOS, TOKENS.index("hello"), TOKENS.index("<tool>")]
    assert TOKENIZERS["smollm"].decode(ids) == "hello<tool>"
    assert TOKENIZERS["smollm"].decode(ids, skip_special_tokens=False) == "<|im_end|>hello<tool>"


@pytest.mark.parametrize(
    ("pre", "says", "adds"),
    [("smollm", None, False), ("smollm", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False), ("qwen2", None, False)],
)
def test_bos(pre, says, adds):
    result = converted(pre, add_bos_token=says)
    assert result.tokenizer_config["add_bos_token"] is adds
    tokenizer = Tokenizer.from_str(result.tokenizer_json)
    assert tokenizer.encode("hello").ids == [BOS] * adds + [TOKENS.index("hello")]
    assert tokenizer.encode("hello", add_special_tokens=False).ids == [TOKENS.index("hello")]


def test_files_beside_the_tokenizer():
    result = converted(padding_token_id=EOS, unknown_token_id=3)
    assert result.tokenizer_config == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "bos_token": "<|begin|>",
        "eos_token": "<|im_end|>",
        "unk_token": TOKENS[3],
        "pad_token": "<|im_end|>",
        "chat_template": TEMPLATE,
    }
    ends = sorted([EOS, TOKENS.index("<|eot_id|>")])
    assert result.generation_config == {"do_sample": False, "eos_token_id": ends, "bos_token_id": BOS, "pad_token_id": EOS}


def test_end_tokens_named_by_the_file_all_count():
    result = converted(eot_token_id=5, eom_token_id=9)
    assert result.generation_config["eos_token_id"] == sorted([5, 9, EOS, TOKENS.index("<|eot_id|>")])


def test_an_end_token_that_is_not_a_control_token_does_not_count():
    types = [1 if token == "<|eot_id|>" else kind for token, kind in zip(TOKENS, TOKEN_TYPES, strict=True)]
    assert converted(token_type=types).generation_config["eos_token_id"] == [EOS]


def test_bytes_without_a_token_are_counted():
    assert converted().lost_bytes == 0
    renamed = [{"Ā": "unused-0", "ÿ": "unused-255"}.get(token, token) for token in TOKENS]  # bytes 0x00 and 0xFF; text has no 0xFF
    assert converted(tokens=renamed).lost_bytes == 1


def changed(index: int, token: str) -> list[str]:
    return [*TOKENS[:index], token, *TOKENS[index + 1 :]]


REFUSED = {
    "sentencepiece": ({"model": "llama"}, ["kind 'llama' (SentencePiece)", "--tokenizer tokenizer.json"]),
    "wordpiece": ({"model": "bert"}, ["kind 'bert' (WordPiece)", "--tokenizer"]),
    "unknown rule": ({"pre": "tekken"}, ["rule 'tekken'", "gpt-2, smollm, qwen2, llama-bpe", "--tokenizer"]),
    "no rule": ({"pre": None}, ["rule ''", "--tokenizer"]),
    "no model": ({"model": None}, ["no tokenizer.ggml.model"]),
    "no tokens": ({"tokens": None}, ["no tokenizer.ggml.tokens"]),
    "tokens are text": ({"tokens": "abc"}, ["'abc'", "of type list"]),
    "no merges": ({"merges": None}, ["no tokenizer.ggml.merges"]),
    "too few tokens": ({"tokens": TOKENS[:-1]}, ["268 tokens but 269 embedding rows"]),
    "too few types": ({"token_type": [1, 2]}, ["2 token types for 269 tokens"]),
    "a token twice": ({"tokens": changed(0, TOKENS[1])}, [f"token {TOKENS[1]!r} twice"]),
    "a merge of unknown tokens": ({"merges": [*MERGES, "x yz"]}, ["merge 'x yz'", "two tokens into a third"]),
    "a merge without a result": ({"merges": [*MERGES, "x y"]}, ["merge 'x y'"]),
    "a merge of three": ({"merges": ["h e l"]}, ["merge 'h e l'"]),
    "no eos": ({"eos_token_id": None}, ["no tokenizer.ggml.eos_token_id", "no answer would ever end"]),
    "eos out of range": ({"eos_token_id": 269}, ["eos_token_id is 269", "below 269"]),
    "bos wanted but missing": ({"add_bos_token": True, "bos_token_id": None}, ["no tokenizer.ggml.bos_token_id"]),
    "ends every text": ({"add_eos_token": True}, ["ends every text with the EOS token", "must stay open"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    changes, expected = REFUSED[name]
    with pytest.raises(CheckpointError) as caught:
        converted(**{"pre": "smollm", **changes})
    message = str(caught.value)
    assert message.startswith("tiny.gguf") and "\n" not in message
    for part in expected:
        assert part in message


def own_tokenizer(tmp_path: Path, tokens: list[str] = TOKENS) -> Path:
    """A tokenizer.json of another kind (whole words) with the same vocabulary."""
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token="!")).save(str(path))
    return path


def test_a_given_tokenizer_is_copied_as_it_is(tmp_path):
    path = own_tokenizer(tmp_path)
    result = converted(tokenizer_file=path, model="llama", pre=None, merges=None)
    assert result.tokenizer_json == path.read_text(encoding="utf-8")
    assert result.kind == "tokenizer.json"
    assert result.tokenizer_config["add_bos_token"] is True  # SentencePiece models begin with BOS unless they say otherwise
    assert result.tokenizer_config["eos_token"] == "<|im_end|>"


def test_a_given_tokenizer_must_belong_to_the_model(tmp_path):
    with pytest.raises(CheckpointError, match="has 270 tokens, more than the 269 embedding rows"):
        converted(tokenizer_file=own_tokenizer(tmp_path, [*TOKENS, "more"]))
    with pytest.raises(CheckpointError, match=r"has 'other' as token .*, where tiny.gguf has its bos token '<\|begin\|>'"):
        converted(tokenizer_file=own_tokenizer(tmp_path, changed(BOS, "other")))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "is no tokenizer.json"), (b"\xff\xfe\x00", "is not UTF-8"), (b"{}", "is no tokenizer.json"), (None, "cannot be read")],
)
def test_a_given_file_that_is_no_tokenizer(tmp_path, content, message):
    path = tmp_path / "given.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidInput, match=message) as caught:
        converted(tokenizer_file=path)
    assert "given.json" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_the_folder_loads_and_runs(tmp_path, architecture):
    source = TinyModel(architecture, "Q8_0").write(tmp_path / "tiny.gguf")
    converter.convert(source, tmp_path / "model")
    model, tokenizer = load(tmp_path / "model", backend="reference")
    assert tokenizer.has_chat_template and EOS in tokenizer.eos_token_ids
    ids = tokenizer.encode_prompt("hello 123")
    assert tokenizer.decode(ids) == "hello 123"
    logits = model.logits(ids, attention="dense")  # [T, vocab]
    assert logits.shape == (len(ids), len(TOKENS)) and np.isfinite(logits).all()
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == architecture
