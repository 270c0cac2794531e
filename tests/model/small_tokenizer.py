"""Small tokenizers made on the spot, and model folders around them."""

import json
from functools import cache
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>", "<|pad|>"]
BOS, EOS, TURN, PAD = range(4)
TEXT = "the cat sat on the mat and the dog sat on the log. 你好世界 日本語 🎉🎈 👩‍👩‍👧 naïve café Ω≈ç"


@cache
def _byte_level_json() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer.to_str()


def byte_level_tokenizer(adds_bos: bool = True) -> tokenizers.Tokenizer:
    """BPE over bytes (as GPT-2, Llama 3, Qwen): most non-ASCII characters span several tokens."""
    tokenizer = tokenizers.Tokenizer.from_str(_byte_level_json())
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)])
    return tokenizer


def byte_fallback_tokenizer() -> tokenizers.Tokenizer:
    """BPE over characters with byte tokens for the rest (as Llama 2 and Mistral): the first word loses its space mark."""
    words = ["▁", "t", "h", "e", "c", "a", "th", "the", "▁the", "▁c", "▁ca"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "c"), ("▁c", "a")]
    vocab = {name: token_id for token_id, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_folder(
    folder: Path,
    tokenizer_config: dict | None = None,
    config: dict | None = None,
    generation_config: dict | None = None,
    tokenizer: tokenizers.Tokenizer | None = None,
) -> Path:
    """A model folder without weights; returns it. By default <|begin|> and <|end|> are BOS and EOS."""
    folder.mkdir(exist_ok=True)
    if tokenizer_config is None:
        tokenizer_config = {"bos_token": SPECIAL[BOS], "eos_token": SPECIAL[EOS]}
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    files = {"tokenizer_config": tokenizer_config, "config": config, "generation_config": generation_config}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder
