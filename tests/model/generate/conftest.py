"""A small tokenizer with two tokens that end an answer."""

import pytest

from tests.model.small_tokenizer import EOS, SPECIAL, TURN, write_folder
from unisparse_np.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    names = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[EOS]}
    return Tokenizer.from_folder(write_folder(tmp_path_factory.mktemp("model"), names, None, {"eos_token_id": [EOS, TURN]}))
