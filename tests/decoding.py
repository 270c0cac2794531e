"""A decode step after another, checked against the reference: for the emulator's tests and for those on a GPU."""

from dataclasses import replace

import numpy as np

from unisparse_np import Problem, UniSparseConfig, reference
from unisparse_np.comparison import TOLERANCES, compare_anchors, compare_masks, compare_outputs, compare_values
from unisparse_np.problem import ceil_div


class Decoding:
    """A cache with random keys, values and queries, decoded by DecodeAttention over CuPy or the emulator's stand-in."""

    def __init__(self, config, q_heads, kv_heads, head_dim, capacity, dtype, seed=0):
        self.problem = Problem(q_heads, kv_heads, 1, capacity, head_dim, config if config != "dense" else UniSparseConfig(64))
        self.config, self.dtype = config, np.dtype(dtype)
        rng = np.random.default_rng(seed)
        self.q = (2 * rng.standard_normal((capacity, q_heads, head_dim))).astype(dtype)
        self.k, self.v = (rng.standard_normal((kv_heads, capacity, head_dim)).astype(dtype) for _ in range(2))

    def run(self, cupy, positions, poison=True):
        """Decodes at the positions, what lies between them pooled as a prompt is -> [(out [Hq, d], mask or None, summary or None)]."""
        from unisparse_np.gpu.cupy_kernels import RunningKeySummary
        from unisparse_np.gpu.cupy_kernels.decode_attention import DecodeAttention
        from unisparse_np.gpu.cupy_kernels.select import to_bool

        p = self.problem
        attention = DecodeAttention(p.num_q_heads, p.num_kv_heads, p.head_dim, p.k_len, self.config, self.dtype)
        keys, values = (cupy.asarray(np.full_like(x, np.nan if poison else 0)) for x in (self.k, self.v))
        k, v, q = (cupy.asarray(x) for x in (self.k, self.v, self.q))
        summary = running = None
        if self.config != "dense":
            running = RunningKeySummary(self.config, p.num_q_heads, p.num_kv_heads, p.head_dim, p.k_len, self.dtype)
            summary = running.whole()
        decoded = 0  # keys
        results = []
        for at in positions:
            if running is not None and at > decoded:
                running.extend(k[:, running.length : at])
            decoded = at + 1
            keys[:, :decoded], values[:, :decoded] = k[:, :decoded], v[:, :decoded]
            out = attention.launch(q[at], keys, values, cupy.asarray(np.array([at], np.int32)), summary)
            mask = None if summary is None else cupy.asnumpy(to_bool(attention.selector.mask, p)).copy()
            kept = None if summary is None else tuple(cupy.asnumpy(x).copy() for x in self.written(summary, decoded))
            results.append((cupy.asnumpy(out).copy(), mask, kept))
        return results

    def written(self, summary, keys):
        """The composites and anchors of so many keys: what lies behind them nobody has written."""
        config = self.config
        return summary.kc[:, : ceil_div(keys, config.k_compress)], summary.anchors[:, : ceil_div(keys, config.block_size)]

    def check(self, cupy, positions):
        """Every step within the tolerance table; its output on the mask that the device chose."""
        for at, (out, mask, summary) in zip(positions, self.run(cupy, positions), strict=True):
            self.check_step(at, out, mask, summary)

    def check_step(self, at, out, mask, summary):
        """One step against the reference on the keys so far."""
        problem = replace(self.problem, k_len=at + 1, q_offset=None)
        tolerance = TOLERANCES[self.dtype.name]
        q, k, v = (x.astype(np.float64) for x in (self.q[at][:, None], self.k[:, : at + 1], self.v[:, : at + 1]))
        if mask is None:
            mask = np.ones((problem.num_q_heads, 1, problem.num_k_blocks), bool)
        else:
            assert not mask[..., problem.num_k_blocks :].any()
            mask = mask[..., : problem.num_k_blocks]
            qc, kc = reference.compress(q, k, problem)
            mean, peak = reference.score_blocks(qc, kc, problem)
            expected = reference.select_blocks(mean, peak, problem)
            reports = [
                compare_values("kc", (summary[0][:, : kc.shape[1]],), (kc,), tolerance.scores, "composite keys"),
                compare_masks(mask, expected, mean, peak, problem, tolerance.scores),
            ]
            if problem.config.key_anchors:
                anchors = reference.find_anchors(k, problem.config.block_size, problem.config.key_anchors)
                reports.append(compare_anchors(summary[1][:, : anchors.shape[1]], anchors, k, tolerance.norms))
            assert all(report.ok for report in reports), (at, reports)
        expected_out, _ = reference.sparse_attention(q, k, v, mask, problem)
        report = compare_outputs(out[:, None], (q, k, v), expected_out, mask, problem, self.dtype.name)
        assert report.ok, (at, report)
