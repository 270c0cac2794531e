"""What the last piece tells of time and memory."""

import time
from types import SimpleNamespace

import pytest

from tests.model.small_tokenizer import EOS
from unisparse_np.model.generate import stream_generate
from unisparse_np.model.statistics import peak_memory_bytes

from .scripted_model import ScriptedModel


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
