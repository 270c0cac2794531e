"""The whole forward pass against transformers (stored logits), and against itself in other chunks and precisions."""

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest

from tests.llama_checkpoints import CASES, load_case, write_checkpoint
from unisparse_np import BackendUnavailable, CheckpointError, InvalidInput, UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.llama import Llama
from unisparse_np.model.weights import load_weights

SMALL_BLOCKS = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=0.6)
COARSE = UniSparseConfig(block_size=16, q_compress=4, k_compress=2, top_p=0.5, row_threshold=0.4, top_p_compress=8)


def open_model(folder: Path, dtype: str = "float32", max_context: int | None = None, **changed: object) -> Llama:
    config = dataclasses.replace(ModelConfig.from_folder(folder), **changed)
    backend = load_backend("reference")
    return Llama(config, load_weights(folder, config, backend.layers, dtype), backend, max_context)


@pytest.fixture
def make_model(tmp_path):
    def make(name: str, **options: object) -> Llama:
        case = load_case(name)
        write_checkpoint(tmp_path, case.config, case.tensors, case.dtype, case.shards)
        return open_model(tmp_path, max_context=len(case.token_ids), **options)

    return make


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


# ---- against transformers ----
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_transformers(name, make_model):
    case = load_case(name)
    logits = make_model(name).logits(case.token_ids.tolist())
    assert logits.dtype == np.float32
    assert relative_error(logits, case.logits) < 1e-4


def test_every_supported_kind_is_among_the_cases():
    configs = [load_case(name).config for name in CASES]
    assert {config["model_type"] for config in configs} == {"llama", "mistral", "qwen2", "qwen3"}
    assert any("rope_parameters" in config for config in configs) and any("rope_theta" in config for config in configs)
    rules = {(config.get("rope_parameters") or config.get("rope_scaling") or {}).get("rope_type", "default") for config in configs}
    assert rules == {"default", "linear", "dynamic", "llama3", "yarn"}
    assert {load_case(name).dtype for name in CASES} == {"float32", "float16", "bfloat16"}
    assert any(load_case(name).shards > 1 for name in CASES)


# A wrong value in any of these must show in the logits, or the comparison above would prove nothing about it.
@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llama_llama3_transformers4", "low_freq_factor", 2.0),
        ("llama_llama3_transformers5", "original_max_position_embeddings", 64.0),
        ("llama_yarn_transformers4", "factor", 3.0),
        ("llama_yarn_mscale_transformers5", "beta_slow", 4.0),
        ("llama_yarn_mscale_transformers5", "mscale", 1.0),
        ("llama_yarn_attention_factor_transformers5", "truncate", True),
        ("llama_dynamic_beyond_transformers5", "factor", 3.0),
        ("qwen2_transformers4", "rope_theta", 5e5),
    ],
)
def test_the_comparison_notices_a_wrong_rotary_parameter(name, field, value, make_model):
    case = load_case(name)
    model = make_model(name)
    model.config = dataclasses.replace(model.config, rope_parameters=dataclasses.replace(model.config.rope_parameters, **{field: value}))
    assert relative_error(model.logits(case.token_ids.tolist()), case.logits) > 1e-3


# ---- against itself ----
@pytest.mark.parametrize("held", ["float16", "bfloat16"])
def test_weights_held_in_their_own_16_bits_give_the_same_logits(held, make_model):
    name = {"float16": "llama_sharded_float16_transformers5", "bfloat16": "llama_tied_bfloat16_transformers5"}[held]
    case = load_case(name)
    assert relative_error(make_model(name, dtype=held).logits(case.token_ids.tolist()), case.logits) < 1e-4


def test_one_row_tile_of_a_widened_weight_is_as_good_as_another(make_model, monkeypatch):
    name = "llama_sharded_float16_transformers5"
    ids = load_case(name).token_ids.tolist()
    model = make_model(name, dtype="float16")
    whole = model.logits(ids)
    monkeypatch.setattr(model.backend.layers, "WIDEN_AT_ONCE", 700)  # 10 rows of 64
    assert relative_error(model.logits(ids), whole) < 1e-6


def test_float64_computes_in_float64(make_model):
    name = "qwen3_transformers5"
    case = load_case(name)
    logits = make_model(name, dtype="float64").logits(case.token_ids.tolist())
    assert logits.dtype == np.float64
    assert 0 < relative_error(logits, case.logits) < 1e-5


def test_prefill_gives_the_last_position_and_steps_go_on_from_it(make_model):
    name = "llama_transformers5"
    ids = load_case(name).token_ids.tolist()
    model = make_model(name, dtype="float64")
    whole = model.logits(ids)
    cache = model.new_cache(len(ids))
    np.testing.assert_allclose(model.prefill(ids[:40], cache, "dense"), whole[39], rtol=0, atol=1e-12)
    for position in range(40, len(ids)):
        np.testing.assert_allclose(model.step(ids[position], cache, "dense"), whole[position], rtol=0, atol=1e-12)
    assert cache.length == len(ids)


