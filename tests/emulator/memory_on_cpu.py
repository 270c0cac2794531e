"""CuPy's memory and arrays, over NumPy's."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.emulator.kernel_on_cpu import Kernel


class MemoryPointer:
    """Device memory: a NumPy array of bytes, from an offset on."""

    device_id = 0

    def __init__(self, owner: Any, pointer: int) -> None:
        self.owner, self.ptr = owner, pointer

    def __add__(self, offset: int) -> MemoryPointer:
        return MemoryPointer(self.owner, self.ptr + offset)


def alloc(size: int) -> MemoryPointer:
    """cupy.cuda.alloc: memory nobody wrote, from a 512-byte boundary."""
    owner = np.empty(size + 512, np.uint8)
    owner[...] = unwritten()
    return MemoryPointer(owner, owner.ctypes.data + -owner.ctypes.data % 512)


def unwritten() -> int:
    """The byte that fills memory nobody wrote: it makes small numbers, or NaN."""
    return 0x3C if Kernel.seed % 2 else 0xFF


class ndarray(np.ndarray):
    """NumPy's array with CuPy's .data.ptr, and CuPy's way to make one over memory."""

    def __new__(cls, shape: tuple[int, ...], dtype: Any, memory: MemoryPointer) -> ndarray:
        offset = memory.ptr - memory.owner.ctypes.data
        return np.ndarray.__new__(cls, shape, dtype, memory.owner, offset)

    @property
    def data(self) -> MemoryPointer:  # type: ignore[override]
        return MemoryPointer(self, self.ctypes.data)

    def set(self, values: np.ndarray) -> None:
        """A copy from the host."""
        self[...] = values


class MemoryPool:
    """What the backend asks CuPy's pool; `limit` is what tests set."""

    limit = 0

    def free_bytes(self) -> int:
        return 0

    def used_bytes(self) -> int:
        return 0

    def total_bytes(self) -> int:
        return 1 << 20

    def get_limit(self) -> int:
        return MemoryPool.limit

    def free_all_blocks(self) -> None: ...


def viewing(function: Any) -> Any:
    """NumPy's function, its result an array of this module."""

    def call(*arguments: Any, **options: Any) -> Any:
        result = np.asarray(function(*arguments, **options))
        if function in (np.empty, np.empty_like):
            result.view(np.uint8)[...] = unwritten()
        return result.view(ndarray)

    return call
