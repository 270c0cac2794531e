"""Tokenizer: text to token ids and back, with the special tokens and the chat template of a model folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import CheckpointError, InvalidInput
from .chat_template import ChatTemplate, find_chat_template
from .config import read_json_object
from .detokenizer import Detokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """What `from_folder` read; build it with that.

    Attributes:
        special_tokens: name (`bos_token`, ...) -> text, handed to the chat template as variables.
        bos_token_id: the id that begins a text, or None.
        eos_token_ids: every id that ends an answer; may be empty.
        vocab_size: largest token id + 1.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        special_tokens: dict[str, Any],
        bos_token_id: int | None,
        adds_bos: bool,
        eos_token_ids: set[int],
        chat_template: ChatTemplate | None,
        vocab_size: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._adds_bos = adds_bos
        self._chat_template = chat_template
        self.special_tokens = special_tokens
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, and where present tokenizer_config.json, generation_config.json, config.json and the chat template.

        Raises:
            CheckpointError: a file is missing or broken, the files contradict each other, or the vocabulary is larger than the
                model's embedding.
        """
        folder = Path(path)
        names = ("tokenizer_config.json", "config.json", "generation_config.json")
        settings, model_config, generation_config = (read_json_object(path) if (path := folder / n).exists() else {} for n in names)
        tokenizer = _read_tokenizer(folder / "tokenizer.json")
        _add_listed_tokens(tokenizer, settings.get("added_tokens_decoder") or {}, folder)
        vocab_size = _vocab_size(tokenizer)
        _check_embedding_covers(vocab_size, model_config.get("vocab_size"), folder)

        special_tokens = _special_tokens(settings, folder)
        bos_token_id, adds_bos = _bos(tokenizer, special_tokens, settings.get("add_bos_token"), folder)
        if bos_token_id is not None:
            special_tokens.setdefault("bos_token", tokenizer.id_to_token(bos_token_id))
        eos_token_ids = _listed_eos_ids(generation_config, model_config, folder)
        if "eos_token" in special_tokens:
            eos_token_ids.add(_required_id(tokenizer, "eos_token", special_tokens["eos_token"], folder))
        return cls(tokenizer, special_tokens, bos_token_id, adds_bos, eos_token_ids, find_chat_template(folder, settings), vocab_size)

    @property
    def has_chat_template(self) -> bool:
        """Whether the folder holds a chat template; without one every prompt is raw text."""
        return self._chat_template is not None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their ids.

        The BOS token goes in front where this model wants one, unless `add_bos` is False or the text begins with it already.

        Raises:
            InvalidInput: the text is not valid Unicode.
        """
        try:
            token_ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:
            raise InvalidInput(
                f"the text {text[:40]!r} cannot be encoded as UTF-8: remove the lone surrogates, or save it as UTF-8"
            ) from None
        if add_bos and self._adds_bos and token_ids[:1] != [self.bos_token_id]:
            return [self.bos_token_id, *token_ids]  # type: ignore[list-item]  # a tokenizer that adds BOS knows its id
        return token_ids

    def encode_prompt(self, prompt: str, system: str | None = None, raw: bool = False) -> list[int]:
        """Token ids that the model continues: `prompt` through the chat template, or as it is when raw or without a template.

        The template writes every special token itself, the BOS token included.

        Raises:
            InvalidInput: the prompt is empty, `system` meets raw text, or the template refuses the messages.
            CheckpointError: the template is broken.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidInput(f"the prompt {prompt!r} is empty: give some text")
        if raw or self._chat_template is None:
            if system is not None:
                why = "raw text was asked for" if raw else "this model has no chat template"
                way_out = "leave out --raw or --system" if raw else "leave out --system, or write its text into the prompt"
                raise InvalidInput(f"the system message {system[:40]!r} has no place because {why}: {way_out}")
            return self.encode(prompt)
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": prompt})
        token_ids = self.encode(self._chat_template.render(messages, self.special_tokens), add_bos=False)
        if not token_ids:
            raise CheckpointError(f"the chat template in {self._chat_template.origin} turns the prompt into no text: mend it, or use --raw")
        return token_ids

    def decode(self, token_ids: Iterable[int], show_special_tokens: bool = False) -> str:
        """The text of `token_ids`, special tokens left out or spelled out."""
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=not show_special_tokens)

    def detokenizer(self) -> Detokenizer:
        """A fresh incremental decoder, for one answer."""
        return Detokenizer(self._tokenizer)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token spelled `text` (decoding leaves it out), or None where it is none."""
        token_id = self._tokenizer.token_to_id(text)
        added = self._tokenizer.get_added_tokens_decoder().get(token_id) if token_id is not None else None
        return token_id if added is not None and added.special else None