def test_a_prompt_in_two_prefills_equals_one(make_model):
    name = "qwen2_transformers5"
    ids = load_case(name).token_ids.tolist()
    model = make_model(name, dtype="float64")
    cache = model.new_cache(len(ids), SMALL_BLOCKS)
    model.prefill(ids[:32], cache, SMALL_BLOCKS)
    other = model.new_cache(len(ids), SMALL_BLOCKS)
    np.testing.assert_allclose(model.prefill(ids[32:], cache, SMALL_BLOCKS), model.prefill(ids, other, SMALL_BLOCKS), rtol=0, atol=1e-12)


@pytest.fixture
def recorded_masks(monkeypatch):
    """Block masks of every attention call, [Hq, Nq, Nk], in order."""
    masks: list[np.ndarray] = []
    from unisparse_np.model import forward

    attend = forward.attend

    def recording(*args, **kwargs):
        out, trace = attend(*args, **kwargs)
        masks.append(trace.mask)
        return out, trace

    monkeypatch.setattr(forward, "attend", recording)
    return masks


def joined(masks: list[np.ndarray], layers: int, layer: int) -> np.ndarray:
    """One layer's masks of all chunks as one: later chunks see more key blocks."""
    chunks = masks[layer::layers]
    width = chunks[-1].shape[2]
    return np.concatenate([np.pad(mask, ((0, 0), (0, 0), (0, width - mask.shape[2]))) for mask in chunks], axis=1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 1e-4)])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("llama_llama3_transformers5", SMALL_BLOCKS), ("llama_dynamic_beyond_transformers4", SMALL_BLOCKS),
        ("llama_yarn_transformers5", SMALL_BLOCKS), ("llama_llama3_transformers5", COARSE),
    ],
)  # fmt: skip
def test_chunks_change_no_block_decision_and_no_logit(name, attention, dtype, tolerance, make_model, recorded_masks):
    ids = load_case(name).token_ids.tolist()
    model = make_model(name, dtype=dtype)
    whole = model.logits(ids, attention, chunk_size=96)
    whole_masks = [joined(recorded_masks, 2, layer) for layer in range(2)]
    assert not all(mask.sum() == np.tril(np.ones(mask.shape[1:])).sum() * len(mask) for mask in whole_masks)  # something is dropped
    for chunk_size in (16, 48):
        recorded_masks.clear()
        assert relative_error(model.logits(ids, attention, chunk_size=chunk_size), whole) < tolerance
        if dtype == "float64":
            for layer in range(2):
                np.testing.assert_array_equal(joined(recorded_masks, 2, layer), whole_masks[layer])


def test_keeping_every_block_is_dense_attention(make_model):
    name = "mistral_transformers5"
    ids = load_case(name).token_ids.tolist()
    model = make_model(name, dtype="float64")
    every_block = UniSparseConfig(block_size=16, q_compress=4, k_compress=4, top_p=1.0)
    np.testing.assert_allclose(model.logits(ids, every_block), model.logits(ids), rtol=0, atol=1e-12)
    mixed = model.logits(ids, ["dense", every_block])
    np.testing.assert_allclose(mixed, model.logits(ids), rtol=0, atol=1e-12)


def test_densities_are_of_the_prefill_one_a_layer(make_model):
    name = "llama_llama3_transformers5"
    ids = load_case(name).token_ids.tolist()
    model = make_model(name)
    model.max_context = len(ids) + 1
    cache = model.new_cache(len(ids) + 1, SMALL_BLOCKS)
    assert model.layer_densities(cache) == []
    seen: list[tuple[int, int, float]] = []
    model.prefill(ids, cache, [SMALL_BLOCKS, "dense"], chunk_size=32, progress=lambda *update: seen.append(update))
    first, second = model.layer_densities(cache)
    assert 0 < first < 1 and second == 1
    assert [(done, total) for done, total, _ in seen] == [(32, 80), (64, 80), (80, 80)]
    assert seen[-1][2] == pytest.approx((first + second) / 2)
    model.step(3, cache, "dense")
    assert model.layer_densities(cache) == [first, second]


