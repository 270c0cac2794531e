"""What the model is given to read, and how its tokens are drawn."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from tests.model.small_tokenizer import EOS, SPECIAL, write_folder
from unisparse_np import CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.model.generate import generate, stream_generate
from unisparse_np.model.tokenizer import Tokenizer

from .scripted_model import VOCAB, ScriptedModel, text_of


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
        text = text_of(itertools.islice(pieces, count))
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


def test_same_seed_sametext_of(tokenizer):
    def answer(seed):
        model = ScriptedModel(itertools.repeat(9))
        return generate(model, tokenizer, "the", raw=True, temperature=8.0, seed=seed, max_tokens=20)

    assert answer(1) == answer(1) != answer(2)


def test_nan_logits_are_an_error(tokenizer):
    model = ScriptedModel([])
    model._next = lambda token_ids, attention: np.full(VOCAB, np.nan, dtype=np.float32)
    with pytest.raises(CheckpointError, match="300 of the model's 300 logits"):
        generate(model, tokenizer, "the", raw=True)


@pytest.mark.filterwarnings("error")
def test_a_template_is_used_in_silence(tmp_path):
    source = "{{ bos_token }}{{ messages[0].content }} {{ messages[1].content }}"
    folder = write_folder(tmp_path, {"bos_token": SPECIAL[0], "eos_token": SPECIAL[EOS], "chat_template": source})
    chat = Tokenizer.from_folder(folder)
    model = ScriptedModel([EOS])
    generate(model, chat, "cat", system="the")
    assert model.read == chat.encode("the cat")


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
