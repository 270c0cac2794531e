"""What the benchmarks of an 8B-shaped model with random weights share: its shape, prompts, and a density that is given."""

from __future__ import annotations

from typing import Any

import numpy as np

LLAMA_3_1_8B = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "hidden_act": "silu", "torch_dtype": "bfloat16",
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
}  # fmt: skip


def prompt_of(tokens: int) -> np.ndarray:
    return np.random.default_rng(tokens).integers(0, LLAMA_3_1_8B["vocab_size"], tokens)


class GivenDensity:
    """Runs the real selection and puts a mask of a given density in its place, while the `with` lasts."""

    def __init__(self, density: float) -> None:
        self.density, self.masks = density, {}

    def __enter__(self) -> None:
        from unisparse_np.gpu import cupy_kernels
        from unisparse_np.gpu.cupy_kernels import run

        self.real_select = run._select
        self.real = {(run, "_select"): run._select, (cupy_kernels, "whole_layer"): cupy_kernels.whole_layer}
        run._select, cupy_kernels.whole_layer = self.select, None  # layers part by part: a call of the whole one has its own selection

    def __exit__(self, *_: object) -> None:
        for (module, name), function in self.real.items():
            setattr(module, name, function)

    def select(self, q: Any, k: Any, plan: Any, *rest: Any) -> tuple[Any, Any, Any]:
        _, anchors, scores = self.real_select(q, k, plan, *rest)
        if plan.problem not in self.masks:
            self.masks[plan.problem] = self.mask(plan.problem)
        return self.masks[plan.problem], anchors, scores

    def mask(self, problem: Any) -> Any:
        import cupy

        from unisparse_np.gpu.cupy_kernels.select import BlockMask

        size, anchors = problem.config.block_size, problem.config.key_anchors
        share = (self.density - anchors / size) / (1 - anchors / size)  # of blocks selected; the others give their anchors
        heads, rows, blocks = problem.num_composite_heads, problem.num_q_blocks, problem.num_k_blocks
        words = -(-blocks // 32)
        block = cupy.arange(words * 32)[None, :]
        last = (cupy.arange(rows) + problem.q_offset // size)[:, None]  # the diagonal
        forced = (block == 0) | (block == last) | (block == last - 1)  # [Nq, Nk]
        free = cupy.maximum(last - 2, 1)
        wanted = cupy.clip(((last + 1) * share - 3) / free, 0, 1)  # of the blocks that are not forced
        random = cupy.random.default_rng(problem.q_offset)
        kept = ((random.random((heads, rows, words * 32), dtype=np.float32) < wanted) | forced) & (block <= last)
        packed = cupy.packbits(kept.ravel(), bitorder="little").view(np.uint32).reshape(heads, rows, words)
        counts = kept.sum(axis=2, dtype=np.int32)
        return BlockMask(packed, counts, problem.config.head_compress)
