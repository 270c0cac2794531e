"""Attention and selection on the GPU against PyTorch's own attention kernels, in one process.

    PYTHONPATH=. python benchmarks/attention_gpu.py [--quick]

q [32, L, 128], k, v [8, L, 128], bfloat16, causal, batch 1. Median of CUDA-event times, CuPy and PyTorch both on
the default stream; sparse rates count listed blocks.
PyTorch runs flash (FlashAttention 2) and cuDNN attention, and FlexAttention on the very same block mask. A single wide
matrix product marks the ceiling. Results go to benchmarks/results/attention_gpu_<device>.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.common import stamp, write_result
from unisparse_np import Problem, UniSparseConfig
from unisparse_np.gpu import cupy_kernels as engine
from unisparse_np.gpu.cupy_kernels import attend
from unisparse_np.gpu.cupy_kernels.compress import pool
from unisparse_np.gpu.cupy_kernels.plan import plan_of
from unisparse_np.gpu.cupy_kernels.run import _select
from unisparse_np.gpu.cupy_kernels.scores import score_units
from unisparse_np.gpu.cupy_kernels.select import from_bool, select_words

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
SCRATCH_BYTES = 1 << 29
FINE_KEYS = UniSparseConfig(block_size=64, q_compress=4, k_compress=2, top_p=0.95, row_threshold=0.02, top_p_compress=8)
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


def median_ms(run: Callable[[], Any], budget_ms: float = 150.0) -> float:
    """Median milliseconds of the device's time for one call, after two to warm up.

    Half a gigabyte is overwritten before each: the L2 starts cold, and the host prepares the launches meanwhile.
    """
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    scratch = cupy.empty(SCRATCH_BYTES, np.uint8)

    def once() -> float:
        scratch.fill(0)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return cupy.cuda.get_elapsed_time(start, stop)

    run()
    first = once()
    return statistics.median(once() for _ in range(int(min(30, max(3, budget_ms / max(first, 0.01))))))


def inputs(length: int, dim: int = HEAD_DIM) -> list[torch.Tensor]:
    torch.manual_seed(length)
    return [torch.randn(heads, length, dim, device="cuda", dtype=torch.bfloat16) for heads in (NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS)]


def as_cupy(x: torch.Tensor) -> Any:
    return cupy.from_dlpack(x.view(torch.int16)).view(ml_dtypes.bfloat16)


def torch_sdpa(kind: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with sdpa_kernel(SDPA[kind]):
            return torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]

    return run


def dense(length: int, rows: list) -> None:
    q, k, v = inputs(length)
    flop = 2.0 * length * length * HEAD_DIM * NUM_Q_HEADS
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM)
    q_, k_, v_ = map(as_cupy, (q, k, v))
    runs = {kind: torch_sdpa(kind, q, k, v) for kind in SDPA} | {"ours": lambda: engine.run_dense(q_, k_, v_, problem)}
    for name, run in runs.items():
        report(rows, work="dense", length=length, kernel=name, ms=median_ms(run), flop=flop)
    ours, theirs = torch.from_dlpack(runs["ours"]()[0].view(np.int16)).view(torch.bfloat16), runs["flash"]()
    difference = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    rows[-1]["relative_difference_to_flash"] = float(difference)
    assert difference < 1e-2, difference


def dense_sm80(length: int, rows: list) -> None:
    q_, k_, v_ = map(as_cupy, inputs(length))
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM)
    hopper, attend.HOPPER_HEAD_DIMS = attend.HOPPER_HEAD_DIMS, ()
    ms = median_ms(lambda: engine.run_dense(q_, k_, v_, problem))
    attend.HOPPER_HEAD_DIMS = hopper
    report(rows, work="dense", length=length, kernel="ours sm80", ms=ms, flop=2.0 * length * length * HEAD_DIM * NUM_Q_HEADS)


def random_mask(length: int, density: float, size: int) -> np.ndarray:
    """[Hq, Nq, Nk] bool: each block below the diagonal with this probability, and the diagonal."""
    blocks = length // size
    rng = np.random.default_rng(0)
    mask = np.tril(rng.random((NUM_Q_HEADS, blocks, blocks)) < density, -1)
    return mask | np.eye(blocks, dtype=bool)


def listed_flop(mask: np.ndarray, size: int, dim: int) -> float:
    diagonal = mask.shape[0] * mask.shape[1]
    return 4.0 * size * size * dim * (float(mask.sum()) - 0.5 * diagonal)


def sparse(length: int, density: float, rows: list, dim: int = HEAD_DIM, size: int = 128, with_flex: bool = False) -> None:
    q, k, v = inputs(length, dim)
    config = UniSparseConfig(block_size=size, key_anchors=0)
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, dim, config)
    mask = random_mask(length, density, size)
    words = from_bool(cupy.asarray(mask))
    q_, k_, v_ = map(as_cupy, (q, k, v))
    flop = listed_flop(mask, size, dim)
    ms = median_ms(lambda: attend.attend(q_, k_, v_, words, None, plan_of(problem)))
    report(rows, work="sparse", length=length, kernel="ours", ms=ms, flop=flop, density=density, head_dim=dim, block_size=size)
    if with_flex:
        ms = median_ms(flex(q, k, v, mask))
        report(rows, work="sparse", length=length, kernel="flex", ms=ms, flop=flop, density=density, head_dim=dim, block_size=size)


def flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: np.ndarray) -> Callable[[], torch.Tensor]:
    """FlexAttention on the same mask: whole blocks below the diagonal, the diagonal by token."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    off = torch.tensor(np.tril(mask, -1), device="cuda")
    full_count = off.sum(-1, dtype=torch.int32)[None]
    full_index = torch.argsort(off.int(), dim=-1, descending=True, stable=True).int()[None]
    blocks = mask.shape[1]
    one = torch.ones_like(full_count)
    diagonal = torch.zeros_like(full_index)
    diagonal[..., 0] = torch.arange(blocks, device="cuda")
    block_mask = BlockMask.from_kv_blocks(
        one, diagonal, full_count, full_index, BLOCK_SIZE=128, mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(q.shape[1], k.shape[1])
    )
    return lambda: compiled(q[None], k[None], v[None], block_mask=block_mask, enable_gqa=True)


