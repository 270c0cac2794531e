"""Special tokens, BOS, prompts and incremental decoding."""

import itertools
import json
import time
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from tests.model.small_tokenizer import BOS, EOS, PAD, SPECIAL, TEXT, TURN, byte_fallback_tokenizer, byte_level_tokenizer, write_folder
from unisparse_np import CheckpointError, InvalidInput
from unisparse_np.model.detokenizer import Detokenizer
from unisparse_np.model.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "needle-llama"
NAMES = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
ECHO_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


# ---- special tokens ----
@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        {name: {"__type": "AddedToken", "content": text, "lstrip": False, "special": True} for name, text in NAMES.items()},
        NAMES | {"extra_special_tokens": [SPECIAL[TURN]], "backend": "tokenizers"},
        NAMES | {"additional_special_tokens": [{"content": SPECIAL[TURN]}], "pad_token": None},
    ],
    ids=["text", "objects", "transformers 5", "transformers 4"],
)
def test_special_tokens_in_every_form(tmp_path, names):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, names))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (BOS, {EOS})
    assert NAMES.items() <= tokenizer.special_tokens.items()
    if len(names) > len(NAMES):
        assert tokenizer.special_tokens["additional_special_tokens"] == [SPECIAL[TURN]]


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [TURN, PAD]}, {"eos_token_id": BOS}, {EOS, TURN, PAD}),
        ({"eos_token_id": TURN}, None, {EOS, TURN}),
        ({}, {"eos_token_id": [EOS, TURN]}, {EOS, TURN}),
        (None, {"eos_token_id": None}, {EOS}),
        (None, None, {EOS}),
    ],
)
def test_every_eos_id_counts(tmp_path, generation, config, expected):
    assert Tokenizer.from_folder(write_folder(tmp_path, None, config, generation)).eos_token_ids == expected


def test_no_eos_is_no_error(tmp_path):
    assert Tokenizer.from_folder(write_folder(tmp_path, {})).eos_token_ids == set()


def test_tokens_listed_in_the_settings_are_added(tmp_path):
    plain = byte_level_tokenizer()
    new_id = plain.get_vocab_size()
    listed = {str(new_id): {"content": "<|late|>", "special": True}, str(EOS): {"content": SPECIAL[EOS], "special": True}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, NAMES | {"added_tokens_decoder": listed}))
    assert tokenizer.encode("the<|late|>", add_bos=False)[-1] == new_id
    assert tokenizer.vocab_size == new_id + 1
    assert tokenizer.decode([new_id]) == ""
    assert tokenizer.special_token_id("<|late|>") == new_id
    assert tokenizer.special_token_id("the") is None


# ---- BOS ----
@pytest.mark.parametrize(
    ("post_processor_adds", "add_bos_token", "expected"),
    [(True, None, True), (False, None, False), (True, False, False), (False, True, True), (True, True, True)],
)
def test_who_decides_about_bos(tmp_path, post_processor_adds, add_bos_token, expected):
    settings_ = NAMES if add_bos_token is None else NAMES | {"add_bos_token": add_bos_token}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, settings_, tokenizer=byte_level_tokenizer(post_processor_adds)))
    assert (tokenizer.encode("the cat")[0] == BOS) is expected
    assert tokenizer.encode("the cat", add_bos=False)[0] != BOS


def test_bos_is_never_doubled(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, NAMES | {"chat_template": ECHO_TEMPLATE}))
    for ids in (
        tokenizer.encode(f"{SPECIAL[BOS]}the cat"),
        tokenizer.encode_prompt(f"{SPECIAL[BOS]}the cat", raw=True),
        tokenizer.encode_prompt("the cat"),
    ):
        assert ids[0] == BOS
        assert ids.count(BOS) == 1
    assert tokenizer.encode(f"{SPECIAL[BOS]}the cat") == tokenizer.encode("the cat")


def test_a_template_without_bos_gets_none(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, NAMES | {"chat_template": "{{ messages[0].content }}"}))
    assert BOS not in tokenizer.encode_prompt("the cat")


