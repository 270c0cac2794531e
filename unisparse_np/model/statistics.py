"""What one generation cost: times by the wall clock, densities of the prefill, peak memory of the process and of the GPU."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Statistics:
    """Times in seconds, rates in tokens per second, memory in bytes.

    prefill_seconds: the pass over the prompt.
    time_to_first_token: from the call to the first token chosen, tokenizing included.
    decode_seconds: all steps after the first token (which the prefill yields), without what the caller does in between;
        decode_tokens_per_second is over those steps, 0 where there is none.
    densities: kept / visible blocks of the prefill, one ratio a layer, and their mean, lowest and highest.
    peak_memory_bytes: largest resident size of the process so far.
    device_peak_memory_bytes: the most the process has held on its GPU so far; None without one.
    compile_seconds: of the prefill and decode times, what went into compiling kernels, or fetching compiled ones from disk;
        None where nothing is compiled.
    processes: that computed this together; memory is then that of the one with the most.
    busiest_rank: blocks kept by the process that kept the most, over their mean: what the others wait for. None for one process.
    load_seconds: filled in by whoever loaded the model (`dataclasses.replace`), otherwise None.
    """

    prompt_tokens: int
    prefill_seconds: float
    prefill_tokens_per_second: float
    time_to_first_token: float
    generated_tokens: int
    decode_seconds: float
    decode_tokens_per_second: float
    densities: list[float]
    density_mean: float
    density_lowest: float
    density_highest: float
    peak_memory_bytes: int
    device_peak_memory_bytes: int | None = None
    compile_seconds: float | None = None
    processes: int = 1
    busiest_rank: float | None = None
    load_seconds: float | None = None


@dataclass
class Stopwatch:
    """What is measured while tokens are made; `statistics` turns it into the final figures."""

    started: float
    backend: Any  # asked at the end for what only it knows
    compile_seconds_before: float = field(init=False)
    prefill_seconds: float = 0.0
    time_to_first_token: float = 0.0
    decode_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.compile_seconds_before = self._compile_seconds() or 0.0

    def statistics(self, prompt_tokens: int, generated_tokens: int, densities: list[float]) -> Statistics:
        """densities: one ratio a layer, at least one layer. generated_tokens: the token that ended the answer included."""
        memory, compile_seconds = self.backend.layers.memory, self._compile_seconds()
        return Statistics(
            prompt_tokens=prompt_tokens,
            prefill_seconds=self.prefill_seconds,
            prefill_tokens_per_second=_rate(prompt_tokens, self.prefill_seconds),
            time_to_first_token=self.time_to_first_token,
            generated_tokens=generated_tokens,
            decode_seconds=self.decode_seconds,
            decode_tokens_per_second=_rate(generated_tokens - 1, self.decode_seconds),
            densities=densities,
            density_mean=sum(densities) / len(densities),
            density_lowest=min(densities),
            density_highest=max(densities),
            peak_memory_bytes=peak_memory_bytes(),
            device_peak_memory_bytes=None if memory is None else memory.peak_bytes(),
            compile_seconds=None if compile_seconds is None else compile_seconds - self.compile_seconds_before,
        )

    def _compile_seconds(self) -> float | None:
        ask = getattr(self.backend, "compile_seconds", None)
        return None if ask is None else ask()


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0
