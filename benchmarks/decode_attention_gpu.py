"""Attention of a decode step on the GPU, alone: dense over lengths, selection, and given shares of the blocks.

    PYTHONPATH=. python benchmarks/decode_attention_gpu.py

One query a head, 32 query heads, 8 KV heads, head_dim 128, bfloat16. All launches of a row are one CUDA graph, each on a cache of its own,
so that the L2 starts cold; "overlap" lets them begin while the one before them ends. Results go to
benchmarks/results/decode_attention_gpu_<device>.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from benchmarks.common import stamp, write_result
from unisparse_np import UniSparseConfig
from unisparse_np.gpu.cupy_kernels import RunningKeySummary
from unisparse_np.gpu.cupy_kernels.decode_attention import DecodeAttention
from unisparse_np.gpu.cupy_kernels.overlap import overlap_is_possible
from unisparse_np.gpu.cupy_kernels.select import from_bool
from unisparse_np.problem import KeySummary

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
L2_TIMES = 10  # caches that take turns hold so many times 50 MB
REPEATS = 5


def random_bfloat16(*shape: int) -> Any:
    """Normal random numbers, cut to 16 bits."""
    x = cupy.random.standard_normal(shape, dtype=np.float32)
    return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16).view(BFLOAT16)


def microseconds(launches: list[Callable[[], Any]]) -> float:
    """Median time of one launch, all of them in one graph."""
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        launches[0]()
        stream.begin_capture()
        for launch in launches:
            launch()
        graph = stream.end_capture()
        times = []
        for _ in range(REPEATS + 1):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record(stream)
            graph.launch(stream)
            stop.record(stream)
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop) * 1e3 / len(launches))
    return statistics.median(times[1:])


class Setting:
    """Caches of `length` keys that take turns, the newest key being the query's own."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.bytes_read = 2 * NUM_KV_HEADS * length * HEAD_DIM * 2
        count = max(2, L2_TIMES * (50 << 20) // self.bytes_read)
        self.caches = [tuple(random_bfloat16(NUM_KV_HEADS, length, HEAD_DIM) for _ in range(2)) for _ in range(count)]
        self.q = random_bfloat16(NUM_Q_HEADS, HEAD_DIM)
        self.position = cupy.asarray(np.array([length - 1], np.int32))

    def attention(self, config: UniSparseConfig | str) -> DecodeAttention:
        return DecodeAttention(NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, self.length, config, BFLOAT16)

    def summaries(self, config: UniSparseConfig) -> list[KeySummary]:
        found = []
        for keys, _ in self.caches:
            running = RunningKeySummary(config, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, self.length, BFLOAT16)
            running.extend(keys[:, : self.length - 1])
            found.append(running.whole())
        return found


def dense(setting: Setting, rows: list[dict]) -> None:
    attention = setting.attention("dense")
    for overlap in (False, True) if overlap_is_possible() else (False,):
        launches = [
            lambda k=k, v=v, overlap=overlap: attention.launch(setting.q, k, v, setting.position, overlap=overlap)  # type: ignore[misc]
            for k, v in setting.caches
        ]
        us = microseconds(launches * max(1, 16 // len(launches)))
        report(rows, work="dense", length=setting.length, overlap=overlap, us=us, tb_per_second=setting.bytes_read / us / 1e6)


def sparse(setting: Setting, config: UniSparseConfig, rows: list[dict]) -> None:
    """Selection as it is, and with attention over given random masks after it: one for the heads of a group, or one for each head."""
    attention, summaries, overlap = setting.attention(config), setting.summaries(config), overlap_is_possible()
    selector, q, position = attention.selector, setting.q, setting.position
    assert selector is not None
    work = list(zip(setting.caches, summaries, strict=True))

    def select(keys: Any, summary: KeySummary) -> None:
        selector.launch(q, keys, position, summary, overlap)

    selection = microseconds([lambda k=k, s=s: select(k, s) for (k, _), s in work] * 4)  # type: ignore[misc]
    scores = microseconds([lambda k=k, s=s: selector.score(q, k, position, s, overlap) for (k, _), s in work] * 4)  # type: ignore[misc]
    about = {"length": setting.length, "head_compress": config.head_compress, "overlap": overlap}
    report(rows, work="selection", **about, us=selection, us_of_scores=scores)
    blocks, rng = attention.problem.num_k_blocks, np.random.default_rng(1)
    for share in (0.1, 0.25, 0.5):
        for masks in (NUM_KV_HEADS, NUM_Q_HEADS):
            if NUM_Q_HEADS // masks < config.head_compress:
                continue
            mask = np.repeat(rng.random((masks, 1, blocks)) < share, NUM_Q_HEADS // masks, axis=0)[:: config.head_compress]
            words = from_bool(cupy.asarray(mask)).words

            def attend(k: Any, v: Any, s: KeySummary, words: Any = words) -> None:
                attention.attend(q, k, v, position, words, s)

            alone = microseconds([lambda c=c, s=s: attend(*c, s) for c, s in work] * 4)  # type: ignore[misc]
            whole = microseconds([lambda c=c, s=s: (select(c[0], s), attend(*c, s)) for c, s in work] * 4)  # type: ignore[misc]
            report(rows, work="given mask", **about, share=share, masks=masks, us=alone, us_with_selection=whole)


def report(rows: list[dict], **row: Any) -> None:
    rows.append(row)
    print("  ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()), flush=True)


def main() -> None:
    rows: list[dict] = []
    for length in (8 << 10, 32 << 10, 128 << 10):
        setting = Setting(length)
        dense(setting, rows)
        for head_compress in (1, NUM_Q_HEADS // NUM_KV_HEADS):
            if length != 32 << 10:
                sparse(setting, UniSparseConfig(head_compress=head_compress), rows)
    name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode().lower().replace(" ", "_")
    print(write_result(f"decode_attention_gpu_{name}", {"stamp": stamp("cupy-cuda13x"), "rows": rows}))


if __name__ == "__main__":
    main()
