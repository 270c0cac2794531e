"""Prefill of an 8B- and a 70B-shaped Llama on the GPUs of one machine: speedup over one GPU, and the time in exchanges.

    python benchmarks/llama_multi_gpu.py                              every case that this machine has GPUs and memory for
    mpirun -n 4 python benchmarks/llama_multi_gpu.py --shape 8B --tokens 131072 --density 0.25 --context-parallel 2
    mpirun -n 2 python benchmarks/llama_multi_gpu.py --shape tiny --tokens 1024 --backend reference      tries the script

Weights are random bfloat16, so the density of sparse attention is given, as in llama_gpu.py. The time in exchanges is that
between events before and after each, so it holds what a rank waits for the slowest one. All ranks' medians; the slowest counts.
Results go to benchmarks/results/llama_multi_gpu_<device>.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import stamp, write_result
from benchmarks.given_density import LLAMA_3_1_8B, GivenDensity, prompt_of
from benchmarks.llama_gpu import device_name, warm_up
from benchmarks.random_llama import random_llama
from unisparse_np import UniSparseConfig
from unisparse_np.attention import load_model_backend
from unisparse_np.model.config import ModelConfig
from unisparse_np.parallel import Communicator, Ranks, arrange, world

SHAPES: dict[str, dict[str, int]] = {  # what differs from the 8B shape
    "8B": {},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 64, "vocab_size": 1000},
}  # fmt: skip
RUNS = 3  # after one to warm up
CASES = [  # shape, tokens, density (None: dense), tensor, context, runs (0: one, warmed up by the prompt's end alone)
    *(("8B", 131072, 0.25, *grid, RUNS) for grid in ((1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (1, 8))),
    ("70B", 131072, 0.25, 2, 1, 0),
    ("70B", 131072, 0.25, 4, 1, 0),
    ("70B", 131072, 0.25, 8, 1, 0),
    ("8B", 1048576, 0.10, 2, 1, 0),
    ("8B", 1048576, 0.25, 4, 1, 0),
    ("8B", 1048576, 0.25, 4, 2, 0),
    *(("8B", 131072, None, *grid, 1) for grid in ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (8, 1), (1, 8))),
]


class Clock:
    """Marks in the order of the work: events of CuPy's stream, or the wall clock on a host."""

    def __init__(self, backend: Any) -> None:
        self._cuda = backend.xp.cuda if backend.name == "cupy" else None

    def mark(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event()
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two marks that the device has passed."""
        return end - begin if self._cuda is None else self._cuda.get_elapsed_time(begin, end) / 1e3


class Timed:
    """A Communicator that keeps a mark before and after each exchange of arrays."""

    def __init__(self, ranks: Communicator, clock: Clock) -> None:
        self.rank, self.size, self._ranks, self._clock = ranks.rank, ranks.size, ranks, clock
        self.marks: list[tuple[Any, Any]] = []

    def all_reduce(self, x: Any) -> Any:
        return self._between_marks(self._ranks.all_reduce, x)

    def all_gather(self, x: Any) -> Any:
        return self._between_marks(self._ranks.all_gather, x)

    def broadcast(self, value: Any) -> Any:
        return self._ranks.broadcast(value)

    def seconds(self) -> float:
        """In exchanges since the last call."""
        total = sum(self._clock.seconds(*pair) for pair in self.marks)
        self.marks.clear()
        return total

    def _between_marks(self, exchange: Callable[[Any], Any], x: Any) -> Any:
        begin = self._clock.mark()
        result = exchange(x)
        if self.size > 1:
            self.marks.append((begin, self._clock.mark()))
        return result


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One case on the ranks that were started: the row, the same on all of them."""
    backend, everyone = load_model_backend(arguments.backend), world()
    ranks, clock = arrange(everyone, arguments.context_parallel, backend), Clock(backend)
    ranks = Ranks(everyone, Timed(ranks.tensor, clock), Timed(ranks.context, clock))
    config = replace(ModelConfig.from_dict(LLAMA_3_1_8B), **SHAPES[arguments.shape])
    model = random_llama(config, backend, arguments.tokens, ranks)
    token_ids = (prompt_of(arguments.tokens) % config.vocab_size).tolist()
    attention = "dense" if arguments.density is None else UniSparseConfig()
    given = backend.name == "cupy" and arguments.density is not None
    seconds, exchange = [], []
    with GivenDensity(arguments.density) if given else contextlib.nullcontext():
        if arguments.runs == 0:
            warm_up(model, arguments.tokens, attention)
            ranks.tensor.seconds(), ranks.context.seconds()
        for run in range(arguments.runs + 1):
            cache = model.new_cache(arguments.tokens, attention)
            everyone.gather_values(None)  # all start together
            begin = time.perf_counter()
            model.prefill(token_ids, cache, attention)  # the last logits come to the host: the device is done
            taken = time.perf_counter() - begin
            waited = ranks.tensor.seconds() + ranks.context.seconds()
            density = statistics.mean(model.layer_densities(cache))
            cache.release()
            if run > 0 or arguments.runs == 0:  # the first of several warms up
                seconds.append(taken)
                exchange.append(waited)
    of_ranks = everyone.gather_values((statistics.median(seconds), statistics.median(exchange)))
    slowest = max(taken for taken, _ in of_ranks)
    return {
        "shape": arguments.shape, "tokens": arguments.tokens, "given_density": arguments.density if given else None, "density": density,
        "tensor": ranks.tensor.size, "context": ranks.context.size, "seconds": slowest,
        "exchange_share": statistics.mean(waited for _, waited in of_ranks) / slowest,
        "device": device_name() if backend.name == "cupy" else "CPU",
    }  # fmt: skip


def device_count() -> int:
    import cupy

    count: int = cupy.cuda.runtime.getDeviceCount()
    return count


def all_cases() -> Iterator[dict[str, Any]]:
    """Each case in processes of its own; one that fails is shown and left out."""
    launcher, gpus = shutil.which("mpiexec"), device_count()
    for shape, tokens, density, tensor, context, runs in CASES:
        if tensor * context > gpus:
            continue
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            start = [] if tensor * context == 1 else [str(launcher), "-n", str(tensor * context)]
            case = ["--shape", shape, "--tokens", str(tokens), "--context-parallel", str(context), "--runs", str(runs), "--to", file.name]
            done = subprocess.run([*start, sys.executable, __file__, *case, *([] if density is None else ["--density", str(density)])])
            if done.returncode == 0:
                yield json.loads(Path(file.name).read_text())


def with_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with how many times faster than one GPU it is, where that was measured."""
    alone = {(row["shape"], row["tokens"], row["given_density"]): row["seconds"] for row in rows if row["tensor"] * row["context"] == 1}
    for row in rows:
        if (baseline := alone.get((row["shape"], row["tokens"], row["given_density"]))) is not None:
            row["speedup"] = baseline / row["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), help="one case, on the ranks that were started; unset: all cases")
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--density", type=float, help="share of attention to compute; unset: dense")
    parser.add_argument("--context-parallel", type=int, default=1)
    parser.add_argument("--backend", default="cupy")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape is None:
        about, rows = {"stamp": stamp("cupy-cuda13x", "mpi4py"), "config": LLAMA_3_1_8B, "shapes": SHAPES}, []
        for row in all_cases():  # written anew after each: a run that is stopped keeps what it has
            rows.append(row)
            name = row["device"].lower().replace(" ", "_")
            write_result(f"llama_multi_gpu_{name}", about | {"gpus": device_count(), "rows": with_speedups(rows)})
        return
    row = measure(arguments)
    if world().rank == 0:
        print(" ".join(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()), flush=True)
        if arguments.to:
            Path(arguments.to).write_text(json.dumps(row))


if __name__ == "__main__":
    main()
