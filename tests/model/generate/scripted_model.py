"""A model whose answer is known before it is asked."""

from types import SimpleNamespace

import numpy as np

from tests.model.small_tokenizer import EOS
from unisparse_np import InvalidInput
from unisparse_np.model.generate import stream_generate
from unisparse_np.parallel import ONE_PROCESS

VOCAB = 300


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


def run(tokenizer, answer, **options):
    """Pieces for a scripted answer (text or ids) that ends with EOS."""
    script = [*(tokenizer.encode(answer, add_bos=False) if isinstance(answer, str) else answer), EOS]
    return list(stream_generate(ScriptedModel(script), tokenizer, "the cat", raw=True, **options))


def text_of(pieces):
    return "".join(piece.text for piece in pieces)
