"""Streaming generation: a scripted model answers, so that every way to end can be watched token by token."""

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.model.small_tokenizer import EOS, PAD, SPECIAL, TURN, write_folder
from unisparse_np import CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.model.generate import NoChatTemplateWarning, generate, stream_generate
from unisparse_np.model.loading import load
from unisparse_np.model.statistics import peak_memory_bytes
from unisparse_np.model.stop_strings import StopStrings
from unisparse_np.model.tokenizer import Tokenizer
from unisparse_np.parallel import ONE_PROCESS

VOCAB = 300
EXAMPLE = Path(__file__).parents[2] / "examples" / "needle-llama"


class ScriptedModel:
    """Answers with the given tokens, whatever it is asked; notes what it was given."""

    max_context = 1000
    config = SimpleNamespace(vocab_size=VOCAB)
    backend = SimpleNamespace(layers=SimpleNamespace(memory=None))  # without a sampler of its own
    ranks = ONE_PROCESS

    def __init__(self, script):
        self.script = iter(script)
        self.read, self.attentions, self.capacity, self.released = [], [], 0, []

    def new_cache(self, capacity, attention, decode_attention):
        if "wrong" in (attention, decode_attention):
            raise InvalidInput("attention='wrong'")
        self.capacity = capacity
        return SimpleNamespace(release=lambda: self.released.append(True))

    def prefill_on_backend(self, token_ids, cache, attention, *, chunk_size=None, progress=None):
        if progress is not None:
            progress(len(token_ids), len(token_ids), 0.5)
        return self._next(token_ids, attention)

    def step_on_backend(self, token_id, cache, attention):
        return self._next([token_id], attention)

    def layer_densities(self, cache):
        return [0.25, 0.75]

    def _next(self, token_ids, attention):
        self.read += token_ids
        self.attentions.append(attention)
        assert len(self.read) <= self.capacity
        logits = np.zeros(VOCAB, dtype=np.float32)
        logits[next(self.script)] = 9.0
        return logits


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[EOS]}
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("model"), names, None, {"eos_token_id": [EOS, TURN]}))


def _run(tokenizer, answer, **options):
    """Pieces for a scripted answer (text or ids) that ends with EOS."""
    script = [*(tokenizer.encode(answer, add_bos=False) if isinstance(answer, str) else answer), EOS]
    return list(stream_generate(ScriptedModel(script), tokenizer, "the cat", raw=True, **options))


def _text(pieces):
    return "".join(piece.text for piece in pieces)


# ---- how an answer ends ----
def test_eos_ends_and_is_not_printed(tokenizer):
    pieces = _run(tokenizer, "the cat 🎉")
    assert _text(pieces) == "the cat 🎉"
    assert pieces[-1].finish_reason == "eos"
    assert pieces[-1].token_id == EOS
    assert all(piece.finish_reason is None and piece.statistics is None for piece in pieces[:-1])


@pytest.mark.parametrize("ending", [EOS, TURN])
def test_any_eos_id_ends(tokenizer, ending):
    the = tokenizer.encode("the", add_bos=False)
    pieces = _run(tokenizer, [*the, ending, *the])
    assert _text(pieces) == "the"
    assert (pieces[-1].finish_reason, pieces[-1].token_id) == ("eos", ending)


def test_an_eos_that_is_an_ordinary_token_is_not_printed_either(tokenizer, tmp_path):
    the, cat = (tokenizer.encode(word, add_bos=False)[0] for word in ("the", " c"))
    other = Tokenizer.from_folder(write_folder(tmp_path, {}, None, {"eos_token_id": cat}))
    pieces = _run(other, [the, cat, the])
    assert (_text(pieces), pieces[-1].finish_reason) == (other.decode([the]), "eos")


def test_a_special_token_that_is_no_eos_is_left_out(tokenizer):
    the = tokenizer.encode("the", add_bos=False)
    assert _text(_run(tokenizer, [*the, PAD, *the])) == "thethe"


def test_max_tokens_ends_and_flushes(tokenizer):
    ids = tokenizer.encode("🎈", add_bos=False)
    assert len(ids) > 1
    for count in range(1, len(ids) + 1):
        pieces = _run(tokenizer, ids, max_tokens=count)
        assert len(pieces) == count
        assert pieces[-1].finish_reason == "length"
        assert _text(pieces) == tokenizer.decode(ids[:count])


def test_text_held_back_comes_out_at_the_end(tokenizer):
    pieces = _run(tokenizer, "the cat", stop=["cats"])
    assert _text(pieces) == "the cat"
    assert pieces[-1].finish_reason == "eos"
    pieces = _run(tokenizer, "the cat", stop=["cats"], max_tokens=len(tokenizer.encode("the cat", add_bos=False)))
    assert _text(pieces) == "the cat"
    assert pieces[-1].finish_reason == "length"