def _read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist: this program reads tokenizer.json, so save the model's tokenizer in that form (a 'fast' tokenizer)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every fault
        raise CheckpointError(
            f"{path} is not a valid tokenizer ({' '.join(str(error).split())}): download or convert the model again"
        ) from None
    tokenizer.no_truncation()  # settings left over from training would cut a long prompt or fill up a short one
    tokenizer.no_padding()
    return tokenizer


def _vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _check_embedding_covers(vocab_size: int, embedding_size: object, folder: Path) -> None:
    if vocab_size == 0:
        raise CheckpointError(f"{folder / 'tokenizer.json'} holds no tokens: download or convert the model again")
    if isinstance(embedding_size, int) and vocab_size > embedding_size:
        raise CheckpointError(
            f"{folder / 'tokenizer.json'} has token ids up to {vocab_size - 1}, but the model embeds only {embedding_size} "
            "(vocab_size in config.json): the tokenizer belongs to another model, so take the files from one place"
        )


def _add_listed_tokens(tokenizer: tokenizers.Tokenizer, listed: object, folder: Path) -> None:
    """Tokens that tokenizer_config.json lists and tokenizer.json lacks are added; both must give a token the same id."""
    source = folder / "tokenizer_config.json"
    if not isinstance(listed, dict) or not all(
        key.isdecimal() and isinstance(entry, dict) and _token_text(entry) for key, entry in listed.items()
    ):
        raise CheckpointError(f"added_tokens_decoder in {source} does not map ids to tokens: download the model again")
    for token_id, entry in sorted(((int(key), entry) for key, entry in listed.items()), key=lambda pair: pair[0]):
        text = entry["content"]
        if tokenizer.token_to_id(text) is None:
            flags = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in entry}
            tokenizer.add_tokens([tokenizers.AddedToken(text, **flags)])
        if tokenizer.token_to_id(text) != token_id:
            raise CheckpointError(
                f"token {text!r} has id {token_id} in {source} and {tokenizer.token_to_id(text)} by tokenizer.json: "
                "take both files from one model"
            )


def _special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Name -> text of the special tokens, from the forms that transformers 4 and 5 write."""
    entries = {name: settings.get(name) for name in _NAMED_TOKENS}
    more = settings.get("extra_special_tokens")
    if isinstance(more, dict):  # names of the model's own, such as image_token
        entries |= more
    found = {name: _token_text(entry) for name, entry in entries.items() if entry is not None}
    for name, text in found.items():
        if text is None:
            raise CheckpointError(
                f"{name} in {folder / 'tokenizer_config.json'} is {entries[name]!r}, not a token: download the model again"
            )
    lists = [settings.get("additional_special_tokens"), more if isinstance(more, list) else None]
    additional = [text for entries_of_list in lists for entry in entries_of_list or [] if (text := _token_text(entry))]
    return {**found, "additional_special_tokens": additional} if additional else dict(found)


def _token_text(entry: object) -> str | None:
    """A token is a string, or an object with the string under `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) and text else None


def _required_id(tokenizer: tokenizers.Tokenizer, name: str, text: str, folder: Path) -> int:
    token_id = tokenizer.token_to_id(text)
    if token_id is None:
        raise CheckpointError(
            f"{name} in {folder / 'tokenizer_config.json'} is {text!r}, which tokenizer.json does not know: take both files from one model"
        )
    return token_id


def _bos(
    tokenizer: tokenizers.Tokenizer, special_tokens: Mapping[str, Any], add_bos_token: object, folder: Path
) -> tuple[int | None, bool]:
    """(BOS id or None, whether plain text gets it): add_bos_token decides, else what tokenizer.json's post-processor does."""
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    processed = tokenizer.encode("a", add_special_tokens=True).ids
    prefix = processed[: len(processed) - len(plain)] if processed[1 : 1 + len(plain)] == plain else []
    bos_token = special_tokens.get("bos_token")
    wanted = bool(prefix) if add_bos_token is None else bool(add_bos_token)
    if bos_token is None:
        return (prefix[0], wanted) if prefix else (None, False)
    bos_token_id = tokenizer.token_to_id(bos_token)
    if wanted and bos_token_id is None:
        _required_id(tokenizer, "bos_token", bos_token, folder)
    return bos_token_id, wanted


def _listed_eos_ids(generation_config: Mapping[str, Any], model_config: Mapping[str, Any], folder: Path) -> set[int]:
    """eos_token_id of generation_config.json, or of config.json where that has none: one id or a list."""
    name, entry = "generation_config.json", generation_config.get("eos_token_id")
    if entry is None:
        name, entry = "config.json", model_config.get("eos_token_id")
    token_ids = [] if entry is None else entry if isinstance(entry, list) else [entry]
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise CheckpointError(f"eos_token_id in {folder / name} is {entry!r}: it must be a token id or a list of them")
    return set(token_ids)