def test_bos_without_tokenizer_config_comes_from_the_post_processor(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, {}))
    assert tokenizer.encode("the")[0] == tokenizer.bos_token_id == BOS
    assert tokenizer.special_tokens["bos_token"] == SPECIAL[BOS]


# ---- prompts ----
def test_prompt_through_the_template(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, NAMES | {"chat_template": ECHO_TEMPLATE}))
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_prompt("the cat", system="sat")) == "[system]sat[user]the cat[assistant]"
    assert tokenizer.decode(tokenizer.encode_prompt("the cat", raw=True)) == "the cat"


def test_prompt_without_a_template_is_raw(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path))
    assert not tokenizer.has_chat_template
    assert tokenizer.encode_prompt("the cat") == tokenizer.encode("the cat")
    with pytest.raises(InvalidInput, match="no chat template"):
        tokenizer.encode_prompt("the cat", system="be brief")


@pytest.mark.parametrize("prompt", ["", " \n", None])
def test_empty_prompts_are_refused(tmp_path, prompt):
    with pytest.raises(InvalidInput, match="is empty"):
        Tokenizer.from_folder(write_folder(tmp_path)).encode_prompt(prompt)


def test_system_and_raw_contradict_each_other(tmp_path):
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, NAMES | {"chat_template": ECHO_TEMPLATE}))
    with pytest.raises(InvalidInput, match="leave out --raw or --system"):
        tokenizer.encode_prompt("the cat", system="be brief", raw=True)


def test_text_that_is_no_unicode_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="UTF-8"):
        Tokenizer.from_folder(write_folder(tmp_path)).encode_prompt("the \ud800 cat")


def test_truncation_and_padding_of_training_are_off(tmp_path):
    trained = byte_level_tokenizer()
    trained.enable_truncation(4)
    trained.enable_padding(length=4)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer=trained))
    assert len(tokenizer.encode("c" * 50)) == 51
    assert len(tokenizer.encode("c")) == 2


# ---- broken folders ----
def _write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")


BROKEN = {
    "no tokenizer.json": (lambda f: (f / "tokenizer.json").unlink(), "does not exist"),
    "tokenizer.json cut off": (lambda f: _write(f, "tokenizer.json", '{"version": "1.0"'), "not a valid tokenizer"),
    "tokenizer.json of another kind": (lambda f: _write(f, "tokenizer.json", '{"model": {"type": "Nothing"}}'), "not a valid tokenizer"),
    "tokenizer.json a list": (lambda f: _write(f, "tokenizer.json", "[]"), "not a valid tokenizer"),
    "tokenizer_config.json cut off": (lambda f: _write(f, "tokenizer_config.json", '{"bos'), "not JSON"),
    "tokenizer_config.json a list": (lambda f: _write(f, "tokenizer_config.json", "[]"), "not an object"),
    "eos_token unknown": (lambda f: _write(f, "tokenizer_config.json", '{"eos_token": "<|gone|>"}'), "does not know"),
    "bos_token unknown": (
        lambda f: _write(f, "tokenizer_config.json", '{"bos_token": "<|gone|>", "add_bos_token": true}'),
        "does not know",
    ),
    "eos_token a number": (lambda f: _write(f, "tokenizer_config.json", '{"eos_token": 3}'), "not a token"),
    "added token at two ids": (
        lambda f: _write(f, "tokenizer_config.json", '{"added_tokens_decoder": {"9": {"content": "<|end|>"}}}'),
        "one model",
    ),
    "added tokens a list": (lambda f: _write(f, "tokenizer_config.json", '{"added_tokens_decoder": ["x"]}'), "does not map ids"),
    "added token without content": (
        lambda f: _write(f, "tokenizer_config.json", '{"added_tokens_decoder": {"9": {}}}'),
        "does not map ids",
    ),
    "eos_token_id a word": (lambda f: _write(f, "generation_config.json", '{"eos_token_id": "two"}'), "token id or a list"),
    "eos_token_id negative": (lambda f: _write(f, "config.json", '{"eos_token_id": [1, -1]}'), "token id or a list"),
    "vocabulary too large": (lambda f: _write(f, "config.json", '{"vocab_size": 100}'), "embeds only 100"),
    "chat_template a number": (lambda f: _write(f, "tokenizer_config.json", '{"chat_template": 3}'), "not text"),
    "no default template": (
        lambda f: _write(f, "tokenizer_config.json", '{"chat_template": [{"name": "tool_use", "template": "x"}]}'),
        "no 'default'",
    ),
    "chat_template.jinja not UTF-8": (lambda f: (f / "chat_template.jinja").write_bytes(b"\xff\xfe"), "UTF-8"),
}


