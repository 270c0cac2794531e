"""How an answer ends."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.model.small_tokenizer import EOS, PAD, TURN, write_folder
from unisparse_np import UniSparseConfig
from unisparse_np.model.generate import generate, stream_generate
from unisparse_np.model.loading import load
from unisparse_np.model.tokenizer import Tokenizer

from .scripted_model import ScriptedModel, run, text_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "needle-llama"


def test_eos_ends_and_is_not_printed(tokenizer):
    pieces = run(tokenizer, "the cat 🎉")
    assert text_of(pieces) == "the cat 🎉"
    assert pieces[-1].finish_reason == "eos"
    assert pieces[-1].token_id == EOS
    assert all(piece.finish_reason is None and piece.statistics is None for piece in pieces[:-1])


@pytest.mark.parametrize("ending", [EOS, TURN])
def test_any_eos_id_ends(tokenizer, ending):
    the = tokenizer.encode("the", add_bos=False)
    pieces = run(tokenizer, [*the, ending, *the])
    assert text_of(pieces) == "the"
    assert (pieces[-1].finish_reason, pieces[-1].token_id) == ("eos", ending)


def test_an_eos_that_is_an_ordinary_token_is_not_printed_either(tokenizer, tmp_path):
    the, cat = (tokenizer.encode(word, add_bos=False)[0] for word in ("the", " c"))
    other = Tokenizer.from_folder(write_folder(tmp_path, {}, None, {"eos_token_id": cat}))
    pieces = run(other, [the, cat, the])
    assert (text_of(pieces), pieces[-1].finish_reason) == (other.decode([the]), "eos")


def test_a_special_token_that_is_no_eos_is_left_out(tokenizer):
    the = tokenizer.encode("the", add_bos=False)
    assert text_of(run(tokenizer, [*the, PAD, *the])) == "thethe"


def test_max_tokens_ends_and_flushes(tokenizer):
    ids = tokenizer.encode("🎈", add_bos=False)
    assert len(ids) > 1
    for count in range(1, len(ids) + 1):
        pieces = run(tokenizer, ids, max_tokens=count)
        assert len(pieces) == count
        assert pieces[-1].finish_reason == "length"
        assert text_of(pieces) == tokenizer.decode(ids[:count])


def test_text_held_back_comes_out_at_the_end(tokenizer):
    pieces = run(tokenizer, "the cat", stop=["cats"])
    assert text_of(pieces) == "the cat"
    assert pieces[-1].finish_reason == "eos"
    pieces = run(tokenizer, "the cat", stop=["cats"], max_tokens=len(tokenizer.encode("the cat", add_bos=False)))
    assert text_of(pieces) == "the cat"
    assert pieces[-1].finish_reason == "length"


def test_the_answer_is_cut_where_the_context_ends(tokenizer):
    model = ScriptedModel(itertools.repeat(9))
    model.max_context = 10
    with pytest.warns(UserWarning, match="context of 10 tokens leaves room for 3 of the 50"):
        pieces = list(stream_generate(model, tokenizer, [5] * 8, max_tokens=50))
    assert len(pieces) == 3  # positions 8 and 9 are read, the token after them is not
    assert pieces[-1].finish_reason == "length"
    assert len(model.read) == model.capacity == 10


@pytest.mark.parametrize("ending", ["last piece", "left early", "error"])
def test_the_cache_is_released_however_it_ends(tokenizer, ending):
    model = ScriptedModel([5] * 20)
    pieces = stream_generate(model, tokenizer, [5, 6, 7], max_tokens=3 if ending == "last piece" else 50)
    if ending == "last piece":
        list(pieces)
    elif ending == "left early":
        next(pieces)
        pieces.close()
    else:
        with pytest.raises(RuntimeError):  # the script ends before the answer
            list(pieces)
    assert model.released == [True]


def test_the_example_model_answers():
    command = [sys.executable, str(EXAMPLE / "tasks.py"), "niah_single_1", "1024", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    model, tokenizer = load(EXAMPLE, backend="reference")
    for task in map(json.loads, lines):
        for attention in ("dense", UniSparseConfig()):
            answer = generate(model, tokenizer, task["prompt"], raw=True, attention=attention, max_tokens=task["max_tokens"])
            assert all(expected in answer for expected in task["answers"])
