"""Broken checkpoints, prompts, flags, arrays and configs: each is refused in one sentence that says what to do instead.

A row says how to provoke the fault, the exit code (or exception), and words that the sentence must hold: the value, and the
rule or the way out. Nothing may be printed on stdout, and nothing on disk may change. (A disk that fills up while
converting is in tests/model/test_gguf_refusals.py.)
"""

import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from unisparse_np import InvalidInput, KeySummary, UniSparseConfig, unisparse_attention
from unisparse_np.cli import main
from unisparse_np.model.gguf import convert

from .model.gguf_files import TinyModel

Spoil = Callable[[Path], None]
WEIGHTS = "model.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
CHECKPOINT, USAGE = 1, 2


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder: 2 layers, 4 query heads, 2 KV heads, context 512, a chat template."""
    folder = tmp_path_factory.mktemp("model")
    convert(TinyModel().write(folder / "tiny.gguf"), folder / "tiny", dtype="float32")
    return folder / "tiny"


@pytest.fixture
def model(good_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good_model, tmp_path / "model"))


def refused(*arguments: object, code: int, words: str | tuple[str, ...], stdin: bytes | None = None) -> None:
    """The command must end with this code and one sentence on stderr that holds the words."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), f"not refused but raised: {result.exception!r}"
    assert (result.exit_code, result.stdout) == (code, ""), result.output
    *usage, sentence = result.stderr.strip().splitlines()
    assert sentence.startswith("Error: ") and all(line.startswith(("Usage:", "Try ", "backend ")) or not line for line in usage), (
        result.stderr
    )
    for word in (words,) if isinstance(words, str) else words:
        assert word in sentence, f"{word!r} is not in: {sentence}"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- checkpoints: what is done to the folder, words ----


def edit(name: str, **changes: Any) -> Spoil:
    """Set keys of a JSON file; None in `changes` writes null, ... deletes the key."""

    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text()) | changes
        (folder / name).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return spoil


def config(**changes: Any) -> Spoil:
    return edit("config.json", **changes)


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content) and None


def delete(name: str) -> Spoil:
    return lambda folder: (folder / name).unlink()


