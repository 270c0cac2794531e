"""What a config costs, as a share of dense attention: the cost model of ALGORITHM.md, for machines whose time says little."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import UniSparseConfig
from ..model.llama import Attention


def selection_share(config: UniSparseConfig) -> float:
    """Products of the compressed attention over those of dense attention: L^2 Hq d / (c_q c_k c_h) over 2 L^2 Hq d.

    With top_p_compress there are two compressed attentions, one a rule.
    """
    products = 1.0 / (config.q_compress * config.k_compress)
    if config.top_p_compress is not None:
        products += 1.0 / config.top_p_compress**2
    return products / (2 * config.head_compress)


def modelled_cost(attention: Attention, densities: Sequence[float]) -> float:
    """Selection and attention of all layers as a share of dense attention's products. densities: one a layer, anchors included."""
    layers = [attention] * len(densities) if isinstance(attention, (str, UniSparseConfig)) else attention
    shares = [selection_share(layer) if isinstance(layer, UniSparseConfig) else 0.0 for layer in layers]
    return sum(share + density for share, density in zip(shares, densities, strict=True)) / len(densities)
