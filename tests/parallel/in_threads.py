"""Ranks that are threads of one process, of which one runs at a time: several ranks on one device, without MPI or NCCL."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from unisparse_np.parallel import Ranks, Single

SECONDS_TO_MEET = 60  # then a rank that does not come has failed


class Meeting:
    """Where some ranks exchange what they hold. turn: held by the one rank that runs."""

    def __init__(self, size: int, turn: threading.Lock) -> None:
        self.size, self.barrier, self.boxes, self.turn = size, threading.Barrier(size), [None] * size, turn

    def exchange(self, rank: int, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        self.boxes[rank] = value
        self._wait()
        values = list(self.boxes)
        self._wait()
        return values

    def _wait(self) -> None:
        self.turn.release()
        try:
            self.barrier.wait(SECONDS_TO_MEET)
        finally:
            self.turn.acquire()


def on_host(x: Any) -> np.ndarray:
    """A NumPy or CuPy array as NumPy."""
    return x.get() if hasattr(x, "get") else np.asarray(x)


class InThreads:
    """A Communicator among threads over arrays of one library."""

    def __init__(self, xp: Any, rank: int, meeting: Meeting) -> None:
        self.rank, self.size, self._xp, self._meeting = rank, meeting.size, xp, meeting

    def all_reduce(self, x: Any) -> Any:
        parts = [on_host(part) for part in self._meeting.exchange(self.rank, x.copy())]
        total = sum(part.astype(np.float32 if part.dtype.itemsize == 2 else part.dtype) for part in parts)
        return self._xp.asarray(total.astype(parts[0].dtype))

    def all_gather(self, x: Any) -> Any:
        return self._xp.asarray(np.stack([on_host(part) for part in self._meeting.exchange(self.rank, x.copy())]))

    def broadcast(self, value: Any) -> Any:
        return self._meeting.exchange(self.rank, value)[0]

    def gather_values(self, value: Any) -> list[Any]:
        return self._meeting.exchange(self.rank, value)


def on_ranks(xp: Any, tensor: int, context: int, work: Callable[[Ranks], Any]) -> list[Any]:
    """What work(ranks) gives on each rank of a grid of threads, in order of rank."""
    size, turn = tensor * context, threading.Lock()
    everyone = Meeting(size, turn)
    rows, columns = [Meeting(tensor, turn) for _ in range(context)], [Meeting(context, turn) for _ in range(tensor)]

    def run(rank: int) -> Any:
        row, column = rank // tensor, rank % tensor
        groups = InThreads(xp, column, rows[row]), InThreads(xp, row, columns[column])
        tensor_ranks, context_ranks = (group if group.size > 1 else Single() for group in groups)
        try:
            with turn:
                return work(Ranks(InThreads(xp, rank, everyone), tensor_ranks, context_ranks))  # type: ignore[arg-type]
        except BaseException:
            for meeting in (everyone, *rows, *columns):
                meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
