"""Random small problems for the property tests: shapes, configs and inputs that every rule of ALGORITHM.md allows."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from unisparse_np import UniSparseConfig


def divisors(n):
    return [c for c in range(1, n + 1) if n % c == 0]


def legal_head_compress(num_q_heads, group):
    return [c for c in divisors(num_q_heads) if group % c == 0 or c % group == 0]


def legal_top_p_compress(config):
    """None, and every size that Top-P's own composite tokens may have."""
    if config.top_p is None or config.row_threshold is None:
        return [None]
    finest = math.lcm(config.q_compress, config.k_compress)
    return [None, *(c for c in divisors(config.block_size) if c % finest == 0)]


@st.composite
def problems(draw, causal=None, rules=None, **fixed):
    """(q, k, v, config, keywords of unisparse_attention). Block sizes are small so that few tokens make many blocks."""
    size = draw(st.sampled_from([4, 8, 16]))
    group, num_kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (4, 2), (3, 1)]))
    num_q_heads, dim = group * num_kv_heads, draw(st.sampled_from([1, 3, 8]))
    is_causal = draw(st.booleans()) if causal is None else causal
    k_len = draw(st.integers(1, 6 * size))
    q_len = draw(st.integers(1, k_len if is_causal else 5 * size))
    q_offset = draw(st.sampled_from([None, 0, (k_len - q_len) // 2])) if is_causal else None
    rules = draw(st.sampled_from(["top_p", "row", "both"])) if rules is None else rules
    values = {
        "block_size": size,
        "q_compress": draw(st.sampled_from(divisors(size))),
        "k_compress": draw(st.sampled_from(divisors(size))),
        "head_compress": draw(st.sampled_from(legal_head_compress(num_q_heads, group))),
        "top_p": draw(st.sampled_from([0.1, 0.5, 0.9, 0.95, 1.0])) if rules != "row" else None,
        "row_threshold": draw(st.sampled_from([0.02, 0.1, 0.4])) if rules != "top_p" else None,
        "key_anchors": draw(st.integers(0, 3)),
        "sink_blocks": draw(st.integers(0, 2)),
        "local_blocks": draw(st.integers(0, 2)),
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.sampled_from([0.3, 1.0, 4.0]))  # peaked and flat attention
    q = spread * rng.standard_normal((num_q_heads, q_len, dim))
    k, v = (rng.standard_normal((num_kv_heads, k_len, dim)) for _ in range(2))
    config = UniSparseConfig(**(values | fixed))
    if "top_p_compress" not in fixed:
        config = replace(config, top_p_compress=draw(st.sampled_from(legal_top_p_compress(config))))
    return q, k, v, config, {"causal": is_causal, "q_offset": q_offset}
