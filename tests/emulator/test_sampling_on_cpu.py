"""The CuPy backend's sampler, run on the CPU by the emulator: it draws what the model's own Sampler draws."""

import itertools
import shutil
import sys

import numpy as np
import pytest

from tests.emulator import cupy_on_cpu
from unisparse_np import CheckpointError
from unisparse_np.model.sampling import Sampler

pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("g++") is None, reason="the emulator needs Linux and g++")

VOCAB = 1500
SETTINGS = list(itertools.product((0.0, 0.01, 1.3), (0, 1, 40, 5000), (0.31, 1.0), (0.0, 0.2), (1.0, 1.4)))


@pytest.fixture
def new_sampler():
    with cupy_on_cpu.installed("80") as backend:
        yield backend.new_sampler


def some_logits(rng):
    """Large and small, with ties and forbidden tokens."""
    logits = (3 * rng.standard_normal(VOCAB)).astype(np.float32)
    logits[rng.integers(VOCAB, size=30)] = 7.5
    logits[rng.integers(VOCAB, size=200)] = -np.inf
    return logits


@pytest.mark.parametrize("settings", SETTINGS[:: len(SETTINGS) // 12] + SETTINGS[-1:], ids=str)
def test_draws_are_those_of_the_sampler(settings, new_sampler):
    rng = np.random.default_rng(hash(settings) % 1000)
    found, expected = new_sampler(*settings, 11, VOCAB), Sampler(*settings, 11)
    ids = np.empty(0, dtype=np.int64)
    for _ in range(6):
        logits = some_logits(rng)
        token = expected(logits, ids)
        assert found(sys.modules["cupy"].asarray(logits), ids) == token
        ids = np.append(ids, token)
    ids = ids[::-1].copy()  # another history: what was seen before no longer counts
    logits = some_logits(rng)
    assert found(sys.modules["cupy"].asarray(logits), ids[:3]) == expected(logits, ids[:3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused_in_the_same_words(bad, new_sampler):
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[[3, 700]] = bad
    for sample in (new_sampler(0.0, 0, 1.0, 0.0, 1.0, None, VOCAB), Sampler()):
        with pytest.raises(CheckpointError, match="2 of the model's 1500 logits are NaN or infinite"):
            sample(sys.modules["cupy"].asarray(logits), np.empty(0, dtype=np.int64))
    with pytest.raises(CheckpointError, match="-inf for every token"):
        new_sampler(0.8, 5, 0.9, 0.0, 1.2, 1, VOCAB)(sys.modules["cupy"].asarray(np.full_like(logits, -np.inf)), np.array([1]))
