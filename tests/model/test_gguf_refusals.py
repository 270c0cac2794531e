"""What convert() refuses, in one sentence and with nothing left behind: broken files, wrong paths, a full disk."""

from __future__ import annotations

import builtins
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from unisparse_np.errors import BackendUnavailable, CheckpointError, InvalidInput
from unisparse_np.model import gguf as converter

from .gguf_files import TinyModel, convert, read_config


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


def test_the_other_byte_order_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="other byte order"):
        converter.convert(TinyModel().write(tmp_path / "tiny.gguf", gguf.GGUFEndian.BIG), tmp_path / "out")


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
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InvalidInput, match=r"cannot be used|is a file"):
        converter.convert(source, tmp_path / "loop" / "out")
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
