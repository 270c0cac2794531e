"""Launches recorded once and replayed with other addresses: what a call costs the host is then little more than the driver's own time,
and less once a program that runs again and again over the same memory has become a CUDA graph.

A stage describes its launches (`Launch`) from addresses alone. Given real ones they can be made at once; given symbolic ones
(`base(n)` + offset stands for "the n-th address of a call + offset") they become a Program.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import cupy

from .device import move_tensor_map, tensor_map
from .graph import Call, KernelGraph, NoRoomForGraph
from .launch import ALIGNMENT, Launcher

STEP = 1 << 52  # symbolic addresses begin above every real one
RUNS_BEFORE_GRAPH = 100  # over the same addresses: the layers of a model each bring others, and single launches cost less than a change


class TensorMap(NamedTuple):
    """What device.tensor_map encodes: an array [H, L, d] of 16-bit elements (strides in elements), in boxes of so many rows and columns."""

    address: int
    heads: int
    length: int
    dim: int
    head_stride: int
    row_stride: int
    is_float16: bool
    box_rows: int
    box_columns: int


class Launch(NamedTuple):
    """A kernel, its grid of columns x rows thread blocks, and its arguments: numbers, addresses, structs as bytes, TensorMaps."""

    launcher: Launcher
    columns: int
    rows: int
    arguments: tuple[Any, ...]

    def now(self) -> None:
        """Make the launch."""
        arguments = (tensor_map(*x) if isinstance(x, TensorMap) else x for x in self.arguments)
        self.launcher(self.columns, self.rows, *arguments)


def launch_all(launches: Iterable[Launch]) -> None:
    """Make the launches, one after the other on the current stream."""
    for launch in launches:
        launch.now()


def base(n: int) -> int:
    """The symbolic address of the n-th piece of memory of a call."""
    return (n + 1) * STEP


class Program:
    """Recorded launches. Safe from several threads and on any stream: the driver has copied the parameters when `run` returns.

    Parameters lie where they stay. Those that are symbolic addresses point into one table, which `run` fills; tensor maps are
    encoded once, and get another address where it has changed. RUNS_BEFORE_GRAPH runs over the same addresses make it one graph, until
    they change; a stream that is captured gets single launches, and so does everything where no memory is left for a graph.
    """

    def __init__(self, launches: Iterable[Launch]) -> None:
        self._launches = list(launches)  # keeps the kernels
        self._cells: dict[int, int] = {}  # symbolic address -> place in the table
        for launch in self._launches:
            for kind, x in zip(launch.launcher.types, launch.arguments, strict=True):
                if kind == "pointer" and x >= STEP:
                    self._cells.setdefault(x, len(self._cells))
        room = sum(-(-launch.launcher.size // ALIGNMENT) * ALIGNMENT for launch in self._launches)
        self._memory = ctypes.create_string_buffer(8 * len(self._cells) + room + 2 * ALIGNMENT)
        self._bytes, self._start = memoryview(self._memory).cast("B"), ctypes.addressof(self._memory)
        self._first = -self._start % ALIGNMENT
        self._table = struct.Struct(f"={len(self._cells)}Q")
        self._sources = [(x // STEP - 1, x % STEP) for x in self._cells]
        self._maps: list[list[Any]] = []  # [source, offset, map, place, address that it has]
        self._calls: list[Call] = []
        self._arrays: list[Any] = []  # of pointers to parameters
        self._addresses: tuple[int, ...] | None = None  # of the last run
        self._runs = 0  # over these addresses, before there is a graph
        self._graph: KernelGraph | None = None
        self._lock = threading.Lock()
        place = self._first + -(-8 * len(self._cells) // ALIGNMENT) * ALIGNMENT
        for launch in self._launches:
            self._add(launch, place)
            place += -(-launch.launcher.size // ALIGNMENT) * ALIGNMENT

    def _add(self, launch: Launch, place: int) -> None:
        """Pack a launch's constant parameters from `place` on, and note where the others are to be found."""
        launcher, start = launch.launcher, self._start
        packed: list[Any] = []
        parameters = (ctypes.c_void_p * len(launch.arguments))()
        for n, (kind, x, offset) in enumerate(zip(launcher.types, launch.arguments, launcher.offsets, strict=True)):
            parameters[n] = start + place + offset
            if isinstance(x, TensorMap):
                self._maps.append([x.address // STEP - 1, x.address % STEP, x[1:], place + offset, None])
                packed.append(b"")
            elif kind == "pointer" and x >= STEP:
                parameters[n] = start + self._first + 8 * self._cells[x]
                packed.append(0)
            else:
                packed.append(x)
        launcher.format.pack_into(self._memory, place, *packed)
        self._arrays.append(parameters)
        at = ctypes.addressof(parameters)
        self._calls.append(Call(launcher.function, launch.columns, launch.rows, launcher.threads, launcher.shared_bytes, at))

    def run(self, *addresses: int) -> None:
        """Make the launches on the current stream, with these addresses for base(0), base(1), ..."""
        stream = cupy.cuda.get_current_stream().ptr
        with self._lock:
            if addresses != self._addresses:
                self._take(addresses)
            self._runs += 1
            if self._runs > RUNS_BEFORE_GRAPH and self._launched_as_graph(stream):
                return
            for function, columns, rows, threads, shared_bytes, parameters in self._calls:
                cupy.cuda.driver.launchKernel(function, columns, rows, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)

    def _launched_as_graph(self, stream: int) -> bool:
        """One launch for the host, unless the stream is captured or the device has no memory left for a graph: the kernels are the same."""
        if cupy.cuda.runtime.streamIsCapturing(stream):
            return False
        if self._graph is None:
            try:
                self._graph = KernelGraph(self._calls)
            except NoRoomForGraph:
                self._runs = 0  # asked again after as many more
                return False
        self._graph.launch(stream)
        return True

    def _take(self, addresses: tuple[int, ...]) -> None:
        """Fill the table, and give tensor maps their addresses; a graph of other addresses is dropped."""
        self._addresses, self._graph, self._runs = None, None, 0  # until all is done: an interrupted call leaves half of it
        self._table.pack_into(self._memory, self._first, *[addresses[n] + offset for n, offset in self._sources])
        for entry in self._maps:
            n, offset, rest, place, encoded = entry
            address = addresses[n] + offset
            if encoded is None:
                self._bytes[place : place + 128] = tensor_map(address, *rest)
            elif address != encoded:
                move_tensor_map(self._start + place, address)
            entry[4] = address
        self._addresses = addresses