# ---- stop strings ----
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5])
def test_stop_string_over_several_tokens(tokenizer, tokens):
    stop_ids = [tokenizer.encode(letter, add_bos=False)[0] for letter in "xyzvw"[:tokens]]
    before, after = tokenizer.encode("the cat x", add_bos=False), tokenizer.encode(" dog", add_bos=False)
    pieces = _run(tokenizer, [*before, *stop_ids, *after], stop=["never", "xyzvw"[:tokens]] if tokens > 1 else ["x"])
    assert _text(pieces) == ("the cat x" if tokens > 1 else "the cat ")
    assert pieces[-1].finish_reason == "stop"
    assert all("y" not in piece.text for piece in pieces)


def test_false_beginnings_are_released(tokenizer):
    pieces = _run(tokenizer, "ab abab abac abacd", stop="abacd")
    assert _text(pieces) == "ab abab abac "
    assert pieces[-1].finish_reason == "stop"


def test_stop_string_inside_one_token(tokenizer):
    the = tokenizer.encode(" the", add_bos=False)
    assert len(the) == 1
    assert _text(_run(tokenizer, [*the, *the], stop=["he"])) == " t"


def test_stop_string_of_multi_byte_characters(tokenizer):
    assert _text(_run(tokenizer, "cat 🎉🎈 dog", stop=["🎉🎈"])) == "cat "


def test_stop_string_in_what_the_end_flushes(tokenizer):
    ids = tokenizer.encode("a🎈", add_bos=False)[:-1]
    pieces = _run(tokenizer, ids, stop=["\ufffd"])
    assert (_text(pieces), pieces[-1].finish_reason) == ("a", "stop")


def test_special_token_as_stop_string(tokenizer):
    the = tokenizer.encode("the", add_bos=False)
    pieces = _run(tokenizer, [*the, PAD, *the], stop=[SPECIAL[PAD]])
    assert (_text(pieces), pieces[-1].finish_reason, pieces[-1].token_id) == ("the", "stop", PAD)


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


# ---- what the model is given ----
def test_the_model_reads_prompt_and_answer_once(tokenizer):
    script = [*tokenizer.encode("the dog", add_bos=False), EOS]
    model, seen = ScriptedModel(script), []
    config = UniSparseConfig(block_size=64)
    pieces = list(
        stream_generate(model, tokenizer, [5, 6, 7], attention=config, decode_attention="dense", progress=lambda *done: seen.append(done))
    )
    assert model.read == [5, 6, 7, *script[:-1]]  # the token that ends the answer is not read back
    assert model.attentions == [config] + ["dense"] * (len(script) - 1)
    assert seen == [(3, 3, 0.5)]
    assert [piece.token_id for piece in pieces] == script


def test_an_answer_can_be_left_at_any_point(tokenizer):
    script = tokenizer.encode("the cat 🎉 sat", add_bos=False)
    for count in range(len(script)):
        model = ScriptedModel([*script, EOS])
        pieces = stream_generate(model, tokenizer, "the", raw=True)
        text = _text(itertools.islice(pieces, count))
        pieces.close()
        assert "the cat 🎉 sat".startswith(text)
        assert model.read[1 + len(tokenizer.encode("the", add_bos=False)) :] == script[: max(0, count - 1)]  # no step ahead of its need


def test_interruption_passes_through(tokenizer):
    def interrupt(*_):
        raise KeyboardInterrupt

    pieces = stream_generate(ScriptedModel([5]), tokenizer, "the", raw=True, progress=interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(pieces)


def test_repetition_penalty_sees_prompt_and_answer(tokenizer):
    the, cat, dog = (tokenizer.encode(word, add_bos=False)[0] for word in ("t", "c", "d"))
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[the, cat, dog]] = 3.0, 2.9, 2.8
    model = ScriptedModel([])
    model._next = lambda token_ids, attention: logits
    pieces = stream_generate(model, tokenizer, [the], repetition_penalty=1.5, max_tokens=3)
    assert [piece.token_id for piece in pieces] == [cat, dog, the]  # 3 / 1.5 is ahead of 2.9 / 1.5


def test_same_seed_same_text(tokenizer):
    def answer(seed):
        model = ScriptedModel(itertools.repeat(9))
        return generate(model, tokenizer, "the", raw=True, temperature=8.0, seed=seed, max_tokens=20)

    assert answer(1) == answer(1) != answer(2)


def test_nan_logits_are_an_error(tokenizer):
    model = ScriptedModel([])
    model._next = lambda token_ids, attention: np.full(VOCAB, np.nan, dtype=np.float32)
    with pytest.raises(CheckpointError, match="300 of the model's 300 logits"):
        generate(model, tokenizer, "the", raw=True)


# ---- context ----
def test_the_answer_is_cut_where_the_context_ends(tokenizer):
    model = ScriptedModel(itertools.repeat(9))
    model.max_context = 10
    with pytest.warns(UserWarning, match="context of 10 tokens leaves room for 3 of the 50"):
        pieces = list(stream_generate(model, tokenizer, [5] * 8, max_tokens=50))
    assert len(pieces) == 3  # positions 8 and 9 are read, the token after them is not
    assert pieces[-1].finish_reason == "length"
    assert len(model.read) == model.capacity == 10


def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    model = ScriptedModel([])
    model.max_context = 10
    with pytest.raises(InvalidInput, match=r"the prompt has 11 tokens, more than the 10 .*--max-context"):
        stream_generate(model, tokenizer, [5] * 11)
    assert model.capacity == 0


