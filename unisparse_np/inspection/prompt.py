"""What every tool checks before work starts: a prompt of several blocks, and an attention with something sparse in it."""

from __future__ import annotations

from collections.abc import Sequence

from ..attention import AttentionConfig
from ..config import UniSparseConfig
from ..errors import InvalidInput
from ..model.llama import Attention, Llama
from ..model.tokenizer import Tokenizer


def encode_prompt(model: Llama, tokenizer: Tokenizer, text: str, attention: Attention, raw: bool = False) -> list[int]:
    """The token ids of the prompt, as `generate` would read them.

    Raises:
        InvalidInput: no layer is sparse, or the prompt does not fill one block of a sparse layer and begin a second.
    """
    sparse_configs(attention, model.config.num_hidden_layers)
    token_ids = tokenizer.encode_prompt(text, raw=raw)
    check_length(model, token_ids, attention)
    return token_ids


def check_length(model: Llama, token_ids: Sequence[int], attention: Attention) -> None:
    """Raises InvalidInput as `encode_prompt`."""
    configs = sparse_configs(attention, model.config.num_hidden_layers)
    block_size = max(config.block_size for config in configs.values())
    if len(token_ids) <= block_size:
        raise InvalidInput(
            f"the prompt has {len(token_ids)} tokens, one block of {block_size} at most, so there is nothing to choose from: "
            "give a longer prompt, or a smaller --block-size"
        )


def sparse_configs(attention: Attention, num_layers: int) -> dict[int, UniSparseConfig]:
    """Layer -> config, of the layers that are sparse. Raises InvalidInput when there is none."""
    configs = {layer: config for layer, config in enumerate(per_layer(attention, num_layers)) if isinstance(config, UniSparseConfig)}
    if not configs:
        raise InvalidInput("0 layers are sparse, so nothing is left out and there is nothing to show: drop --attention dense")
    return configs


def per_layer(attention: Attention, num_layers: int) -> list[AttentionConfig]:
    """One config a layer."""
    return [attention] * num_layers if isinstance(attention, (str, UniSparseConfig)) else list(attention)


def sparse_layer(layer: int, configs: dict[int, UniSparseConfig], num_layers: int) -> int:
    """The layer's number, counted from the end when negative. Raises InvalidInput when it is dense or out of range."""
    layer = one_of("--layer", layer, num_layers)
    if layer not in configs:
        raise InvalidInput(f"--layer {layer} is dense, so it drops nothing: give one of {', '.join(map(str, configs))}")
    return layer


def one_of(name: str, value: int, count: int) -> int:
    """`value`, counted from the end when negative. Raises InvalidInput when there is no such layer, head or block."""
    if not -count <= value < count:
        raise InvalidInput(f"{name} {value} is out of range: there are {count}, so give 0 to {count - 1}, or -1 for the last")
    return value % count