def test_a_chunk_size_is_rounded_up_to_whole_blocks_and_says_so(make_model):
    model = make_model("llama_transformers5")
    with pytest.warns(UserWarning, match="chunk_size 20 is rounded up to 32, a multiple of the block size 16"):
        model.logits(list(range(40)), SMALL_BLOCKS, chunk_size=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.logits(list(range(40)), SMALL_BLOCKS, chunk_size=32)
        model.logits(list(range(40)), "dense", chunk_size=7)


def test_not_finite_numbers_are_reported_where_they_first_appear(make_model, tmp_path):
    name = "llama_transformers5"
    ids = load_case(name).token_ids.tolist()
    make_model(name)
    config = ModelConfig.from_folder(tmp_path)
    backend = load_backend("reference")
    model = Llama(config, load_weights(tmp_path, config, backend.layers, "float32"), backend, check_finite=True)
    cache = model.new_cache(len(ids))
    model.prefill(ids[:20], cache, "dense")
    model.weights.layers[1].down[7, 7] = np.inf
    with pytest.raises(CheckpointError, match="first appear after the MLP of layer 1, at token 20 of the text"):
        model.prefill(ids[20:], cache, "dense")
    model.weights.embedding[3] = np.nan
    with pytest.raises(CheckpointError, match="first appear after the embedding, at token 20"):
        model.step(3, cache, "dense")


def test_a_backend_s_decoder_takes_the_steps_and_lives_in_the_cache(make_model):
    """Where a backend makes decoders, each attention gets one a cache, unless it has none for these shapes."""
    made = []

    class Decoder:
        def __init__(self, config, weights, cache, configs, ranks):
            assert ranks.size == 1
            made.append(configs)
            self.cache = cache

        def step(self, token_id):
            for layer in range(2):
                for room in self.cache.room(layer, 1):
                    room[...] = 0
            self.cache.advance(1)
            return np.full(4, token_id, np.float32)

    model = make_model("llama_transformers5")
    model._new_decoder = lambda *arguments: Decoder(*arguments) if arguments[3][0] == "dense" else None
    cache = model.new_cache(20, SMALL_BLOCKS)
    model.prefill([1, 2, 3], cache, SMALL_BLOCKS)
    assert model.step(7, cache, "dense")[0] == model.step(7, cache, "dense")[0] == 7
    assert model.step(7, cache, SMALL_BLOCKS).shape == (96,)  # layer by layer
    assert (len(made), cache.length) == (1, 6)
    cache.release()
    assert cache.decoders == {}


@pytest.mark.parametrize("in_its_own_words", [False, True])
def test_memory_that_runs_out_is_one_sentence(make_model, monkeypatch, in_its_own_words):
    model = make_model("llama_transformers5")

    def no_memory(*_):
        error = MemoryError("Unable to allocate 3 GiB")
        if in_its_own_words:
            raise BackendUnavailable("no room for 3 queries") from error
        raise error

    monkeypatch.setattr(model.backend.layers, "swiglu", no_memory)
    with pytest.raises(InvalidInput, match=r"memory ran out while 3 tokens were read at once \(Unable to allocate 3 GiB\): give a smaller"):
        model.prefill([1, 2, 3], model.new_cache(3), "dense")


# ---- what is refused, before any work ----
def test_positions_past_the_limit_name_the_flag(tmp_path):
    case = load_case("llama_transformers5")
    write_checkpoint(tmp_path, case.config, case.tensors)
    model = open_model(tmp_path)
    with pytest.raises(InvalidInput, match=r"129 tokens are more than the 128 positions .* --max-context"):
        model.new_cache(129)
    with pytest.raises(InvalidInput, match="--max-context"):
        model.logits([1] * 129)
    assert open_model(tmp_path, max_context=129).logits([1] * 129).shape == (129, 96)
    with pytest.raises(InvalidInput, match="max_context=0 leaves no room"):
        open_model(tmp_path, max_context=0)


@pytest.mark.parametrize("name", ["mistral_inside_window_transformers5", "qwen2_tied_inside_window_transformers4"])
def test_a_sequence_longer_than_the_sliding_window_is_refused(name, make_model):
    model = make_model(name)
    model.max_context = 128
    assert model.logits([1] * 64).shape == (64, 96)
    with pytest.raises(InvalidInput, match="65 tokens are more than this model's sliding window of 64"):
        model.logits([1] * 65)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.logits([]), "the prompt has no tokens"),
        (lambda m: m.logits([96]), "token id 96 is outside this model's vocabulary of 96"),
        (lambda m: m.logits([-1]), "token id -1 is outside"),
        (lambda m: m.logits([[1, 2]]), r"token ids of shape \(1, 2\): give those of one prompt"),
        (lambda m: m.logits([1, 2.5]), "token id 2.5 is not a whole number"),
        (lambda m: m.logits([1], attention="sparse"), "attention='sparse' is neither"),
        (lambda m: m.logits([1], attention=["dense"]), "attention lists 1 configs, but the model has 2 layers"),
        (lambda m: m.logits([1], chunk_size=0), "chunk_size=0 is no chunk"),
        (lambda m: m.new_cache(0), "capacity=0 holds no token"),
        (lambda m: m.prefill([1, 2, 3], m.new_cache(2), "dense"), "3 tokens do not fit this cache of 2"),
    ],
)
def test_bad_calls_get_one_sentence(call, sentence, make_model):
    with pytest.raises(InvalidInput, match=sentence):
        call(make_model("llama_transformers4"))