@pytest.mark.parametrize(("breaking", "sentence"), BROKEN.values(), ids=BROKEN)
def test_broken_folder_is_one_sentence(tmp_path, breaking, sentence):
    folder = write_folder(tmp_path)
    breaking(folder)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        Tokenizer.from_folder(folder)
    assert "\n" not in str(caught.value)


# ---- incremental decoding ----
def _streamed(tokenizer, token_ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


def _byte_ids(tokenizer, text):
    """One token a byte: the finest split there is."""
    letters = _byte_letters()
    return [tokenizer.token_to_id(letters[byte]) for byte in text.encode()]


def _byte_letters():
    """The letter GPT-2's byte-level BPE writes for byte 0, 1, ...: itself where printable, else from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.mark.parametrize("text", ["🎉", "你好世界", "👩‍👩‍👧!", "a日b本c", "naïve 🎈 café", "Ω≈ç"])
def test_every_split_of_multi_byte_text(text):
    tokenizer = byte_level_tokenizer()
    pieces = _streamed(tokenizer, _byte_ids(tokenizer, text))
    assert "".join(pieces) == text
    assert [piece for piece in pieces if piece] == list(text)  # one character as soon as its last byte is there
    for ids in (tokenizer.encode(text, add_special_tokens=False).ids, _byte_ids(tokenizer, text)):
        for cut in range(len(ids) + 1):  # an answer may end anywhere: what is unfinished comes out as U+FFFD
            assert "".join(_streamed(tokenizer, ids[:cut])) == tokenizer.decode(ids[:cut])


def test_tokens_that_all_end_inside_a_character():
    first, second, third = (_byte_letters()[byte] for byte in "你".encode())
    names = [first, second, third, first + second, third + first + second]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    merges = [(first, second), (third, first + second)]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.decoder = decoders.ByteLevel()
    assert "".join(_streamed(tokenizer, [3, *[4] * 60, 2])) == "你" * 61


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.integers(0, 289), max_size=120))
def test_any_tokens_stream_as_they_decode(ids):
    tokenizer = byte_level_tokenizer()
    assert "".join(_streamed(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True)


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="the ca你🎉é\n", min_size=1, max_size=30))
def test_byte_fallback_text_streams_as_it_decodes(text):
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode(text).ids
    pieces = _streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_stray_bytes_behind_a_byte_fallback_character():
    tokenizer = byte_fallback_tokenizer()
    ids = [*tokenizer.encode("the 你").ids, tokenizer.token_to_id("<0xE5>"), *tokenizer.encode("the ca").ids]
    assert "".join(_streamed(tokenizer, ids)) == "the 你\ufffd the ca"


@pytest.mark.parametrize("name", ["Ģ", "<|turn|>"], ids=["continuation byte", "special token"])
def test_tokens_that_never_become_text_keep_a_step_cheap(name):
    tokenizer = byte_level_tokenizer()
    ids = [tokenizer.token_to_id(name)] * 10_000
    started = time.perf_counter()
    text = "".join(_streamed(tokenizer, ids))
    assert time.perf_counter() - started < 3.0  # 0.1 s; far more where each step decodes all that waits
    assert text == tokenizer.decode(ids)


def test_the_example_model_decodes_what_it_encodes():
    tokenizer = Tokenizer.from_folder(EXAMPLE)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids) == TEXT
    detokenizer = tokenizer.detokenizer()
    assert "".join(map(detokenizer.push, ids)) + detokenizer.flush() == TEXT
    assert tokenizer.vocab_size <= json.loads((EXAMPLE / "config.json").read_text())["vocab_size"]
