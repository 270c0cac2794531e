"""Stop strings, however they are cut into tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.small_tokenizer import PAD, SPECIAL
from unisparse_np import InvalidInput
from unisparse_np.model.stop_strings import StopStrings

from .scripted_model import run, text_of


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_stop_string_over_several_tokens(tokenizer, tokens):
    stop_ids = [tokenizer.encode(letter, add_bos=False)[0] for letter in "xyzvw"[:tokens]]
    before, after = tokenizer.encode("the cat x", add_bos=False), tokenizer.encode(" dog", add_bos=False)
    pieces = run(tokenizer, [*before, *stop_ids, *after], stop=["never", "xyzvw"[:tokens]] if tokens > 1 else ["x"])
    assert text_of(pieces) == ("the cat x" if tokens > 1 else "the cat ")
    assert pieces[-1].finish_reason == "stop"
    assert all("y" not in piece.text for piece in pieces)


def test_false_beginnings_are_released(tokenizer):
    pieces = run(tokenizer, "ab abab abac abacd", stop="abacd")
    assert text_of(pieces) == "ab abab abac "
    assert pieces[-1].finish_reason == "stop"


def test_stop_string_inside_one_token(tokenizer):
    the = tokenizer.encode(" the", add_bos=False)
    assert len(the) == 1
    assert text_of(run(tokenizer, [*the, *the], stop=["he"])) == " t"


def test_stop_string_of_multi_byte_characters(tokenizer):
    assert text_of(run(tokenizer, "cat 🎉🎈 dog", stop=["🎉🎈"])) == "cat "


def test_stop_string_in_what_the_end_flushes(tokenizer):
    ids = tokenizer.encode("a🎈", add_bos=False)[:-1]
    pieces = run(tokenizer, ids, stop=["\ufffd"])
    assert (text_of(pieces), pieces[-1].finish_reason) == ("a", "stop")


def test_special_token_as_stop_string(tokenizer):
    the = tokenizer.encode("the", add_bos=False)
    pieces = run(tokenizer, [*the, PAD, *the], stop=[SPECIAL[PAD]])
    assert (text_of(pieces), pieces[-1].finish_reason, pieces[-1].token_id) == ("the", "stop", PAD)


def _stopped_by_definition(text, stops):
    """Character by character: the answer ends as soon as the text so far ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    chunks=st.lists(st.text(alphabet="ab", max_size=4), max_size=12),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_do_not_depend_on_the_split(chunks, stops):
    watcher, released, found = StopStrings(stops), "", False
    whole = "".join(chunks)
    for chunk in chunks:
        text, found = watcher.push(chunk)
        released += text
        if found:
            break
    if not found:
        assert len(whole) - len(released) < max(map(len, stops), default=1)  # no more is held back than could become a stop string
        released += watcher.flush()
    assert (released, found) == _stopped_by_definition(whole, stops)


@pytest.mark.parametrize("stop", ["", ["a", ""], [3]])
def test_stop_strings_that_cannot_be_found_are_refused(stop):
    with pytest.raises(InvalidInput, match="can never be found"):
        StopStrings(stop)
