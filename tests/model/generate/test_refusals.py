"""What is refused before the first piece is asked for."""

import pytest

from tests.model.small_tokenizer import EOS
from unisparse_np import InvalidInput
from unisparse_np.model.generate import NoChatTemplateWarning, generate, stream_generate

from .scripted_model import VOCAB, ScriptedModel


@pytest.mark.parametrize(
    ("prompt", "options", "sentence"),
    [
        ("", {}, "is empty"),
        ([], {}, "no tokens"),
        ([5, VOCAB], {}, "token id 300 .* from 0 to 299"),
        ([5, -1], {}, "token id -1"),
        ([5.0], {}, "token id 5.0"),
        (None, {}, "the prompt is a NoneType: give text, or a sequence"),
        (b"the", {}, "the prompt is a bytes: give text, or a sequence"),
        ("the", {"stop": 3}, "stop=3 is no text"),
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


def test_a_prompt_longer_than_the_context_is_refused(tokenizer):
    model = ScriptedModel([])
    model.max_context = 10
    with pytest.raises(InvalidInput, match=r"the prompt has 11 tokens, more than the 10 .*--max-context"):
        stream_generate(model, tokenizer, [5] * 11)
    assert model.capacity == 0
