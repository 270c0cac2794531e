"""A scheduler for Numba's simulator, where a CUDA thread is a Python thread. Nothing here touches a GPU.

Numba lets all threads of a CUDA block run at once and waits for them in a busy loop. That has two faults: threads that come to
the line of a shared array together can get an array each (there is no lock), and every `syncthreads` costs several turns of
the interpreter's 5 ms. Here one thread runs at a time, in order, until it reaches `syncthreads` or its end, and hands over to
the next. Launches are then the same every time, a debugger steps through one thread undisturbed, and they are about ten
times as fast.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba.cuda.simulator.kernel import BlockManager, BlockThread


def one_thread_at_a_time() -> None:
    """Put the scheduler in the place of Numba's, for the whole process."""
    BlockManager.run = _run_block
    BlockThread.syncthreads = _wait_for_all


def _run_block(self: Any, block: tuple[int, ...], *arguments: Any) -> None:
    """Run one CUDA block to its end. Raises what the first failing thread raised."""
    self.turn_over = _taken_lock()
    threads = [_Turns(self, block, thread, arguments) for thread in np.ndindex(*self._block_dim)]
    for thread in threads:
        thread.start()
        self.turn_over.acquire()
    while not any(thread.failed() for thread in threads) and (waiting := [thread for thread in threads if thread.at_barrier]):
        for thread in waiting:
            thread.resume()
            self.turn_over.acquire()
    for thread in threads:
        thread.stop()
    for thread in threads:
        if thread.exception:
            raise thread.exception[0].with_traceback(thread.exception[1])


class _Turns(BlockThread):
    """A thread of a CUDA block that runs only in its turn."""

    def __init__(self, manager: Any, block: tuple[int, ...], thread: tuple[int, ...], arguments: tuple) -> None:
        super().__init__(lambda: manager._f(*arguments), manager, block, thread, manager._debug)
        self.my_turn = _taken_lock()
        self.at_barrier = False

    def run(self) -> None:
        super().run()  # keeps an exception in self.exception
        self._manager.turn_over.release()

    def failed(self) -> bool:
        return self.exception is not None

    def resume(self) -> None:
        self.at_barrier = False
        self.my_turn.release()

    def stop(self) -> None:
        """End a thread that still waits because another one failed."""
        if self.at_barrier:
            self.abort = True
            self.resume()
        self.join()


def _wait_for_all(self: Any) -> None:
    """cuda.syncthreads: give the turn away until every thread has come here."""
    self.at_barrier = True
    self._manager.turn_over.release()
    self.my_turn.acquire()
    if self.abort:
        raise RuntimeError("another thread of the block failed")


def _taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock
