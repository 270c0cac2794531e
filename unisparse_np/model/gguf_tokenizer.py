"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face tokenizer.json.

GGUF keeps the tokens, their types and the merges, but of the rule that cuts text into words only a name
(`tokenizer.ggml.pre`). The four names below are the byte-level BPE tokenizers whose rule is known for certain.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ..errors import CheckpointError, InvalidInput
from .gguf_metadata import Metadata

CONTROL, USER_DEFINED = 3, 4  # token types that are matched in the text before anything is split
WAY_OUT = "give the model's own tokenizer with --tokenizer tokenizer.json"

# Words as GPT-4 and its followers cut them; they differ in how many digits stay together.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# Characters that between them use every byte value of valid UTF-8.
_EVERY_BYTE = "".join(map(chr, [*range(0x1000), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x10000)]))


@dataclass(frozen=True)
class Kind:
    """One way to cut text into words. number_pattern: None keeps GPT-2's own rule, else what a number is in _WORDS."""

    number_pattern: str | None = None
    single_digits_first: bool = False
    compose_unicode: bool = False  # NFC
    ignore_merges: bool = False  # a word that is a token as a whole is taken whole
    adds_bos: bool = False  # where the file does not say


_LLAMA3 = Kind(number_pattern=r"\p{N}{1,3}", ignore_merges=True, adds_bos=True)
KINDS = {
    "gpt-2": Kind(),
    "smollm": Kind(single_digits_first=True),
    "qwen2": Kind(number_pattern=r"\p{N}", compose_unicode=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
}
# Control tokens that end an answer in chat models; GGUF names only some of them.
END_OF_TURN = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")


@dataclass(frozen=True)
class ConvertedTokenizer:
    """Contents of the files about text. lost_bytes: how many UTF-8 bytes have no token, so that the tokenizer drops them."""

    kind: str
    tokenizer_json: str
    tokenizer_config: dict[str, Any]
    generation_config: dict[str, Any]
    lost_bytes: int


def convert_tokenizer(metadata: Metadata, vocab_size: int, tokenizer_file: Path | None) -> ConvertedTokenizer:
    """Rebuild the tokenizer, or take `tokenizer_file` (a tokenizer.json) in its place.

    vocab_size: rows of the embedding. Raises CheckpointError where the tokenizer is of an unknown kind, inconsistent, or
    (tokenizer_file) belongs to another model; InvalidInput where tokenizer_file is no file.
    """
    tokens = metadata.require("tokenizer.ggml.tokens", list)
    if len(tokens) != vocab_size:
        raise CheckpointError(
            f"{metadata.path} has {len(tokens)} tokens but {vocab_size} embedding rows; both must be equal, the file is damaged."
        )
    types = metadata.get("tokenizer.ggml.token_type", list, [1] * len(tokens))
    if len(types) != len(tokens):
        raise CheckpointError(
            f"{metadata.path} has {len(types)} token types for {len(tokens)} tokens; both must be equal, the file is damaged."
        )
    special = {name: _special_token(metadata, name, tokens) for name in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if special["eos"] is None:
        raise CheckpointError(f"{metadata.path} has no tokenizer.ggml.eos_token_id, so no answer would ever end; choose another model.")
    kind, adds_bos = _kind_and_bos(metadata, tokenizer_file)
    if adds_bos and special["bos"] is None:
        raise CheckpointError(f"{metadata.path} begins texts with a BOS token but has no tokenizer.ggml.bos_token_id; {WAY_OUT}.")
    bos = special["bos"] if adds_bos else None

    if tokenizer_file is not None:
        serialised, tokenizer = _given_tokenizer(tokenizer_file, metadata, special, vocab_size)
    else:
        tokenizer = _rebuild(metadata, KINDS[kind], tokens, types, bos)
        serialised = tokenizer.to_str()
    return ConvertedTokenizer(
        kind=kind,
        tokenizer_json=serialised,
        tokenizer_config=_tokenizer_config(metadata, special, adds_bos),
        generation_config=_generation_config(special, tokens, types),
        lost_bytes=0 if tokenizer_file is not None else _lost_bytes(tokenizer),
    )


def _special_token(metadata: Metadata, name: str, tokens: list[str]) -> tuple[int, str] | None:
    token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(
            f"{metadata.path}: tokenizer.ggml.{name}_token_id is {token_id}, but must be below {len(tokens)}; the file is damaged."
        )
    return token_id, tokens[token_id]


def _kind_and_bos(metadata: Metadata, tokenizer_file: Path | None) -> tuple[str, bool]:
    """The name of the kind, and whether texts begin with the BOS token."""
    model = metadata.require("tokenizer.ggml.model", str)
    pre = metadata.get("tokenizer.ggml.pre", str, "")
    if metadata.get("tokenizer.ggml.add_eos_token", bool, False):
        metadata.refuse("its tokenizer ends every text with the EOS token", "a prompt must stay open")
    if tokenizer_file is not None:
        by_default = model == "llama" or (pre in KINDS and KINDS[pre].adds_bos)
        return tokenizer_file.name, metadata.get("tokenizer.ggml.add_bos_token", bool, by_default)
    if model != "gpt2":
        known = {"llama": " (SentencePiece)", "bert": " (WordPiece)", "t5": " (unigram)"}.get(model, "")
        raise CheckpointError(
            f"{metadata.path} has a tokenizer of kind {model!r}{known}, but only byte-level BPE can be rebuilt; {WAY_OUT}."
        )
    if pre not in KINDS:
        raise CheckpointError(
            f"{metadata.path} splits words by the rule {pre!r}, but only {', '.join(KINDS)} are known to be rebuilt exactly; {WAY_OUT}."
        )
    return pre, metadata.get("tokenizer.ggml.add_bos_token", bool, KINDS[pre].adds_bos)


def _rebuild(metadata: Metadata, kind: Kind, tokens: list[str], types: list[int], bos: tuple[int, str] | None) -> Tokenizer:
    if repeated := [token for token, count in Counter(tokens).items() if count > 1]:
        raise CheckpointError(f"{metadata.path} lists token {repeated[0]!r} twice, so its id is ambiguous; {WAY_OUT}.")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata.require("tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2 or any(part not in vocab for part in (*merge, "".join(merge))):
            raise CheckpointError(f"{metadata.path}: merge {' '.join(merge)!r} does not join two tokens into a third; {WAY_OUT}.")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=kind.ignore_merges))
    if kind.compose_unicode:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer(kind)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos is not None:
        begin = processors.TemplateProcessing(single=f"{bos[1]} $A", pair=f"{bos[1]} $A {bos[1]}:1 $B:1", special_tokens=[(bos[1], bos[0])])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _of_type(CONTROL, tokens, types)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in _of_type(USER_DEFINED, tokens, types)])
    return tokenizer