def selection(length: int, name: str, config: UniSparseConfig, rows: list) -> None:
    q, k, _ = map(as_cupy, inputs(length))
    plan = plan_of(Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM, config))

    def pooled() -> Any:
        return pool(q, k, plan, np.float16, with_keys=True, with_anchors=config.key_anchors > 0)

    qc, kc, _ = pooled()
    units, peak = score_units(qc, kc, plan)

    def whole() -> None:
        _select(q, k, plan, None, False, None)  # as run_sparse does it: the merger of scores may select as well

    parts = {
        "compress": pooled,
        "score_blocks": lambda: score_units(qc, kc, plan),
        "select_blocks": lambda: select_words(units, peak, plan),
        "all": whole,
    }
    for part, run in parts.items():
        report(rows, work=f"selection, {name}", length=length, kernel=part, ms=median_ms(run))


def whole_call(length: int, top_p: float, rows: list) -> None:
    q, k, v = map(as_cupy, inputs(length))
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM, UniSparseConfig(top_p=top_p))
    density = engine.run_sparse(q, k, v, problem)[1].density
    ms = median_ms(lambda: engine.run_sparse(q, k, v, problem))
    report(rows, work="whole call", length=length, kernel="ours", ms=ms, density=round(density, 4))


def anchors(length: int, density: float, rows: list) -> None:
    """What the anchor keys cost: the attention stage with and without them on one random mask."""
    q, k, v = map(as_cupy, inputs(length))
    words = from_bool(cupy.asarray(random_mask(length, density, 128)))
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, length, length, HEAD_DIM, UniSparseConfig())
    positions = engine.find_anchors(k, 128, 1)
    for name, given in (("without anchors", None), ("with anchors", positions)):
        ms = median_ms(lambda given=given: attend.attend(q, k, v, words, given, plan_of(problem)), 800.0)
        report(rows, work="sparse", length=length, kernel=name, ms=ms, density=density)


def host_time(rows: list) -> None:
    """Host time of a small call: how long until the call returns, the GPU left behind; alone, and as one of twenty in a row.

    Last the same alone, when the shape has come so often that its launches are CUDA graphs.
    """
    q, k, v = map(as_cupy, inputs(1024))
    problem = Problem(NUM_Q_HEADS, NUM_KV_HEADS, 1024, 1024, HEAD_DIM)
    runs = {"ours": lambda: engine.run_sparse(q, k, v, problem), "ours, dense": lambda: engine.run_dense(q, k, v, problem)}
    for kernel, run in runs.items():
        for work, calls in (("host time of one call", 1), ("host time of one of 20 calls", 20), ("host time of one call, as graphs", 1)):
            times = []
            for _ in range(30):
                cupy.cuda.Device().synchronize()
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times.append((time.perf_counter() - start) * 1e3 / calls)
            report(rows, work=work, length=1024, kernel=kernel, ms=statistics.median(times))


def matmul_ceiling(rows: list) -> None:
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    report(rows, work="matrix product 8192^3", length=8192, kernel="cuBLAS", ms=median_ms(lambda: a @ b), flop=2.0 * 8192**3)


def report(rows: list, *, flop: float | None = None, **row: Any) -> None:
    row["ms"] = round(row["ms"], 4)
    if flop is not None:
        row["tflops"] = round(flop / row["ms"] / 1e9, 1)
    rows.append(row)
    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="no FlexAttention, no 128K")
    quick = parser.parse_args().quick
    rows: list[dict[str, Any]] = []
    matmul_ceiling(rows)
    for length in (8192, 32768) if quick else (8192, 32768, 131072):
        dense(length, rows)
    dense_sm80(32768, rows)
    for density in (0.25, 0.5):
        sparse(32768, density, rows, with_flex=not quick)
    sparse(32768, 0.25, rows, dim=64, size=64)
    sparse(32768, 0.25, rows, dim=64, size=128)
    sparse(32768, 0.25, rows, dim=128, size=64)
    for length in (8192, 32768) if quick else (8192, 32768, 131072):
        selection(length, "c = 8", UniSparseConfig(), rows)
        if length > 8192:
            selection(length, "precise", UniSparseConfig.precise(), rows)
            selection(length, "balanced", UniSparseConfig.balanced(), rows)
            selection(length, "Top-P with c = 8, row threshold with c_q 4, c_k 2", FINE_KEYS, rows)
    if not quick:
        selection(131072, "head_compress = 4", UniSparseConfig(head_compress=4), rows)
        selection(131072, "c = 32", UniSparseConfig(q_compress=32, k_compress=32), rows)
        whole_call(131072, 0.47, rows)
        whole_call(131072, 0.09, rows)
        anchors(131072, 0.1, rows)
    host_time(rows)
    device = torch.cuda.get_device_name().lower().replace(" ", "_")
    facts = {"device": torch.cuda.get_device_name(), "driver": cupy.cuda.runtime.driverGetVersion(), "torch": torch.__version__}
    result = {"stamp": stamp("cupy-cuda13x") | facts, "rows": rows}
    print(write_result(f"attention_gpu_{device}", result))


if __name__ == "__main__":
    main()
