"""convert(): names, shapes, row order, dtypes, config.json, and that a failure leaves nothing behind."""

from __future__ import annotations

import builtins
import json
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import ml_dtypes  # noqa: F401  (teaches safetensors bfloat16)
import numpy as np
import pytest
from click.testing import CliRunner
from gguf.quants import dequantize, quantize
from safetensors import safe_open

from unisparse_np.cli import main
from unisparse_np.errors import BackendUnavailable, CheckpointError, InvalidInput
from unisparse_np.model import gguf as converter
from unisparse_np.model import gguf_tensors
from unisparse_np.model.gguf_metadata import llama3_frequency_divisors
from unisparse_np.model.gguf_tensors import restore_row_order

from .gguf_files import BOS, EOS, TOKENS, TinyModel, interleaved_order

KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


def convert(tmp_path: Path, model: TinyModel, **options) -> Path:
    converter.convert(model.write(tmp_path / "tiny.gguf"), tmp_path / "out", **options)
    return tmp_path / "out"


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


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


def spoil(**values):
    """A change of metadata values; `None` removes one. `__` stands for the dot."""

    def change(model: TinyModel) -> None:
        for name, value in values.items():
            key = name.replace("__", ".")
            if value is None:
                del model.values[key]
            else:
                model.values[key] = value

    return change


def put(name: str, weights: np.ndarray):
    return lambda model: model.tensors.update({name: weights.astype(np.float32)})


def raw(name: str, data: np.ndarray, kind: str):
    def change(model: TinyModel) -> None:
        model.tensors.pop(name, None)
        model.raw[name] = (data, kind)

    return change


def in_place(name: str, value: float):
    def change(model: TinyModel) -> None:
        model.tensors[name].flat[5] = value

    return change


