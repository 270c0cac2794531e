"""Checkpoints, whole and broken: everything is checked before the first large allocation, and named."""

import json
import struct
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.llama_checkpoints import load_case, random_tensor, write_checkpoint
from unisparse_np import CheckpointError, InvalidInput
from unisparse_np.attention import load_backend
from unisparse_np.model import weights as weights_module
from unisparse_np.model.config import ModelConfig
from unisparse_np.model.weights import expected_tensors, load_weights

CASE = load_case("llama_transformers5")
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "model", CASE.config, CASE.tensors)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "sharded", CASE.config, CASE.tensors, shards=3)


def read(folder: Path, dtype: str = "auto") -> weights_module.Weights:
    return load_weights(folder, ModelConfig.from_folder(folder), load_backend("reference").layers, dtype)


def rewrite(folder: Path, **changed: np.ndarray | None) -> None:
    """Replace (or with None remove) tensors of model.safetensors."""
    tensors = {**load_file(folder / "model.safetensors"), **changed}
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / "model.safetensors")


# ---- whole ----
def test_names_are_those_of_transformers():
    for name in ("llama_mha_biases_transformers4", "mistral_transformers5", "qwen2_transformers5", "qwen3_bias_head_dim_transformers5"):
        case = load_case(name)
        expected = {key: list(slot.shape) for key, slot in expected_tensors(ModelConfig.from_dict(case.config)).items()}
        assert expected == case.tensors


def test_query_key_value_and_gate_up_are_stacked(folder):
    layer = read(folder).layers[1]
    parts = [random_tensor(name, CASE.tensors[name]) for name in (f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkv")]
    np.testing.assert_array_equal(layer.qkv, np.concatenate(parts))
    parts = [random_tensor(name, CASE.tensors[name]) for name in (f"model.layers.1.mlp.{p}_proj.weight" for p in ("gate", "up"))]
    np.testing.assert_array_equal(layer.gate_up, np.concatenate(parts))


def test_shards_hold_the_same_as_one_file(folder, sharded):
    whole, parts = read(folder), read(sharded)
    np.testing.assert_array_equal(whole.head, parts.head)
    np.testing.assert_array_equal(whole.layers[1].down, parts.layers[1].down)


@pytest.mark.parametrize(
    ("stored", "dtype", "held"),
    [
        ("bfloat16", "auto", ml_dtypes.bfloat16),
        ("float16", "auto", np.float32),
        ("float32", "auto", np.float32),
        ("float16", "float16", np.float16),
        ("float32", "bfloat16", ml_dtypes.bfloat16),
        ("bfloat16", "float64", np.float64),
    ],
)
def test_weights_are_held_as_asked(tmp_path, stored, dtype, held):
    write_checkpoint(tmp_path, CASE.config, CASE.tensors, dtype=stored)
    loaded = read(tmp_path, dtype)
    assert loaded.embedding.dtype == loaded.layers[0].gate_up.dtype == held
    assert loaded.norm.dtype == (np.float64 if dtype == "float64" else np.float32)


def test_a_tied_head_is_the_embedding_itself_and_a_stored_copy_is_tolerated(folder):
    config = {**CASE.config, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = read(folder)
    assert np.shares_memory(loaded.head, loaded.embedding) and loaded.head.shape == loaded.embedding.shape


def test_stored_rotary_frequencies_are_tolerated(folder):
    rewrite(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    read(folder)


def test_progress_counts_bytes_as_held(sharded):
    seen: list[tuple[int, int]] = []
    config = ModelConfig.from_folder(sharded)
    loaded = load_weights(sharded, config, load_backend("reference").layers, "bfloat16", lambda *update: seen.append(update))
    assert len(seen) == len(CASE.tensors)
    done = [update[0] for update in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1]
    fields = [value for part in (loaded, *loaded.layers) for value in vars(part).values() if isinstance(value, np.ndarray)]
    assert seen[-1][1] == sum(array.nbytes for array in fields)


def test_a_tensor_is_read_in_pieces_that_make_the_whole(folder, monkeypatch):
    whole = read(folder, "float16")
    monkeypatch.setattr(weights_module, "PIECE_BYTES", 1000)  # 3 rows of 64
    np.testing.assert_array_equal(read(folder, "float16").layers[0].gate_up, whole.layers[0].gate_up)


def test_weights_that_do_not_fit_a_device_are_refused_before_any_is_read(folder, monkeypatch):
    config, layers = ModelConfig.from_folder(folder), load_backend("reference").layers
    monkeypatch.setattr(layers, "memory", SimpleNamespace(free_bytes=lambda: 1 << 16))
    monkeypatch.setattr(weights_module, "_read", lambda *_: pytest.fail("a tensor was read"))
    with pytest.raises(CheckpointError, match=r"the checkpoint needs 0.0 GiB as float32, and the GPU has 0.0 GiB free: end what else"):
        load_weights(folder, config, layers)


# ---- broken ----
def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def write_header(folder: Path, change) -> None:
    """Let the header say something else about the same bytes."""
    data = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def offsets_beyond_the_file(folder: Path) -> None:
    write_header(folder, lambda header: header[Q_PROJ].update(data_offsets=[0, 1 << 40]))


def shape_larger_than_its_bytes(folder: Path) -> None:
    write_header(folder, lambda header: header[Q_PROJ].update(shape=[1 << 20, 1 << 20]))


def header_longer_than_the_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def empty_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def a_folder_of_that_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@pytest.mark.parametrize(
    "spoil",
    [truncate, offsets_beyond_the_file, shape_larger_than_its_bytes, header_longer_than_the_file, empty_file, a_folder_of_that_name],
)
def test_a_damaged_file_gets_one_sentence(folder, spoil):
    spoil(folder)
    with pytest.raises(CheckpointError, match="is not a whole safetensors file") as caught:
        read(folder)
    assert "\n" not in str(caught.value) and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({Q_PROJ: None}, f"lacks {Q_PROJ}, which a llama model"),
        ({"lm_head.weight": None}, "lacks lm_head.weight"),
        ({"model.layers.2.mlp.up_proj.weight": np.ones((4, 4), np.float32)}, "holds model.layers.2.mlp.up_proj.weight, which"),
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}, "holds model.layers.0.self_attn.q_proj.bias, which"),
        ({Q_PROJ: np.ones((64, 32), np.float32)}, r"has shape \[64, 32\], but config.json makes it \[64, 64\]"),
        ({Q_PROJ: np.ones(64 * 64, np.float32)}, r"has shape \[4096\]"),
        ({Q_PROJ: np.ones((64, 64), np.int8)}, "is stored as I8, but only F32, F16, BF16 are read"),
        ({Q_PROJ: np.ones((64, 64), np.float64)}, "is stored as F64"),
        ({Q_PROJ: np.full((64, 64), np.nan, np.float32)}, f"{Q_PROJ} holds NaN or infinite weights"),
        ({Q_PROJ: np.full((64, 64), -np.inf, np.float16)}, f"{Q_PROJ} holds NaN or infinite weights"),
        ({Q_PROJ: np.full((64, 64), np.nan, ml_dtypes.bfloat16)}, f"{Q_PROJ} holds NaN or infinite weights"),
    ],
)
def test_a_wrong_tensor_is_named(folder, changed, sentence):
    rewrite(folder, **changed)
    with pytest.raises(CheckpointError, match=sentence):
        read(folder)


