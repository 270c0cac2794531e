"""Kernel launches that cost the host little: arguments are packed straight into the memory that the driver reads them from.

CuPy's own call of a RawKernel looks at the type of every argument every time, about 10 us a launch; this takes plain numbers
whose types are read once from the kernel's signature, about 3 us.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from typing import Any

import cupy

from .shapes import SHAPE

ALIGNMENT = 64  # of a tensor map, the parameter that asks for most
_PARAMETERS = {  # C type -> (struct format, alignment)
    "pointer": ("Q", 8),
    "int64_t": ("q", 8),
    "int": ("i", 4),
    "float": ("f", 4),
    "Shape": (f"{SHAPE.itemsize}s", 4),
    "TensorMap": ("128s", ALIGNMENT),
}


class Launcher:
    """A compiled kernel, its thread block and its parameters. Called with a grid and the arguments: addresses and numbers as
    Python's own, structs as bytes. Safe from several threads and on any stream: the driver has copied the parameters on return.

    Args:
        kernel: a cupy.RawKernel.
        code: the source that defines it, with its name; the signature is read there.

    Attributes:
        function, threads, shared_bytes: what the driver is told.
        types, offsets, size, format: C types of the parameters, where each lies in a piece of so many bytes, and how they are packed.
    """

    def __init__(self, kernel: Any, code: str, name: str, threads: int, shared_bytes: int) -> None:
        self._kernel = kernel  # keeps the module loaded
        self.function = kernel.kernel.ptr
        self.threads, self.shared_bytes = threads, shared_bytes
        self.types = signature(code, name)
        text, self.offsets, self.size = parameter_layout(self.types)
        self.format = struct.Struct(text)
        self._memory = ctypes.create_string_buffer(self.size + ALIGNMENT)
        self._start = -ctypes.addressof(self._memory) % ALIGNMENT
        first = ctypes.addressof(self._memory) + self._start
        self._parameters = (ctypes.c_void_p * len(self.offsets))(*(first + offset for offset in self.offsets))
        self._parameters_at = ctypes.addressof(self._parameters)
        self._lock = threading.Lock()

    def __call__(self, columns: int, rows: int, *arguments: Any) -> None:
        """Launch a grid of columns x rows thread blocks on the current stream."""
        stream = cupy.cuda.get_current_stream().ptr
        with self._lock:
            self.format.pack_into(self._memory, self._start, *arguments)
            cupy.cuda.driver.launchKernel(
                self.function, columns, rows, 1, self.threads, 1, 1, self.shared_bytes, stream, self._parameters_at, 0
            )


def signature(code: str, name: str) -> list[str]:
    """The C types of a kernel's parameters, in order; any pointer is "pointer"."""
    found = re.search(rf"__global__[^;{{]*?\b{name}\(([^)]*)\)", code)
    assert found is not None, f"no kernel {name} in this source"
    types = []
    for parameter in found[1].split(","):
        words = re.sub(r"\b(const|__restrict__|__grid_constant__)\b", "", parameter).split()
        types.append("pointer" if "*" in parameter else words[0])
    return types


def parameter_layout(types: list[str]) -> tuple[str, list[int], int]:
    """(struct format with padding, each parameter's offset, bytes in all)."""
    text, offsets, size = "=", [], 0
    for kind in types:
        code, alignment = _PARAMETERS[kind]
        padding = -size % alignment
        text += f"{padding}x{code}" if padding else code
        offsets.append(size + padding)
        size += padding + struct.calcsize("=" + code)
    return text, offsets, size