# How each file is spoilt, and what the one sentence must hold.
BROKEN = {
    "experts": (spoil(llama__expert_count=8), ["llama.expert_count is 8", "only 0"]),
    "sliding window": (spoil(llama__attention__sliding_window=4096), ["sliding_window is 4096", "only 0"]),
    "not causal": (spoil(llama__attention__causal=False), ["attention.causal is False", "only True"]),
    "scaled logits": (spoil(llama__logit_scale=0.25), ["logit_scale is 0.25"]),
    "split": (spoil(split__count=3), ["one of 3 parts", "gguf-split --merge"]),
    "no layers": (spoil(llama__block_count=0), ["block_count is 0", "at least 1"]),
    "a billion layers": (spoil(llama__block_count=10**9), ["1000000000 layers", "damaged"]),
    "layer count is text": (spoil(llama__block_count="two"), ["block_count is 'two'", "whole number"]),
    "no context length": (spoil(llama__context_length=None), ["has no llama.context_length"]),
    "no eps": (spoil(llama__attention__layer_norm_rms_epsilon=None), ["has no llama.attention.layer_norm_rms_epsilon"]),
    "eps is text": (spoil(llama__attention__layer_norm_rms_epsilon="small"), ["'small'", "of type float"]),
    "eps is 0": (spoil(llama__attention__layer_norm_rms_epsilon=0.0), ["epsilon is 0.0", "above 0"]),
    "theta is NaN": (spoil(llama__rope__freq_base=float("nan")), ["freq_base is nan", "above 0"]),
    "layers differ": (spoil(llama__feed_forward_length=[96, 128]), ["differs between layers ([96, 128])"]),
    "heads do not divide": (spoil(llama__attention__head_count_kv=3), ["4 query heads do not divide among 3 key heads"]),
    "no head_dim": (
        spoil(llama__attention__key_length=None, llama__attention__head_count=3),
        ["64 does not divide into 3 heads"],
    ),
    "value_length differs": (spoil(llama__attention__value_length=16), ["value_length is 16", "head_dim of 32"]),
    "partial rotary": (spoil(llama__rope__dimension_count=16), ["rope.dimension_count is 16", "head_dim of 32"]),
    "longrope": (spoil(llama__rope__scaling__type="longrope", llama__rope__scaling__factor=2.0), ["'longrope'", "linear, yarn"]),
    "yarn without original": (spoil(llama__rope__scaling__type="yarn", llama__rope__scaling__factor=2.0), ["original_context_length"]),
    "scaling below 1": (spoil(llama__rope__scaling__type="linear", llama__rope__scaling__factor=0.5), ["factor is 0.5", "at least 1"]),
    "yarn with another magnitude": (spoil(llama__rope__scaling__attn_factor=0.5), ["attn_factor is 0.5"]),
    "wrong frequency table": (put("rope_freqs.weight", np.linspace(1, 9, 16)), ["follows no Llama 3 rule"]),
    "short frequency table": (put("rope_freqs.weight", np.ones(3)), ["shape [3]", "needs 16"]),
    "missing tensor": (lambda model: model.tensors.pop("blk.1.ffn_up.weight"), ["lacks tensor blk.1.ffn_up.weight"]),
    "no embedding": (lambda model: model.tensors.pop("token_embd.weight"), ["no tensor token_embd.weight"]),
    "unknown tensor": (put("blk.0.ffn_gate_exps.weight", np.ones((4, 32))), ["has tensor blk.0.ffn_gate_exps.weight", "unknown"]),
    "bias on q alone": (put("blk.0.attn_q.bias", np.ones(128)), ["lacks tensors", "blk.0.attn_k.bias"]),
    "wrong shape": (put("blk.0.attn_v.weight", np.ones((32, 64))), ["attn_v.weight has shape [32, 64]", "[64, 64]"]),
    "NaN": (in_place("blk.1.ffn_down.weight", np.nan), ["blk.1.ffn_down.weight holds 1 numbers that are NaN"]),
    "infinity": (in_place("output_norm.weight", np.inf), ["output_norm.weight holds 1 numbers"]),
    "unknown type": (raw("output_norm.weight", np.ones(64), "F64"), ["output_norm.weight is of type F64", "another quantisation"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_one_sentence(tmp_path, name):
    spoiler, expected = BROKEN[name]
    model = TinyModel()
    spoiler(model)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path, model)
    message = str(caught.value)
    assert "tiny.gguf" in message and "\n" not in message
    for part in expected:
        assert part in message
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "mamba"])
def test_other_architectures_are_refused(tmp_path, architecture):
    with pytest.raises(CheckpointError, match=f"architecture is '{architecture}', but only llama, qwen2, qwen3"):
        convert(tmp_path, TinyModel(architecture))


