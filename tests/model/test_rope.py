"""Rotary frequencies against their formulas; whole models against transformers are in test_llama.py."""

import math

import numpy as np
import pytest

from unisparse_np import CheckpointError
from unisparse_np.model.rope import RopeParameters

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def frequencies(raw: dict, head_dim: int = 64, length: int = 100, positions: int = 2048) -> tuple[np.ndarray, float]:
    return RopeParameters.from_config(raw, positions).inverse_frequencies(head_dim, length)


def plain(theta: float, head_dim: int = 64) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


@pytest.mark.parametrize(
    "raw",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
    ],
)
def test_default_in_both_styles(raw):
    inv_freq, factor = frequencies(raw)
    assert inv_freq.dtype == np.float32 and factor == 1.0
    np.testing.assert_allclose(inv_freq, plain(5e5), rtol=1e-6)


def test_a_silent_config_means_ten_thousand():
    np.testing.assert_allclose(frequencies({})[0], plain(1e4), rtol=1e-6)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_divides_every_frequency(key):
    np.testing.assert_allclose(
        frequencies({"rope_theta": 1e4, "rope_scaling": {key: "linear", "factor": 4.0}})[0], plain(1e4) / 4, rtol=1e-6
    )


def test_dynamic_stretches_the_base_past_the_limit_only():
    raw = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    np.testing.assert_array_equal(frequencies(raw, length=2048)[0], frequencies({"rope_theta": 1e4})[0])
    base = 1e4 * (2.0 * 3 - 1) ** (64 / 62)
    np.testing.assert_allclose(frequencies(raw, length=6144)[0], plain(base), rtol=1e-6)


def test_llama3_keeps_short_wavelengths_divides_long_ones_and_blends_between():
    inv_freq, _ = frequencies({"rope_theta": 5e5, "rope_scaling": LLAMA3})
    before = plain(5e5)
    wavelength = 2 * math.pi / before
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_allclose(inv_freq[short], before[short], rtol=1e-6)
    np.testing.assert_allclose(inv_freq[long], before[long] / 8, rtol=1e-6)
    middle = ~short & ~long
    assert middle.any() and np.all(inv_freq[middle] < before[middle]) and np.all(inv_freq[middle] > before[middle] / 8)
    assert np.all(np.diff(inv_freq) < 0)


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.7, "mscale_all_dim": 0.3}, (0.07 * math.log(4) + 1) / (0.03 * math.log(4) + 1)),
    ],
)
def test_yarn_keeps_fast_pairs_divides_slow_ones_and_scales_the_vectors(more, factor):
    inv_freq, given = frequencies({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0, **more}}, positions=4096)
    assert given == pytest.approx(factor)
    before = plain(1e4)
    np.testing.assert_allclose(inv_freq[:8], before[:8], rtol=1e-6)
    np.testing.assert_allclose(inv_freq[-4:], before[-4:] / 4, rtol=1e-6)


def test_yarn_without_a_factor_takes_the_ratio_of_the_lengths():
    raw = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 1024}}
    with_factor = {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}
    np.testing.assert_array_equal(frequencies(raw, positions=4096)[0], frequencies(with_factor, positions=4096)[0])


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": ["yarn"], "factor": 4.0}}, "is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "'linear' needs factor, which is missing"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "four"}}, "factor is 'four'"),
        ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0 must be greater than low_freq_factor 1.0"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', not an object"),
        ({"rope_theta": -1}, "rope_theta is -1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, r"differs by layer type \(full_attention\)"),
    ],
)
def test_bad_parameters_get_one_sentence(raw, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        RopeParameters.from_config(raw, 2048)