def _pre_tokenizer(kind: Kind) -> pre_tokenizers.PreTokenizer:
    if kind.number_pattern is not None:
        words = pre_tokenizers.Split(Regex(_WORDS % kind.number_pattern), behavior="isolated")
        return pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    gpt2_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2_words]) if kind.single_digits_first else gpt2_words


def _of_type(wanted: int, tokens: list[str], types: list[int]) -> list[str]:
    return [token for token, kind in zip(tokens, types, strict=True) if kind == wanted]


def _lost_bytes(tokenizer: Tokenizer) -> int:
    """How many of UTF-8's 243 byte values have no token. Byte-level BPE writes each as one letter."""
    (letters, _), *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(_EVERY_BYTE)
    return sum(tokenizer.token_to_id(letter) is None for letter in set(letters))


def _given_tokenizer(file: Path, metadata: Metadata, special: dict[str, tuple[int, str] | None], vocab_size: int) -> tuple[str, Tokenizer]:
    try:
        serialised = file.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"--tokenizer {file} cannot be read ({error.strerror}); give the path of a tokenizer.json.") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"--tokenizer {file} is not UTF-8 text; give a tokenizer.json, not a tokenizer.model.") from None
    try:
        tokenizer = Tokenizer.from_str(serialised)
    except Exception as error:  # the tokenizers library raises the bare Exception
        raise InvalidInput(f"--tokenizer {file} is no tokenizer.json ({str(error).splitlines()[0]}); give the file of that name.") from None
    if tokenizer.get_vocab_size() > vocab_size:
        raise CheckpointError(
            f"--tokenizer {file} has {tokenizer.get_vocab_size()} tokens, more than the {vocab_size} embedding rows of {metadata.path}; "
            "give this model's own."
        )
    for name, token in special.items():
        if token is not None and tokenizer.id_to_token(token[0]) != token[1]:
            raise CheckpointError(
                f"--tokenizer {file} has {tokenizer.id_to_token(token[0])!r} as token {token[0]}, "
                f"where {metadata.path} has its {name} token {token[1]!r}; give this model's own."
            )
    return serialised, tokenizer


def _tokenizer_config(metadata: Metadata, special: dict[str, tuple[int, str] | None], adds_bos: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.positive("{arch}.context_length"),
    }
    for name, field in (("bos", "bos_token"), ("eos", "eos_token"), ("unknown", "unk_token"), ("padding", "pad_token")):
        if (token := special[name]) is not None:
            config[field] = token[1]
    if (template := metadata.get("tokenizer.chat_template", str)) is not None:
        config["chat_template"] = template
    return config


def _generation_config(special: dict[str, tuple[int, str] | None], tokens: list[str], types: list[int]) -> dict[str, Any]:
    control = {token: index for index, token in enumerate(tokens) if types[index] == CONTROL}
    ends = {token[0] for name in ("eos", "eot", "eom") if (token := special[name]) is not None}
    ends |= {control[token] for token in END_OF_TURN if token in control}
    config: dict[str, Any] = {"do_sample": False, "eos_token_id": sorted(ends)}
    for name, field in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
        if (token := special[name]) is not None:
            config[field] = token[0]
    return config