# ---- refused before the first piece is asked for ----
@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("", {}, "is empty"),
        ([], {}, "no tokens"),
        ([5, VOCAB], {}, "token id 300 .* from 0 to 299"),
        ([5, -1], {}, "token id -1"),
        ([5.0], {}, "token id 5.0"),
        ([5], {"system": "be brief"}, "beside a prompt of token ids"),
        ("the", {"system": "be brief"}, "no chat template"),
        ("the", {"max_tokens": 0}, "max_tokens=0"),
        ("the", {"max_tokens": 2.5}, "max_tokens=2.5"),
        ("the", {"temperature": -1}, "temperature=-1"),
        ("the", {"stop": [""]}, "stop string ''"),
        ("the", {"attention": "wrong"}, "attention='wrong'"),
        ("the", {"decode_attention": "wrong"}, "attention='wrong'"),
    ],
)
@pytest.mark.filterwarnings("ignore::unisparse_np.model.generate.NoChatTemplateWarning")
def test_bad_arguments_are_refused_at_once(tokenizer, prompt, options, sentence):
    model = ScriptedModel([])
    with pytest.raises(InvalidInput, match=sentence):
        stream_generate(model, tokenizer, prompt, **options)
    assert model.read == []


def test_a_missing_template_is_said(tokenizer):
    with pytest.warns(NoChatTemplateWarning, match="continued as raw text"):
        assert generate(ScriptedModel([EOS]), tokenizer, "the") == ""


@pytest.mark.filterwarnings("error")
def test_a_template_is_used_in_silence(tmp_path):
    source = "{{ bos_token }}{{ messages[0].content }} {{ messages[1].content }}"
    folder = write_folder(tmp_path, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[EOS], "chat_template": source})
    chat = Tokenizer.from_folder(folder)
    model = ScriptedModel([EOS])
    generate(model, chat, "cat", system="the")
    assert model.read == chat.encode("the cat")


# ---- statistics ----
def test_statistics(tokenizer):
    model = ScriptedModel([*tokenizer.encode("the cat", add_bos=False), EOS])
    slow_next = model._next

    def next_in_ten_milliseconds(*args):
        time.sleep(0.01)
        return slow_next(*args)

    model._next = next_in_ten_milliseconds
    pieces = []
    for piece in stream_generate(model, tokenizer, [5, 6, 7]):
        pieces.append(piece)
        time.sleep(0.15)  # a slow reader is not the model's time
    s = pieces[-1].statistics
    assert (s.prompt_tokens, s.generated_tokens, s.load_seconds) == (3, len(pieces), None)
    assert 0.01 <= s.prefill_seconds <= s.time_to_first_token
    steps = len(pieces) - 1
    assert 0.01 * steps <= s.decode_seconds < 0.15 * steps
    assert s.prefill_tokens_per_second == pytest.approx(3 / s.prefill_seconds)
    assert s.decode_tokens_per_second == pytest.approx(steps / s.decode_seconds)
    assert (s.densities, s.density_mean, s.density_lowest, s.density_highest) == ([0.25, 0.75], 0.5, 0.25, 0.75)
    assert 2**20 < s.peak_memory_bytes <= peak_memory_bytes()


def test_statistics_of_a_device(tokenizer):
    """Peak memory is the device's own; of the compile time only what this answer waited for counts."""
    model = ScriptedModel([EOS])
    seconds = iter([2.0, 2.5])
    model.backend = SimpleNamespace(
        layers=SimpleNamespace(memory=SimpleNamespace(peak_bytes=lambda: 77)), compile_seconds=lambda: next(seconds)
    )
    (piece,) = stream_generate(model, tokenizer, [5, 6, 7])
    assert (piece.statistics.device_peak_memory_bytes, piece.statistics.compile_seconds) == (77, 0.5)


def test_a_backend_s_own_sampler_chooses(tokenizer):
    given = []

    def new_sampler(*settings):
        given.append(settings)
        return lambda logits, ids: EOS

    model = ScriptedModel([5])
    model.backend = SimpleNamespace(layers=SimpleNamespace(memory=None), new_sampler=new_sampler)
    pieces = list(stream_generate(model, tokenizer, [5, 6, 7], temperature=0.5, top_k=3, seed=1))
    assert pieces[-1].finish_reason == "eos" and given == [(0.5, 3, 1.0, 0.0, 1.0, 1, VOCAB)]
    with pytest.raises(InvalidInput, match="temperature"):
        stream_generate(model, tokenizer, [5, 6, 7], temperature=-1)


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


# ---- the real thing ----
def test_the_example_model_answers():
    command = [sys.executable, str(EXAMPLE / "tasks.py"), "niah_single_1", "1024", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    model, tokenizer = load(EXAMPLE, backend="reference")
    for task in map(json.loads, lines):
        for attention in ("dense", UniSparseConfig()):
            answer = generate(model, tokenizer, task["prompt"], raw=True, attention=attention, max_tokens=task["max_tokens"])
            assert all(expected in answer for expected in task["answers"])
