"""UniSparse token by token in float64, with no regard for speed: the second opinion that the reference is tested against.

Written from ALGORITHM.md alone, with plain loops and none of the package's index arithmetic.
"""

import math

import numpy as np


def oracle(q, k, v, config, causal=True, q_offset=None, scale=None):
    """q [Hq, Lq, d], k, v [Hkv, Lk, d] -> dict of mean, peak [Hc, Nq, Nk], mask [Hq, Nq, Nk], out, lse."""
    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    num_q_heads, q_len, dim = q.shape
    num_kv_heads, k_len, _ = k.shape
    size, c_h = config.block_size, config.head_compress
    fine, coarse = (config.q_compress, config.k_compress), (config.top_p_compress,) * 2
    group = num_q_heads // num_kv_heads
    scale = 1 / math.sqrt(dim) if scale is None else scale
    offset = (k_len - q_len if q_offset is None else q_offset) if causal else 0
    num_heads, q_blocks, k_blocks = num_q_heads // c_h, math.ceil(q_len / size), math.ceil(k_len / size)
    mean, peak = np.zeros((num_heads, q_blocks, k_blocks)), np.zeros((num_heads, q_blocks, k_blocks))
    mask = np.zeros((num_q_heads, q_blocks, k_blocks), dtype=bool)
    for h in range(num_heads):
        heads = range(h * c_h, (h + 1) * c_h)
        kv_heads = sorted({head // group for head in heads})
        for i in range(q_blocks):
            last = offset + min(q_len, (i + 1) * size) - 1
            visible = [j for j in range(k_blocks) if not causal or j * size <= last]
            rows = {}
            for widths in (fine, fine if config.top_p_compress is None else coarse):
                tokens = [t for t in range(math.ceil(q_len / widths[0])) if t * widths[0] // size == i]
                rows[widths] = [_block_masses(q, k, heads, kv_heads, t, *widths, size, causal, offset, scale, k_blocks) for t in tokens]
            peak[h, i], mean[h, i] = np.max(rows[fine], axis=0), np.mean(rows[widths], axis=0)
            kept = _kept_blocks(mean[h, i], peak[h, i], visible, h, config)
            if causal:
                first = offset + i * size
                kept |= {j for j in visible if first // size - config.local_blocks <= j <= last // size}
            kept |= {j for j in visible if j < config.sink_blocks}
            for head in heads:
                mask[head, i, sorted(kept)] = True
    out, lse = attend(q, k, v, mask, config, causal, offset, scale)
    return {"mean": mean, "peak": peak, "mask": mask, "out": out, "lse": lse}


def _block_masses(q, k, heads, kv_heads, t, c_q, c_k, size, causal, offset, scale, k_blocks):
    """One composite query's attention mass in each key block."""
    tokens = range(t * c_q, min(q.shape[1], (t + 1) * c_q))
    query = np.mean([np.mean([q[h, n] for n in tokens], axis=0) for h in heads], axis=0)
    logits = {}
    for u in range(math.ceil(k.shape[1] / c_k)):
        if not causal or u * c_k <= offset + tokens[-1]:
            members = range(u * c_k, min(k.shape[1], (u + 1) * c_k))
            key = np.mean([np.mean([k[h, n] for n in members], axis=0) for h in kv_heads], axis=0)
            logits[u] = float(query @ key) * scale
    highest = max(logits.values())
    weights = {u: math.exp(z - highest) for u, z in logits.items()}
    masses = np.zeros(k_blocks)
    for u, w in weights.items():
        masses[u * c_k // size] += w / sum(weights.values())
    return masses


def _kept_blocks(mean, peak, visible, h, config):
    """Step 4 for one row."""
    kept = set()
    top_p = config.top_p[h] if isinstance(config.top_p, tuple) else config.top_p
    tau = config.row_threshold[h] if isinstance(config.row_threshold, tuple) else config.row_threshold
    if top_p is not None:
        running = 0.0
        for j in sorted(visible, key=lambda j: (-mean[j], j)):
            if running >= top_p and top_p < 1:
                break
            kept.add(j)
            running += mean[j]
    if tau is not None:
        kept |= {j for j in visible if peak[j] > tau}
    return kept


def attend(q, k, v, mask, config, causal, offset, scale):
    """Step 6 with the mask given, one query at a time."""
    num_q_heads, q_len, _ = q.shape
    group, size, k_len = num_q_heads // k.shape[0], config.block_size, k.shape[1]
    out, lse = np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    for h in range(num_q_heads):
        keys, values = k[h // group], v[h // group]
        anchors = {}
        for j in range(math.ceil(k_len / size)):
            members = range(j * size, min(k_len, (j + 1) * size))
            anchors[j] = sorted(members, key=lambda n: (float(keys[n] @ keys[n]), n))[: config.key_anchors]
        for n in range(q_len):
            i, position = n // size, offset + n
            seen = []
            for j in range(math.ceil(k_len / size)):
                members = range(j * size, min(k_len, (j + 1) * size)) if mask[h, i, j] else anchors[j]
                last = offset + min(q_len, (i + 1) * size) - 1
                if not causal or j * size <= last:
                    seen += [m for m in members if not causal or m <= position]
            if seen:
                logits = keys[seen] @ q[h, n] * scale
                highest = logits.max()
                weights = np.exp(logits - highest)
                out[h, n] = weights @ values[seen] / weights.sum()
                lse[h, n] = highest + math.log(weights.sum())
    return out, lse
