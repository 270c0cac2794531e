"""Tensor parallelism as pure functions: which part of the model each of several ranks holds.

A rank holds whole groups of heads, a KV head with the query heads that read it, so block selection needs no other rank.
Of q, k, v, gate and up it holds rows (outputs), of o and down the columns (inputs) that its own heads and rows feed. So
each rank's o and down products are summands, and adding them up over ranks is all the communication of a layer. Logits
are shared out by vocabulary rows; the embedding and the norms are whole on each rank (Megatron-LM, arXiv 1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..parallel import Communicator
from ..problem import ceil_div
from .checkpoint import Slot, expected_tensors
from .config import ModelConfig

ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
COLUMNS = ("o_proj", "down_proj")


class Shard(NamedTuple):
    """Part `rank` of `size` equal parts of a model."""

    rank: int = 0
    size: int = 1


WHOLE = Shard()
Index = tuple[slice, ...]


def check_split(config: ModelConfig, size: int, attention: Sequence[AttentionConfig] = ()) -> None:
    """Whether the model divides evenly among `size` ranks.

    attention: the configs that will be used; their composite heads must not reach over the heads of two ranks.

    Raises:
        InvalidInput: it does not; the message names the sizes that work.
    """
    if _problem_with(config, size, attention) is None:
        return
    sizes = [n for n in range(1, config.num_key_value_heads + 1) if _problem_with(config, n, attention) is None]
    raise InvalidInput(
        f"{size} tensor-parallel ranks cannot share {_problem_with(config, size, attention)}: "
        f"use {', '.join(map(str, sizes))} of them, and --context-parallel for more processes"
    )


def _problem_with(config: ModelConfig, size: int, attention: Sequence[AttentionConfig]) -> str | None:
    """What does not divide by `size`, in words."""
    if config.num_key_value_heads % size:
        return f"{config.num_attention_heads} query heads and {config.num_key_value_heads} KV heads in whole groups"
    if config.intermediate_size % size:
        return f"{config.intermediate_size} MLP columns evenly"
    heads = config.num_attention_heads // size
    for part in attention:
        if isinstance(part, UniSparseConfig) and heads % part.head_compress and config.num_attention_heads % part.head_compress == 0:
            return f"{config.num_attention_heads} query heads in composite heads of {part.head_compress} (head_compress)"
    return None


def local_config(config: ModelConfig, size: int) -> ModelConfig:
    """The shape of one rank's part: heads and MLP columns divided; hidden size and vocabulary, which all ranks see, as they are."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // size,
        num_key_value_heads=config.num_key_value_heads // size,
        intermediate_size=config.intermediate_size // size,
    )


def local_attention(attention: AttentionConfig, shard: Shard) -> AttentionConfig:
    """The config for one rank's heads: values that are given per composite head are cut to its own."""
    if not isinstance(attention, UniSparseConfig):
        return attention
    own = {
        name: values[len(values) * shard.rank // shard.size : len(values) * (shard.rank + 1) // shard.size]
        for name, values in (("top_p", attention.top_p), ("row_threshold", attention.row_threshold))
        if isinstance(values, tuple)
    }
    return replace(attention, **own) if own else attention  # type: ignore[arg-type]


def slice_of(name: str, shape: tuple[int, ...], shard: Shard) -> Index | None:
    """Which part of a stored tensor a rank reads, as an index; None where it reads nothing.

    The biases of o and down are added once: by rank 0.
    """
    everything = tuple(slice(0, length) for length in shape)
    if shard.size == 1:
        return everything
    if name == "lm_head.weight":
        return (vocabulary_rows(shape[0], shard), everything[1])
    layer_part, _, kind = name.rpartition(".")
    matrix = layer_part.rpartition(".")[2]
    if matrix in ROWS:
        return (_share(shape[0], shard), *everything[1:])
    if matrix in COLUMNS and kind == "weight":
        return (everything[0], _share(shape[1], shard))
    if matrix in COLUMNS and shard.rank > 0:
        return None
    return everything


def own_tensors(config: ModelConfig, shard: Shard) -> dict[str, tuple[Slot, Index]]:
    """What one rank holds of a checkpoint of this config: name -> (where it belongs in the rank's weights, what to read of it)."""
    stored, local = expected_tensors(config), expected_tensors(local_config(config, shard.size))
    parts = {name: slice_of(name, slot.shape, shard) for name, slot in stored.items()}
    return {
        name: (replace(local[name], shape=tuple(axis.stop - axis.start for axis in index)), index)
        for name, index in parts.items()
        if index is not None
    }


def vocabulary_rows(vocab_size: int, shard: Shard) -> slice:
    """The tokens whose logits a rank computes: ceil(vocab / size) each, the last ones fewer or none."""
    each = ceil_div(vocab_size, shard.size)
    return slice(min(vocab_size, shard.rank * each), min(vocab_size, (shard.rank + 1) * each))


def join_vocabulary(xp: Any, logits: Any, vocab_size: int, ranks: Communicator) -> Any:
    """Each rank's logits [T, own rows of the vocabulary] -> [T, vocab] on every rank."""
    if ranks.size == 1:
        return logits
    each = ceil_div(vocab_size, ranks.size)
    padded = xp.zeros((len(logits), each), dtype=logits.dtype)
    padded[:, : logits.shape[1]] = logits
    gathered = ranks.all_gather(padded)  # [ranks, T, each]
    return xp.ascontiguousarray(gathered.transpose(1, 0, 2).reshape(len(logits), -1)[:, :vocab_size])


def _share(length: int, shard: Shard) -> slice:
    each = length // shard.size
    return slice(shard.rank * each, (shard.rank + 1) * each)