def test_numbers_too_large_for_float16(tmp_path):
    model = TinyModel(kind="Q8_0")
    in_place("blk.0.ffn_norm.weight", 1e6)(model)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_norm.weight holds 1e\+06, too large for float16; convert with --dtype bfloat16"):
        convert(tmp_path, model)
    assert not (tmp_path / "out").exists()
    convert(tmp_path, model, dtype="bfloat16")


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = TinyModel(kind="Q8_0").write(tmp_path / "tiny.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 4, 8, 20, *range(24, len(whole) - 64, len(whole) // 40), len(whole) - 64]:
        cut.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut.gguf is not a complete GGUF file \(.+\); download it again"):
            converter.convert(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_bytes_never_escape_as_another_error(tmp_path):
    whole = bytearray(TinyModel(kind="Q8_0").write(tmp_path / "tiny.gguf").read_bytes())
    rng = np.random.default_rng(5)
    refused = 0
    for trial in range(60):
        damaged = bytearray(whole)
        for position in rng.integers(0, 2500, size=4):  # within the metadata
            damaged[position] = rng.integers(256)
        (tmp_path / "bad.gguf").write_bytes(damaged)
        try:
            converter.convert(tmp_path / "bad.gguf", tmp_path / f"out{trial}")
        except CheckpointError:
            refused += 1
            assert not (tmp_path / f"out{trial}").exists()
    assert refused > 30


@pytest.mark.parametrize("content", [b"", b"GGML" + bytes(100), b"not a model at all, but text that goes on for a while"])
def test_files_that_are_no_gguf(tmp_path, content):
    (tmp_path / "other.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match="is not a complete GGUF file"):
        converter.convert(tmp_path / "other.gguf", tmp_path / "out")


def test_paths_are_checked_before_reading(tmp_path):
    with pytest.raises(InvalidInput, match="is not there; give the path"):
        converter.convert(tmp_path / "absent.gguf", tmp_path / "out")
    with pytest.raises(InvalidInput, match="is a directory; give the path"):
        converter.convert(tmp_path, tmp_path / "out")
    source = tmp_path / "empty.gguf"
    source.touch()
    with pytest.raises(InvalidInput, match="is a file; give the name of a new folder"):
        converter.convert(source, source)
    with pytest.raises(InvalidInput, match=r"cannot be made, since .*empty.gguf is a file"):
        converter.convert(source, source / "deeper" / "out")
    with pytest.raises(InvalidInput, match=r"cannot be used .*; give another path"):
        converter.convert(source, tmp_path / ("n" * 300))
    with pytest.raises(InvalidInput, match="dtype 'int8' is unknown; give auto"):
        converter.convert(source, tmp_path / "out", dtype="int8")


def test_an_existing_folder_is_replaced_only_with_force_and_only_if_converted(tmp_path):
    folder = convert(tmp_path, TinyModel())
    before = (folder / "model.safetensors").read_bytes()
    with pytest.raises(InvalidInput, match="exists; give the name of a new folder, or --force"):
        convert(tmp_path, TinyModel(kind="Q8_0"))
    (folder / "unisparse.json").write_text("{}")
    with pytest.raises(InvalidInput, match=r"also holds unisparse\.json, which convert did not write"):
        convert(tmp_path, TinyModel(kind="Q8_0"), force=True)
    assert (folder / "model.safetensors").read_bytes() == before
    (folder / "unisparse.json").unlink()
    convert(tmp_path, TinyModel(kind="Q8_0"), force=True)
    assert read_config(folder)["torch_dtype"] == "float16"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_failure_keeps_the_folder_that_was_to_be_replaced(tmp_path):
    folder = convert(tmp_path, TinyModel())
    before = (folder / "model.safetensors").read_bytes()
    broken = TinyModel()
    in_place("output.weight", np.nan)(broken)
    with pytest.raises(CheckpointError):
        convert(tmp_path, broken, force=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_a_last_step_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder = convert(tmp_path, TinyModel())
    before = (folder / "model.safetensors").read_bytes()
    rename = Path.rename

    def refuse_the_new_folder(path: Path, target: Path) -> Path:
        if path.name.endswith(".partial"):
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new_folder)
    with pytest.raises(CheckpointError, match=r"failed \(Permission denied\), nothing was kept"):
        convert(tmp_path, TinyModel(kind="Q8_0"), force=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_missing_folders_above_are_made(tmp_path):
    converter.convert(TinyModel().write(tmp_path / "tiny.gguf"), tmp_path / "a" / "b" / "out")
    assert sorted(path.name for path in (tmp_path / "a" / "b" / "out").iterdir()) == sorted(converter.FILES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "tiny.gguf"]


def test_too_little_room_is_noticed_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CheckpointError, match=r"out needs .* MB but .* has 0 MB free; free some space"):
        convert(tmp_path, TinyModel())
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    """The operating system itself refuses the write: a limit on file sizes, half of what the weights need."""
    source = TinyModel().write(tmp_path / "tiny.gguf")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (source.stat().st_size // 2, source.stat().st_size // 2))

    command = [sys.executable, "-m", "unisparse_np", "convert", str(source), str(tmp_path / "out")]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"Error: Writing {tmp_path / 'out'} failed (File too large), nothing was kept")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_the_missing_package_is_named(tmp_path, monkeypatch):
    source = TinyModel().write(tmp_path / "tiny.gguf")
    real_import = builtins.__import__

    def without_gguf(name, *args, **kwargs):
        if name == "gguf":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_gguf)
    with pytest.raises(BackendUnavailable, match=r"pip install 'unisparse-np\[gguf\]'"):
        converter.convert(source, tmp_path / "out")


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
