"""What a suite of examples is, and the loop that runs one: every example under every attention, written down as it comes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..model.llama import Attention, Llama
from ..model.tokenizer import Tokenizer
from ..version import __version__
from .results import ResultsFile

Attentions = Mapping[str, Attention]  # by label; "dense" is always among them
Step = Callable[[], None]  # called after each measurement
_SAMPLE_BYTES = 1 << 20


class Example(NamedTuple):
    """Which example: its length in tokens (0: as given), its task, and its number within that task."""

    length: int
    task: str
    number: int


class Suite(Protocol):
    """Examples, and how to measure one.

    `identity()` holds what decides the examples, in plain values: part of the results file's first line.
    `measure` returns, for each label, plain numbers (or lists of them); `step` is called once a label.
    """

    name: str

    def identity(self) -> dict[str, Any]: ...

    def examples(self) -> list[Example]: ...

    def measure(self, example: Example, model: Llama, tokenizer: Tokenizer, attentions: Attentions, step: Step) -> dict[str, dict]: ...


def run_suite(
    suite: Suite,
    model: Llama,
    tokenizer: Tokenizer,
    attentions: Attentions,
    results: ResultsFile,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Measure every example that the results file does not hold yet. progress takes (measurements done, in all)."""
    examples = suite.examples()
    known = {record_key(record) for record in results.records}
    total, done = len(examples) * len(attentions), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)

    for example in examples:
        if example in known:
            for _ in attentions:
                step()
            continue
        measured = suite.measure(example, model, tokenizer, attentions, step)
        results.append({**example._asdict(), "configs": measured})


def record_key(record: dict[str, Any]) -> Example:
    """The example that a record of the results file is about."""
    return Example(record["length"], record["task"], record["number"])


def records_of(suite: Suite, results: ResultsFile) -> list[dict[str, Any]]:
    """The records of this suite's examples; a file may hold more, from a run with a greater count."""
    wanted = set(suite.examples())
    return [record for record in results.records if record_key(record) in wanted]


def describe_run(suite: Suite, model_dir: Path, model: Llama, attentions: Attentions) -> dict[str, Any]:
    """What a results file must agree in to be continued."""
    return {
        "suite": suite.name,
        "examples": suite.identity(),
        "model": model_fingerprint(model_dir),
        "backend": model.backend.name,
        "dtype": str(model.weights.embedding.dtype),
        "version": __version__,
        "configs": {label: plain_attention(attention) for label, attention in attentions.items()},
    }


def plain_attention(attention: Attention) -> Any:
    """An attention as plain JSON values."""
    if isinstance(attention, str):
        return attention
    return asdict(attention) if isinstance(attention, UniSparseConfig) else [plain_attention(layer) for layer in attention]


def model_fingerprint(folder: Path) -> str:
    """Tells models apart: config.json, tokenizer.json, and of each weight file its size and its first and last MiB."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        digest.update((folder / name).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE_BYTES))
            file.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(file.read(_SAMPLE_BYTES))
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def require_context(model: Llama, length: int) -> None:
    """Raise InvalidInput when the model cannot read `length` tokens."""
    window = model.config.sliding_window
    limit = model.max_context if window is None else min(window, model.max_context)
    if length > limit:
        raise InvalidInput(
            f"--length {length} is more than the {limit} positions this model may use: give a smaller --length, "
            "or raise the limit with --max-context"
        )


def chunk_unit(attentions: Sequence[Attention]) -> int:
    """A number of tokens that is whole blocks under every attention."""
    layers = [layer for attention in attentions for layer in ([attention] if isinstance(attention, (str, UniSparseConfig)) else attention)]
    return math.lcm(*(config.block_size for config in layers if isinstance(config, UniSparseConfig)))