def cut(name: str, keep: int) -> Spoil:
    """Keep the first `keep` bytes; below 0 drops that many from the end."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:keep]) and None


def tensors(**changes: Any) -> Spoil:
    """Replace tensors (dots written as __): a function of the old array, an array, or ... to leave it out."""

    def spoil(folder: Path) -> None:
        arrays = load_file(folder / WEIGHTS)
        for name, change in ((name.replace("__", "."), change) for name, change in changes.items()):
            if change is ...:
                del arrays[name]
            else:
                arrays[name] = change(arrays[name]) if callable(change) else change
        save_file(arrays, folder / WEIGHTS)

    return spoil


def header(change: Callable[[dict], Any]) -> Spoil:
    """Rewrite the safetensors header and leave the data as it is."""

    def spoil(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", content[:8])[0]
        table = json.loads(content[8 : 8 + length])
        change(table)
        text = json.dumps(table).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def with_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flat[3] = np.nan
    return array


def sharded(**more: str) -> Spoil:
    """Turn the file into the one shard of an index, and name further tensors (dots written as __) and their files in it."""

    def spoil(folder: Path) -> None:
        names = dict.fromkeys(load_file(folder / WEIGHTS), "shard-1.safetensors")
        names |= {name.replace("__", "."): file for name, file in more.items()}
        (folder / WEIGHTS).rename(folder / "shard-1.safetensors")
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": names}))

    return spoil


CHECKPOINTS: dict[str, tuple[Spoil, tuple[str, ...]]] = {
    "no config": (delete("config.json"), ("config.json", "is missing", "give a model folder")),
    "config cut": (cut("config.json", 40), ("config.json", "not JSON", "download or convert")),
    "config a list": (write("config.json", b"[]"), ("config.json", "list", "not an object")),
    "config not UTF-8": (write("config.json", b'{"model_type": "\xff"}'), ("config.json", "not JSON", "download or convert")),
    "config an empty object": (write("config.json", b"{}"), ("model_type None", "llama, mistral, qwen2, qwen3")),
    "family unknown": (config(model_type="mamba"), ("'mamba'", "llama, mistral, qwen2, qwen3")),
    "heads do not divide": (config(num_key_value_heads=3), ("num_attention_heads 4", "num_key_value_heads 3", "whole groups")),
    "no heads": (config(num_attention_heads=0), ("num_attention_heads is 0", "at least 1")),
    "layers a text": (config(num_hidden_layers="two"), ("num_hidden_layers is 'two'", "whole number")),
    "hidden size left out": (config(hidden_size=...), ("hidden_size is missing", "download or convert")),
    "head_dim odd": (config(head_dim=33), ("head_dim 33", "even")),
    "epsilon negative": (config(rms_norm_eps=-1.0), ("rms_norm_eps is -1.0", "from 0 to below 1")),
    "activation unknown": (config(hidden_act="relu"), ("'relu'", "silu")),
    "quantized": (config(quantization_config={"bits": 4}), ("quantization_config", "use the unquantized model")),
    "rope unknown": (config(rope_scaling={"rope_type": "longrope"}), ("'longrope'", "default")),
    "rope incomplete": (config(rope_scaling={"rope_type": "linear"}), ("'linear' needs factor", "add it")),
    "rope theta zero": (config(rope_theta=0, rope_parameters=..., rope_scaling=...), ("rope_theta is 0", "above 0")),
    "no weights": (delete(WEIGHTS), ("neither model.safetensors nor model.safetensors.index.json", "give a folder")),
    "weights cut": (cut(WEIGHTS, -100), ("model.safetensors", "not a whole safetensors file", "download or convert")),
    "weights empty": (write(WEIGHTS, b""), ("model.safetensors", "not a whole safetensors file", "download or convert")),
    "header cut": (cut(WEIGHTS, 60), ("not a whole safetensors file",)),
    "header length absurd": (write(WEIGHTS, b"\xff" * 64), ("not a whole safetensors file",)),
    "header lies about offsets": (
        header(lambda table: table[Q_PROJ].update(data_offsets=[0, 10**9])), ("not a whole safetensors file", "download or convert")),
    "header overlaps": (header(lambda table: table[Q_PROJ].update(data_offsets=[0, 32768])), ("not a whole safetensors file",)),
    "dtype not read": (tensors(model__layers__0__self_attn__q_proj__weight=lambda a: a.astype(np.int8)), (Q_PROJ, "I8", "F32, F16, BF16")),
    "NaN weights": (tensors(model__layers__0__self_attn__q_proj__weight=with_nan), (Q_PROJ, "NaN", "download the model again")),
    "infinite weights": (tensors(model__norm__weight=lambda a: a * np.float32(np.inf)), ("model.norm.weight", "infinite")),
    "shape disagrees": (tensors(model__norm__weight=lambda a: a[:-1].copy()), ("model.norm.weight", "[63]", "[64]", "config.json")),
    "config and weights disagree": (config(intermediate_size=128), ("[64, 96]", "[64, 128]", "config.json that belongs")),
    "tensor missing": (tensors(model__layers__1__mlp__up_proj__weight=...), ("lacks model.layers.1.mlp.up_proj.weight", "download it")),
    "tensor unknown": (tensors(model__extra=np.ones(3, np.float32)), ("model.extra", "does not have", "config.json that belongs")),
    "shard missing": (sharded(model__extra="shard-2.safetensors"), ("shard-2.safetensors", "is missing", "download that shard")),
    "index names a path": (sharded(model__extra="../x.safetensors"), ("../x.safetensors", "plain file name")),
    "no tokenizer": (delete("tokenizer.json"), ("tokenizer.json does not exist", "save the model's tokenizer")),
    "tokenizer cut": (cut("tokenizer.json", 500), ("tokenizer.json", "not a valid tokenizer", "download or convert")),
    "tokenizer too large": (config(vocab_size=100), ("tokenizer.json", "100", "take the files from one place")),
    "EOS no token": (edit("generation_config.json", eos_token_id="stop"), ("eos_token_id", "'stop'", "token id")),
    "tokenizer settings no JSON": (write("tokenizer_config.json", b"{'a'"), ("tokenizer_config.json", "not JSON", "download or convert")),
    "chat template no Jinja": (write("chat_template.jinja", b"{% for %}"), ("chat_template.jinja", "--raw")),
    "chat template reaches out": (
        write("chat_template.jinja", b"{{ ''.__class__.__subclasses__() }}"), ("chat_template.jinja", "--raw")),
    "unisparse.json broken": (write("unisparse.json", b'{"block_size": 100}'), ("unisparse.json", "does not divide block_size=100")),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(model: Path, name: str) -> None:
    spoil, words = CHECKPOINTS[name]
    spoil(model)
    before = contents(model)
    refused("generate", "-m", model, "--text", "hello", "--backend", "reference", code=CHECKPOINT, words=words)
    assert contents(model) == before


# ---- prompts and flags: arguments after `generate -m MODEL`, words; {tmp} is a folder with the files below ----

FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no prompt": ("", ("neither was given", "--prompt FILE", "--text")),
    "two prompts": ("--text a --prompt {tmp}/good.txt", ("both were given", "exactly one")),
    "prompt no file": ("-p {tmp}/nothing.txt", ("nothing.txt", "names no file", "--text")),
    "prompt a directory": ("-p {tmp}", ("is a directory", "name one text file")),
    "prompt empty": ("-p {tmp}/empty.txt", ("empty.txt is empty", "at least one")),
    "prompt blank": ("--text \t", ("--text is empty", "at least one")),
    "prompt not UTF-8": ("-p {tmp}/latin1.txt", ("not UTF-8", "0xe9", "position 3", "save the text as UTF-8")),
    "prompt not readable": ("-p {tmp}/good.txt/deeper", ("cannot be read", "readable text file")),
    "prompt too long": ("-p {tmp}/long.txt", ("tokens", "512", "--max-context")),
    "top-p of 0": ("--text a --attn-top-p 0", ("top_p=0", "0 < top_p <= 1")),
    "top-p above 1": ("--text a --attn-top-p 1.5", ("top_p=1.5", "0 < top_p <= 1")),
    "top-p NaN": ("--text a --attn-top-p nan", ("top_p=nan", "0 < top_p <= 1")),
    "top-p a word": ("--text a --attn-top-p most", ("'most'", "number", "off")),
    "row threshold of 1": ("--text a --row-threshold 1", ("row_threshold=1", "0 < row_threshold < 1")),
    "both rules off": ("--text a --attn-top-p off", ("top_p=None and row_threshold=None", "set at least one")),
    "compress does not divide": ("--text a --compress 7", ("q_compress=7 does not divide block_size=128", "give a divisor")),
    "composites for Top-P with one rule": ("--text a --top-p-compress 16", ("top_p_compress=16", "row_threshold=None", "set both rules")),
    "composites for Top-P do not fit": (
        "--text a --k-compress 4 --row-threshold 0.02 --top-p-compress 6", ("top_p_compress=6", "k_compress=4", "give one of 8, 16, 32"),
    ),
    "composites for Top-P no size": ("--text a --top-p-compress none", ("'none' is not a size", "8K")),
    "block size does not fit": ("--text a --block-size 100", ("does not divide block_size=100",)),
    "head compress does not fit": ("--text a --head-compress 3", ("head_compress=3", "4 query heads", "give one of 1, 2, 4")),
    "too many anchors": ("--text a --key-anchors 9", ("key_anchors=9", "0 (off) to 8")),
    "anchors negative": ("--text a --key-anchors -1", ("key_anchors=-1", "at least 0")),
    "sink negative": ("--text a --sink-blocks -1", ("sink_blocks=-1", "at least 0")),
    "size of nothing": ("--text a --chunk-size 0", ("'0' is not a size", "8K")),
    "size with a unit unknown": ("--text a -n 8KB", ("'8KB' is not a size", "8K")),
    "preset unknown": ("--text a --preset fast", ("'fast'", "'paper'", "'precise'")),
    "backend unknown": ("--text a --backend torch", ("'torch'", "'reference'")),
    "dtype unknown": ("--text a --dtype int8", ("dtype='int8'", "float32", "bfloat16")),
    "flags nothing would use": ("--text a --attention dense --compress 4", ("--compress has no effect with --attention dense", "drop one")),
    "device without GPU": ("--text a --device 0 --backend reference", ("--device 0", "runs on the CPU", "drop one")),
    "temperature negative": ("--text a --temp -1", ("temperature=-1", "at least 0")),
    "sampling top-p of 0": ("--text a --top-p 0", ("top_p=0", "0 < top_p <= 1")),
    "sampling top-k negative": ("--text a --top-k -3", ("top_k=-3", "at least 0")),
    "min-p above 1": ("--text a --min-p 2", ("min_p=2", "0 <= min_p <= 1")),
    "penalty of 0": ("--text a --repetition-penalty 0", ("repetition_penalty=0", "above 0")),
    "seed negative": ("--text a --seed -1", ("seed=-1", "at least 0")),
    "no new tokens": ("--text a -n 0", ("'0' is not a size", "above 0")),
    "system without a template": ("--text a --system b --raw", ("'b'", "raw text", "--raw or --system")),
    "flag unknown": ("--text a --flash", ("No such option", "--flash")),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_prompts_and_flags(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "good.txt").write_text("hello")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_text("hello world " * 400)
    arguments, words = FLAGS[name]
    before = contents(tmp_path)
    backend = [] if "--backend" in arguments else ["--backend", "reference"]
    split = [part.format(tmp=tmp_path) for part in arguments.split(" ")] if arguments else []
    refused("generate", "-m", model, *backend, *split, code=USAGE, words=words)
    assert contents(tmp_path) == before


def test_standard_input_that_is_not_text(model: Path) -> None:
    refused("generate", "-m", model, "-p", "-", stdin=b"\xff\xfe", code=USAGE, words=("standard input is not UTF-8", "0xff"))
    refused("generate", "-m", model, "-p", "-", stdin=b"", code=USAGE, words="standard input is empty")


def test_models_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused("generate", "-m", tmp_path / "nowhere", "--text", "a", code=CHECKPOINT, words=("nowhere", "is not a folder", "config.json"))
    refused("generate", "-m", tmp_path / "file", "--text", "a", code=CHECKPOINT, words=("file is not a folder", "config.json"))
    refused("generate", "--text", "a", code=USAGE, words=("Missing option", "--model"))


def test_backends_that_are_missing_are_never_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    refused("generate", "-m", model, "--text", "a", "--backend", "cupy", code=CHECKPOINT, words=("cupy", "backend", "reference"))


def test_commands_that_are_none() -> None:
    refused("generat", code=USAGE, words=("No such command", "generat"))


# ---- convert ----


def half_a_file(folder: Path) -> Path:
    path = TinyModel().write(folder / "half.gguf")
    path.write_bytes(path.read_bytes()[:-1000])
    return path


CONVERSIONS: dict[str, tuple[Callable[[Path], Path], str, int, tuple[str, ...]]] = {
    "no file": (lambda folder: folder / "nothing.gguf", "out", USAGE, ("nothing.gguf", "not there", ".gguf")),
    "a directory": (lambda folder: folder, "out", USAGE, ("a directory", ".gguf")),
    "target a file": (lambda folder: TinyModel().write(folder / "a.gguf"), "taken", USAGE, ("taken is a file", "new folder")),
    "target exists": (lambda folder: TinyModel().write(folder / "a.gguf"), ".", USAGE, ("exists", "--force")),
    "cut": (half_a_file, "out", CHECKPOINT, ("half.gguf", "download it again")),
    "no GGUF": (lambda folder: folder / "taken", "out", CHECKPOINT, ("taken", "not a complete GGUF file")),
    "architecture unknown": (lambda folder: TinyModel("gemma").write(folder / "a.gguf"), "out", CHECKPOINT, ("gemma", "another model")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions(tmp_path: Path, name: str) -> None:
    make, target, code, words = CONVERSIONS[name]
    (tmp_path / "taken").write_text("not a model")
    source = make(tmp_path)
    before = contents(tmp_path)
    refused("convert", source, tmp_path / target, code=code, words=words)
    assert contents(tmp_path) == before and not (tmp_path / "out").exists()


# ---- arrays: arguments of unisparse_attention that differ from a good call, words ----


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def holding(value: float, *shape: int) -> np.ndarray:
    array = normal(*shape)
    array[0, 1, 2] = value
    return array


ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "head_dim differs": ({"q": normal(4, 16, 32)}, ("head_dim 32", "64", "equal")),
    "k and v differ": ({"v": normal(2, 15, 64)}, ("(2, 16, 64)", "(2, 15, 64)", "differ in shape")),
    "heads do not divide": ({"q": normal(3, 16, 64)}, ("num_q_heads=3", "num_kv_heads=2", "whole groups")),
    "two axes": ({"q": normal(16, 64)}, ("(16, 64)", "[Hq, Lq, d]")),
    "batch of one side": ({"q": normal(1, 4, 16, 64)}, ("(1, 4, 16, 64)", "all or none with a batch axis")),
    "batches differ": ({"q": normal(2, 4, 16, 64), "k": normal(3, 2, 16, 64), "v": normal(3, 2, 16, 64)}, ("batch 2", "3", "equal")),
    "no queries": ({"q": normal(4, 0, 64)}, ("q_len=0", "at least one")),
    "no keys": ({"k": normal(2, 0, 64), "v": normal(2, 0, 64), "causal": False}, ("k_len=0", "at least one")),
    "more queries than keys": ({"q": normal(4, 17, 64)}, ("q_len=17", "k_len=16", "0 <= q_offset")),
    "q not finite": ({"q": holding(np.nan, 4, 16, 64)}, ("q holds nan at [0, 1, 2]", "finite")),
    "k infinite": ({"k": holding(np.inf, 2, 16, 64)}, ("k holds inf at [0, 1, 2]", "finite")),
    "v infinite": ({"v": holding(-np.inf, 2, 16, 64)}, ("v holds -inf at [0, 1, 2]", "finite")),
    "integers": ({name: np.ones((2, 16, 64), int) for name in "qkv"}, ("int64", "float16, bfloat16, float32, float64")),
    "dtypes differ": ({"k": normal(2, 16, 64).astype(np.float64)}, ("float32", "float64", "one dtype")),
    "a list": ({"q": [[1.0]]}, ("list", "give a NumPy")),
    "offset negative": ({"q_offset": -1}, ("q_offset=-1", "0 <= q_offset <= k_len - q_len")),
    "offset too far": ({"q_offset": 1}, ("q_offset=1", "k_len=16", "0 <= q_offset <= k_len - q_len")),
    "offset without causality": ({"q_offset": 0, "causal": False}, ("q_offset=0", "leave it None")),
    "scale infinite": ({"scale": float("inf")}, ("scale=inf", "finite")),
    "backend unknown": ({"backend": "torch"}, ("'torch'", "auto, reference, cupy, numba")),
    "config unknown": ({"config": "sparse"}, ("'sparse'", "UniSparseConfig", "'dense'")),
    "config for other heads": ({"config": UniSparseConfig(top_p=(0.9, 0.8, 0.7))}, ("top_p has 3 values", "4 composite heads")),
    "summary of other keys": (
        {"key_summary": KeySummary(normal(2, 1, 64), normal(2, 1, 1))}, ("key_summary.kc", "(2, 1, 64)", "summarise the same k")),
}  # fmt: skip


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays(name: str) -> None:
    changes, words = ARRAYS[name]
    good = {"q": normal(4, 16, 64), "k": normal(2, 16, 64), "v": normal(2, 16, 64)}
    unisparse_attention(**good)
    with pytest.raises(InvalidInput) as error:
        unisparse_attention(**(good | changes))
    one_sentence(str(error.value), words)


# ---- configs ----

CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "block size a fraction": ({"block_size": 128.5}, ("block_size=128.5", "whole number")),
    "block size zero": ({"block_size": 0}, ("block_size=0", "at least 1")),
    "k_compress does not divide": ({"k_compress": 6}, ("k_compress=6", "block_size=128", "give a divisor")),
    "top_p_compress too fine": (
        {"row_threshold": 0.1, "top_p_compress": 4}, ("top_p_compress=4 is not a multiple of q_compress=8", "give one of 8, 16"),
    ),
    "top_p_compress without Top-P": (
        {"top_p": None, "row_threshold": 0.1, "top_p_compress": 8}, ("top_p_compress=8 with top_p=None", "set both rules"),
    ),
    "flag instead of a number": ({"key_anchors": True}, ("key_anchors=True", "whole number")),
    "top_p a text": ({"top_p": "0.9"}, ("top_p='0.9'", "not a number")),
    "top_p of no head": ({"top_p": []}, ("top_p", "empty", "one value per composite head")),
    "top_p of one head too high": ({"top_p": [0.9, 1.1]}, ("top_p=1.1", "0 < top_p <= 1")),
    "no rule": ({"top_p": None}, ("top_p=None", "set at least one")),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(name: str) -> None:
    values, words = CONFIGS[name]
    with pytest.raises(InvalidInput) as error:
        UniSparseConfig(**values)
    one_sentence(str(error.value), words)


def one_sentence(message: str, words: tuple[str, ...]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_tables_are_as_long_as_promised() -> None:
    assert sum(map(len, (CHECKPOINTS, FLAGS, CONVERSIONS, ARRAYS, CONFIGS))) >= 60
