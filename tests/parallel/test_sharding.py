"""Which part of each tensor a rank reads: the parts make the whole, and uneven splits are refused."""

from dataclasses import replace

import numpy as np
import pytest

from tests.llama_checkpoints import CASES, load_case, write_checkpoint
from unisparse_np import InvalidInput, UniSparseConfig
from unisparse_np.attention import load_backend
from unisparse_np.model import weights as weights_module
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.sharding import Shard, check_split, local_attention, local_config, slice_of, vocabulary_rows
from unisparse_np.model.weights import expected_tensors, load_weights

CONFIG = replace(
    ModelConfig.from_dict(load_case("llama_transformers5").config),
    num_attention_heads=8, num_key_value_heads=4, intermediate_size=96, vocab_size=131, attention_bias=True, attention_output_bias=True,
    mlp_bias=True, tie_word_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_ranks_parts_cover_each_tensor_once(size):
    for name, slot in expected_tensors(CONFIG).items():
        read = np.zeros(slot.shape, dtype=int)
        for rank in range(size):
            index = slice_of(name, slot.shape, Shard(rank, size))
            if index is not None:
                read[index] += 1
        whole_everywhere = "norm" in name or "embed_tokens" in name
        assert (read == (size if whole_everywhere else 1)).all(), name


@pytest.mark.parametrize("size", [2, 4])
def test_the_parts_have_the_shapes_of_the_ranks_own_config(size):
    local = expected_tensors(local_config(CONFIG, size))
    for name, slot in expected_tensors(CONFIG).items():
        for rank in range(size):
            index = slice_of(name, slot.shape, Shard(rank, size))
            if index is not None and name != "lm_head.weight":  # the vocabulary is whole in the config
                assert tuple(part.stop - part.start for part in index) == local[name].shape, name


def test_one_rank_reads_everything_of_every_family():
    for case in map(load_case, CASES):
        for name, slot in expected_tensors(ModelConfig.from_dict(case.config)).items():
            assert slice_of(name, slot.shape, Shard()) == tuple(slice(0, length) for length in slot.shape)


def test_no_index_is_negative_or_open():
    for name, slot in expected_tensors(CONFIG).items():
        for part in slice_of(name, slot.shape, Shard(3, 4)) or ():
            assert 0 <= part.start < part.stop and part.step is None


def test_vocabulary_rows_reach_the_last_token_and_no_further():
    assert [vocabulary_rows(131, Shard(rank, 4)) for rank in range(4)] == [slice(0, 33), slice(33, 66), slice(66, 99), slice(99, 131)]
    assert vocabulary_rows(4, Shard(2, 3)) == slice(4, 4)


@pytest.mark.parametrize(
    ("changed", "size", "words"),
    [
        ({"num_attention_heads": 9, "num_key_value_heads": 3}, 2, "9 query heads and 3 KV heads in whole groups: use 1, 3 of them"),
        ({"intermediate_size": 97}, 2, "97 MLP columns evenly: use 1 of them"),
        ({}, 8, "4 KV heads in whole groups: use 1, 2, 4 of them, and --context-parallel"),
    ],
)
def test_uneven_splits_are_refused_with_the_sizes_that_work(changed, size, words):
    with pytest.raises(InvalidInput, match=words):
        check_split(replace(CONFIG, **{"intermediate_size": 96, **changed}), size)


def test_composite_heads_stay_within_a_rank():
    check_split(CONFIG, 2, [UniSparseConfig(head_compress=4)])
    with pytest.raises(InvalidInput, match=r"composite heads of 4 \(head_compress\): use 1, 2 of them"):
        check_split(CONFIG, 4, ["dense", UniSparseConfig(head_compress=4)])


def test_values_per_composite_head_follow_their_heads():
    config = UniSparseConfig(head_compress=2, top_p=(0.6, 0.7, 0.8, 0.9), row_threshold=0.1)
    parts = [local_attention(config, Shard(rank, 2)) for rank in range(2)]
    assert [part.top_p for part in parts] == [(0.6, 0.7), (0.8, 0.9)]
    assert all(part.row_threshold == 0.1 and part.head_compress == 2 for part in parts)
    plain = UniSparseConfig()
    assert local_attention(plain, Shard(1, 2)) is plain and local_attention("dense", Shard(1, 2)) == "dense"


@pytest.fixture(params=["llama_mha_biases_transformers4", "llama_tied_bfloat16_transformers5", "qwen3_bias_head_dim_transformers5"])
def folder(request, tmp_path):
    case = load_case(request.param)
    return write_checkpoint(tmp_path, case.config, case.tensors, case.dtype)


def test_ranks_hold_slices_of_the_whole_weights(folder):
    config, layers = ModelConfig.from_folder(folder), load_backend("reference").layers
    whole = load_weights(folder, config, layers)
    parts = [load_weights(folder, config, layers, shard=Shard(rank, 2)) for rank in range(2)]
    np.testing.assert_array_equal(np.concatenate([part.head for part in parts]), whole.head)
    for index, layer in enumerate(whole.layers):
        left, right = (part.layers[index] for part in parts)
        np.testing.assert_array_equal(np.concatenate([left.output, right.output], axis=1), layer.output)
        np.testing.assert_array_equal(np.concatenate([left.down, right.down], axis=1), layer.down)
        for field, sizes in (
            ("qkv", (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)),
            ("gate_up", (1, 1)),
        ):
            for suffix in ("", "_bias"):
                stacked, own = getattr(layer, field + suffix), [getattr(part, field + suffix) for part in (left, right)]
                if stacked is None:
                    assert own == [None, None]
                    continue
                edges = np.cumsum(sizes)[:-1] * len(stacked) // sum(sizes)
                pieces = [np.split(part, edges // 2) for part in own]
                np.testing.assert_array_equal(np.concatenate([half for pair in zip(*pieces, strict=True) for half in pair]), stacked)
        for bias in ("output_bias", "down_bias"):
            np.testing.assert_array_equal(getattr(left, bias), getattr(layer, bias))
            assert getattr(right, bias) is None


def test_no_more_than_the_part_is_read(folder, monkeypatch):
    config, read, real = ModelConfig.from_folder(folder), [], weights_module._read
    monkeypatch.setattr(
        weights_module, "_read", lambda *arguments: (read.append(tensor) or (name, tensor) for name, tensor in real(*arguments))
    )
    load_weights(folder, config, load_backend("reference").layers, shard=Shard(1, 2))
    whole = sum(np.prod(slot.shape) for slot in expected_tensors(config).values())
    on_all_ranks = sum(
        np.prod(slot.shape) for name, slot in expected_tensors(config).items() if "norm" in name or "embed_tokens" in name
    )  # biases of o and down, which rank 0 adds, make it less than half of the rest
    for tensor in read:  # none is a view of something larger
        assert not isinstance(tensor.base, np.ndarray) or tensor.base.nbytes == tensor.nbytes
    assert on_all_ranks < sum(tensor.size for tensor in read) <= on_all_ranks + (whole - on_all_ranks) / 2
