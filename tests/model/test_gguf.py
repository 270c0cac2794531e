"""convert(): names, shapes, row order, dtypes and config.json."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (teaches safetensors bfloat16)
import numpy as np
import pytest
from click.testing import CliRunner
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from unisparse_np.cli import main
from unisparse_np.model import gguf as converter
from unisparse_np.model import gguf_tensors
from unisparse_np.model.gguf_metadata import llama3_frequency_divisors
from unisparse_np.model.gguf_tensors import restore_row_order

from .gguf_files import BOS, EOS, TOKENS, TinyModel, convert, interleaved_order, read_config

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def through(weights: np.ndarray, kind: str) -> np.ndarray:
    """What is left of the weights after quantising them to `kind`."""
    return dequantize(quantize(weights, gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back_in_its_own_order(tmp_path, architecture, kind):
    model = TinyModel(architecture, kind)
    tensors = read_tensors(convert(tmp_path, model, dtype="float32"))
    assert set(tensors) == set(model.originals)
    for name, original in model.originals.items():
        expected = through(original, kind) if original.ndim > 1 else original  # quantisation works within rows: order does not matter
        np.testing.assert_array_equal(tensors[name], expected, err_msg=name)


def test_biases_of_llama_are_reordered_too(tmp_path):
    model = TinyModel(biased=True)
    folder = convert(tmp_path, model, dtype="float32")
    tensors = read_tensors(folder)
    assert set(tensors) == set(model.originals) and "model.layers.1.self_attn.k_proj.bias" in tensors
    for name, original in model.originals.items():
        np.testing.assert_array_equal(tensors[name], original, err_msg=name)
    assert read_config(folder)["attention_bias"] is True and read_config(folder)["mlp_bias"] is True


def test_reordered_rows_turn_neighbouring_pairs_into_halves():
    """Scores with llama.cpp's rotation of (2i, 2i + 1) equal scores of the restored rows with rotation of (i, i + d/2)."""
    rng = np.random.default_rng(3)
    head_dim, position_q, position_k = 8, 5.0, 2.0
    angles = 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim)  # [d / 2]

    def rotate(vector, first, second, position):
        turned = vector.copy()
        turned[first] = vector[first] * np.cos(position * angles) - vector[second] * np.sin(position * angles)
        turned[second] = vector[first] * np.sin(position * angles) + vector[second] * np.cos(position * angles)
        return turned

    q, k = rng.standard_normal((2, head_dim))  # as rows in llama.cpp's order give them
    even, odd, low, high = slice(0, None, 2), slice(1, None, 2), slice(0, head_dim // 2), slice(head_dim // 2, None)
    neighbours = rotate(q, even, odd, position_q) @ rotate(k, even, odd, position_k)
    restored_q, restored_k = restore_row_order(q, head_dim), restore_row_order(k, head_dim)
    halves = rotate(restored_q, low, high, position_q) @ rotate(restored_k, low, high, position_k)
    np.testing.assert_allclose(halves, neighbours, rtol=1e-12)  # float64, 8 terms
    np.testing.assert_array_equal(q, restored_q[interleaved_order(1, head_dim)])


@pytest.mark.parametrize("layers", [1, 2, 3, 12])
def test_the_weights_begin_at_a_multiple_of_eight(tmp_path, layers):
    """So that a loader can map them as they are, whatever the length of the header."""
    content = (convert(tmp_path, TinyModel(layers=layers)) / "model.safetensors").read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_pieces_smaller_than_a_tensor_give_the_same_file(tmp_path, monkeypatch):
    whole = convert(tmp_path, TinyModel(kind="Q8_0"))
    monkeypatch.setattr(gguf_tensors, "PIECE_ELEMENTS", 100)  # fewer than two rows
    steps: list[tuple[int, int]] = []
    converter.convert(tmp_path / "tiny.gguf", tmp_path / "pieces", progress=lambda done, total: steps.append((done, total)))
    assert (tmp_path / "pieces/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(steps) > 100 and steps == sorted(steps) and steps[-1][0] == steps[-1][1]


def test_quantisation_that_only_llama_cpp_can_write(tmp_path):
    model = TinyModel(hidden=256, num_heads=8, inner=256, kind="F16")
    blocks = np.random.default_rng(0).integers(0, 256, size=(256, 144), dtype=np.uint8)  # Q4_K: 144 bytes for 256 values
    blocks[:, :4] = np.array([0.01, 0.02], dtype=np.float16).view(np.uint8)  # the two scales
    del model.tensors["blk.0.ffn_up.weight"]
    model.raw["blk.0.ffn_up.weight"] = (blocks, "Q4_K")
    tensors = read_tensors(convert(tmp_path, model, dtype="float32"))
    np.testing.assert_array_equal(tensors["model.layers.0.mlp.up_proj.weight"], dequantize(blocks, gguf.GGMLQuantizationType.Q4_K))


@pytest.mark.parametrize(
    ("kind", "requested", "written"),
    [
        ("F32", "auto", "float32"),
        ("F16", "auto", "float16"),
        ("BF16", "auto", "bfloat16"),
        ("Q4_1", "auto", "float16"),
        ("Q4_1", "bfloat16", "bfloat16"),
        ("BF16", "float16", "float16"),
        ("F16", "float32", "float32"),
    ],
)
def test_dtype(tmp_path, kind, requested, written):
    model = TinyModel(kind=kind)
    folder = convert(tmp_path, model, dtype=requested)
    assert read_config(folder)["torch_dtype"] == written
    for name, weights in read_tensors(folder).items():
        original = model.originals[name]
        assert weights.dtype == np.dtype(written)
        np.testing.assert_array_equal(weights, (through(original, kind) if original.ndim > 1 else original).astype(written), err_msg=name)


def test_config_fields(tmp_path):
    assert read_config(convert(tmp_path, TinyModel())) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(TOKENS),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def test_fields_that_a_file_may_leave_out(tmp_path):
    model = TinyModel(num_kv_heads=4, head_dim=16, tied=True)
    for key in ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.freq_base"):
        del model.values[f"llama.{key}"]
    config = read_config(convert(tmp_path, model))
    assert (config["num_key_value_heads"], config["head_dim"], config["rope_theta"]) == (4, 16, 10000.0)
    assert config["tie_word_embeddings"] is True


def test_equal_counts_of_all_layers_are_one_count(tmp_path):
    model = TinyModel()
    model.values |= {"llama.attention.head_count_kv": [2, 2], "llama.feed_forward_length": [96, 96]}
    assert read_config(convert(tmp_path, model))["num_key_value_heads"] == 2


@pytest.mark.parametrize(
    ("values", "scaling"),
    [
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 2.5}, {"rope_type": "linear", "factor": 2.5}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0},
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_rope_scaling(tmp_path, architecture, values, scaling):
    model = TinyModel(architecture)
    model.values |= {f"{architecture}.{key}": value for key, value in values.items()}
    assert read_config(convert(tmp_path, model))["rope_scaling"] == scaling


def llama3_table(factor: float, theta: float = 500000.0, head_dim: int = 64) -> np.ndarray:
    """rope_freqs.weight as Llama 3.1 defines it, one frequency at a time."""
    table = []
    for index in range(head_dim // 2):
        wavelength = 2 * np.pi * theta ** (2 * index / head_dim)
        if wavelength < 8192 / 4:
            table.append(1.0)
        elif wavelength > 8192:
            table.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / 3
            table.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(table, dtype=np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies_become_rope_scaling(tmp_path, factor):
    model = TinyModel(head_dim=64)
    model.values["llama.rope.freq_base"] = 500000.0
    model.raw["rope_freqs.weight"] = (llama3_table(factor), "F32")
    assert read_config(convert(tmp_path, model))["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    np.testing.assert_allclose(llama3_frequency_divisors(500000.0, 64, factor, 8192), llama3_table(factor), rtol=1e-6)  # float32 table


def test_frequencies_of_one_are_no_scaling(tmp_path):
    model = TinyModel()
    model.raw["rope_freqs.weight"] = (np.ones(16, dtype=np.float32), "F32")
    assert read_config(convert(tmp_path, model))["rope_scaling"] is None


def test_command_line(tmp_path):
    source = TinyModel(kind="Q4_1").write(tmp_path / "tiny.gguf")
    run = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out")])
    assert run.exit_code == 0, run.output
    assert run.stdout.startswith(f"{tmp_path / 'out'}: llama, 0.") and "float16" in run.stdout and run.stderr == ""
    again = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out")])
    assert again.exit_code == 2 and "--force" in again.stderr
    as_json = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "out"), "--force", "--json", "--dtype", "bfloat16"])
    result = json.loads(as_json.stdout)
    assert result["dtype"] == "bfloat16" and result["tokenizer"] == "smollm"
    assert result["weight_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    source.write_bytes(b"GGUF")
    broken = CliRunner().invoke(main, ["convert", str(source), str(tmp_path / "other")])
    assert broken.exit_code == 1 and broken.stderr.startswith("Error: ")
