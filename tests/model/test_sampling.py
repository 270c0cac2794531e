"""Sampling against definitions spelled out token by token."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisparse_np import CheckpointError, InvalidInput
from unisparse_np.model.sampling import Sampler, penalize_repetition

# Few distinct values, so that ties are common; -inf forbids a token.
LOGITS = st.lists(st.sampled_from([-math.inf, -3.0, -0.5, 0.0, 0.25, 1.0, 2.0, 2.0, 4.5]), min_size=1, max_size=12).filter(
    lambda values: max(values) > -math.inf
)


def _by_definition(logits, temperature, top_k, top_p, min_p):
    """The order of sampling.py's docstring with plain Python numbers: {token id: probability}."""
    highest = max(logits)
    weights = {token_id: math.exp((logit - highest) / temperature) for token_id, logit in enumerate(logits)}
    ranked = sorted((t for t in weights if weights[t] > 0), key=lambda token_id: (-weights[token_id], token_id))
    if top_k:
        ranked = ranked[:top_k]
    if top_p < 1:
        total, kept, mass = sum(weights[t] for t in ranked), [], 0.0
        for token_id in ranked:
            if mass >= top_p:
                break
            kept.append(token_id)
            mass += weights[token_id] / total
        ranked = kept
    ranked = [t for t in ranked if weights[t] >= min_p * weights[ranked[0]]]
    total = sum(weights[t] for t in ranked)
    return {t: weights[t] / total for t in ranked}


@settings(max_examples=300, deadline=None)
@given(
    values=LOGITS,
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.01, 0.37, 0.613, 0.977, 1.0]),
    min_p=st.sampled_from([0.0, 0.0513, 0.31, 1.0]),
)
def test_distribution_is_the_definition(values, temperature, top_k, top_p, min_p):
    sampler = Sampler(temperature, top_k, top_p, min_p)
    token_ids, probabilities = sampler.distribution(np.array(values, dtype=np.float32))
    expected = _by_definition(values, temperature, top_k, top_p, min_p)
    assert sorted(token_ids.tolist()) == sorted(expected)
    np.testing.assert_allclose(probabilities, [expected[token_id] for token_id in token_ids.tolist()], rtol=1e-12)


def test_a_large_vocabulary_is_trimmed_by_the_definition():
    logits = (4 * np.random.default_rng(5).standard_normal(3000)).astype(np.float32)
    for top_p in (0.05, 0.5, 0.9, 0.9999):
        token_ids, _ = Sampler(temperature=0.9, top_p=top_p).distribution(logits)
        assert token_ids.tolist() == list(_by_definition(logits.tolist(), 0.9, 0, top_p, 0.0))


@settings(max_examples=100, deadline=None)
@given(values=LOGITS, penalty=st.sampled_from([0.5, 1.0, 1.3, 2.0]), data=st.data())
def test_repetition_penalty_is_the_definition(values, penalty, data):
    seen = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=20))
    expected = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(values)]
    given_logits = np.array(values, dtype=np.float32)
    assert penalize_repetition(given_logits, seen, penalty).tolist() == expected
    assert given_logits.tolist() == values  # the caller's array is left alone


def test_the_penalty_comes_before_the_choice():
    logits = np.array([2.0, 3.0, -1.0], dtype=np.float32)
    assert Sampler()(logits, [1, 1]) == 1
    assert Sampler(repetition_penalty=2.0)(logits, [1, 1]) == 0
    assert Sampler(repetition_penalty=2.0)(logits, np.array([0, 1])) == 1


@given(values=LOGITS)
def test_greedy_takes_the_first_largest(values):
    logits = np.array(values, dtype=np.float32)
    assert Sampler(top_k=3, top_p=0.2, seed=1)(logits, []) == values.index(max(values))
    assert Sampler(temperature=1.5, top_k=1, seed=1)(logits, []) == values.index(max(values))


def test_draws_follow_the_distribution():
    logits = np.array([1.0, 3.0, 2.0, -math.inf, 2.5], dtype=np.float32)
    sampler = Sampler(temperature=1.3, top_k=3, seed=7)
    draws = 20_000
    counts = np.bincount([sampler(logits, []) for _ in range(draws)], minlength=5) / draws
    expected = np.zeros(5)
    for token_id, probability in _by_definition(logits.tolist(), 1.3, 3, 1.0, 0.0).items():
        expected[token_id] = probability
    np.testing.assert_allclose(counts, expected, atol=5 * 0.5 / math.sqrt(draws))  # five standard deviations at most
    assert counts[0] == counts[3] == 0


def test_a_seed_repeats_and_no_seed_does_not():
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed):
        sampler = Sampler(temperature=1.0, seed=seed)
        return [sampler(logits, []) for _ in range(8)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_extreme_temperatures_stay_finite():
    logits = np.array([1e4, -1e4, 9e3], dtype=np.float32)
    assert Sampler(temperature=1e-300, seed=0)(logits, []) == 0
    _, probabilities = Sampler(temperature=1e300).distribution(logits)
    np.testing.assert_allclose(probabilities, 1 / 3)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "sentence"),
    [([0, math.nan, 1], "1 of the model's 3 logits"), ([math.inf, 0, 0], "NaN or infinite"), ([-math.inf] * 3, "-inf for every token")],
)
def test_broken_logits_are_an_error(logits, sentence, temperature):
    with pytest.raises(CheckpointError, match=sentence):
        Sampler(temperature=temperature)(np.array(logits, dtype=np.float32), [])


BAD = [
    ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "hot"), ("top_k", -1), ("top_k", 2.5),
    ("top_k", True), ("top_p", 0.0), ("top_p", 1.5), ("top_p", -0.5), ("min_p", -0.1), ("min_p", 1.1), ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0), ("repetition_penalty", math.inf), ("seed", -1), ("seed", 1.5),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_outside_their_range_are_refused(name, value):
    with pytest.raises(InvalidInput, match=rf"{name}={value!r} is outside its range: give ") as caught:
        Sampler(**{name: value})
    assert "\n" not in str(caught.value)