def test_many_missing_tensors_are_counted(folder):
    rewrite(folder, **{name: None for name in CASE.tensors if ".layers.1." in name})
    with pytest.raises(CheckpointError, match="and 5 more, which a llama model"):
        read(folder)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_weight_that_is_not_finite_is_found_in_every_precision(folder, dtype):
    for bad in (np.nan, np.inf, -np.inf):
        values = random_tensor(Q_PROJ, CASE.tensors[Q_PROJ]).astype({"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype))
        values[3, 5] = bad
        rewrite(folder, **{Q_PROJ: values})
        with pytest.raises(CheckpointError, match=f"{Q_PROJ} holds NaN or infinite weights"):
            read(folder, dtype)


def test_a_weight_beyond_float16_is_refused_rather_than_made_infinite(folder):
    rewrite(folder, **{Q_PROJ: np.full((64, 64), 70000, np.float32)})
    read(folder, "float32")
    with pytest.raises(CheckpointError, match="beyond float16's largest number 65504"):
        read(folder, "float16")


@pytest.mark.parametrize(
    ("index", "sentence"),
    [
        (
            {"weight_map": {Q_PROJ: "model-00009-of-00003.safetensors"}},
            "model-00009-of-00003.safetensors is missing, but the index",
        ),
        ({"weight_map": {Q_PROJ: "../elsewhere.safetensors"}}, "is not a plain file name"),
        ({"weight_map": {Q_PROJ: 7}}, "has no weight_map of tensor names to files"),
        ({}, "has no weight_map"),
        ({"weight_map": {"model.no_such.weight": "model-00001-of-00003.safetensors"}}, "lacks model.no_such.weight, which the index says"),
    ],
)
def test_a_wrong_index_gets_one_sentence(sharded, index, sentence):
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=sentence):
        read(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors is missing"):
        read(sharded)


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        read(folder)


def test_an_unknown_dtype(folder):
    with pytest.raises(InvalidInput, match="dtype='int8' is not known: give auto, float16"):
        read(folder, "int8")


def test_nothing_is_allocated_before_every_tensor_is_checked(folder, monkeypatch):
    rewrite(folder, **{"model.norm.weight": np.ones(3, np.float32)})
    allocated = []
    monkeypatch.setattr(weights_module, "_allocate", lambda *arguments: allocated.append(arguments))
    with pytest.raises(CheckpointError, match=r"model.norm.weight has shape"):
        read(folder)
    assert not allocated
