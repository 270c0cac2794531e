"""Device memory for one call: a few pieces, cut by offsets, instead of an array for everything."""

from __future__ import annotations

import math
from typing import Any

import cupy
import numpy as np

INT32, UINT32, FLOAT32 = np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.float32)
BOUNDARY = 256  # bytes; tensor maps and 16-byte loads need less


class Layout:
    """How one piece of memory is cut.

    Attributes:
        offsets: where each named piece begins, in bytes.
        size: bytes in all.
    """

    def __init__(self, **sizes: int) -> None:
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, size in sizes.items():
            self.offsets[name] = self.size
            self.size += -(-size // BOUNDARY) * BOUNDARY

    def addresses(self, first: int) -> dict[str, int]:
        """Each piece's address in memory that begins at `first`."""
        return {name: first + offset for name, offset in self.offsets.items()}


def allocate(size: int) -> Any:
    """Device memory from CuPy's pool, for the current stream: a cupy.cuda.MemoryPointer. Dropping it gives it back."""
    return cupy.cuda.alloc(size)


def bytes_of(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of an array."""
    return math.prod(shape) * np.dtype(dtype).itemsize


def new(shape: tuple[int, ...], dtype: Any) -> Any:
    """cupy.empty with less of the host's time; dtype a numpy.dtype."""
    return cupy.ndarray(shape, dtype, cupy.cuda.alloc(math.prod(shape) * dtype.itemsize))


class Room:
    """Room for an array that few will look at: to take it costs the host a microsecond, to make the array of it four.

    Attributes:
        address: where it is.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._shape, self._dtype = shape, dtype
        self._memory = cupy.cuda.alloc(math.prod(shape) * dtype.itemsize)
        self._array: Any = None
        self.address = self._memory.ptr

    @property
    def array(self) -> Any:
        """The array, made when it is first asked for."""
        if self._array is None:
            self._array = cupy.ndarray(self._shape, self._dtype, self._memory)
        return self._array


def array_of(x: Any) -> Any:
    """The array of a Room; an array, or None, as it is."""
    return x.array if isinstance(x, Room) else x


def address_of(x: Any) -> int:
    """Where a Room or an array is; 0 for None."""
    return 0 if x is None else x.address if isinstance(x, Room) else x.data.ptr


def view(memory: Any, offset: int, shape: tuple[int, ...], dtype: Any) -> Any:
    """An array that lies in this memory, and keeps it."""
    return cupy.ndarray(shape, dtype, memory + offset)
