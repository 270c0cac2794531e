"""Prompts and flags: arguments after `generate -m MODEL`, and words of the refusal; {tmp} is a folder with the files below."""

import sys
from pathlib import Path

import pytest

from .refusals import CHECKPOINT, USAGE, contents, refused

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
    "top-p of 0": ("--text a --attn-top-p 0", ("--attn-top-p=0", "0 < --attn-top-p <= 1")),
    "top-p above 1": ("--text a --attn-top-p 1.5", ("--attn-top-p=1.5", "0 < --attn-top-p <= 1")),
    "top-p NaN": ("--text a --attn-top-p nan", ("--attn-top-p=nan", "0 < --attn-top-p <= 1")),
    "top-p a word": ("--text a --attn-top-p most", ("'most'", "number", "off")),
    "row threshold of 1": ("--text a --row-threshold 1", ("--row-threshold=1", "0 < --row-threshold < 1")),
    "both rules off": ("--text a --attn-top-p off", ("--attn-top-p=off and --row-threshold=off", "set at least one")),
    "compress does not divide": ("--text a --compress 7", ("--q-compress=7 does not divide --block-size=128", "give a divisor")),
    "composites for Top-P with one rule": ("--text a --top-p-compress 16", ("--top-p-compress=16", "--row-threshold=off", "set both")),
    "composites for Top-P do not fit": (
        "--text a --k-compress 4 --row-threshold 0.02 --top-p-compress 6", ("--top-p-compress=6", "--k-compress=4", "give one of 8, 16"),
    ),
    "composites for Top-P no size": ("--text a --top-p-compress none", ("'none' is not a size", "8K")),
    "block size does not fit": ("--text a --block-size 100", ("does not divide --block-size=100",)),
    "head compress does not fit": ("--text a --head-compress 3", ("head_compress=3", "4 query heads", "give one of 1, 2, 4")),
    "too many anchors": ("--text a --key-anchors 9", ("--key-anchors=9", "0 (off) to 8")),
    "anchors negative": ("--text a --key-anchors -1", ("--key-anchors=-1", "at least 0")),
    "sink negative": ("--text a --sink-blocks -1", ("--sink-blocks=-1", "at least 0")),
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


def test_backends_that_are_missing_are_never_replaced(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    refused("generate", "-m", model, "--text", "a", "--backend", "cupy", code=CHECKPOINT, words=("cupy", "backend", "reference"))


def test_commands_that_are_none() -> None:
    refused("generat", code=USAGE, words=("No such command", "generat"))
