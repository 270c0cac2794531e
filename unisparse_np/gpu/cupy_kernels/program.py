"""Launches recorded once and replayed with other addresses: what a call costs the host is then little more than the driver's own time,
and less once a program that runs again and again has become a CUDA graph.

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

from .device import tensor_map
from .graph import Call, KernelGraph, NoRoomForGraph
from .launch import ALIGNMENT, Launcher

STEP = 1 << 52  # symbolic addresses begin above every real one
RUNS_BEFORE_GRAPH = 100  # graphs pay for calls of one shape that come again and again; a prompt in chunks makes none


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
    encoded again only when their address has changed. From the RUNS_BEFORE_GRAPH-th run on they are one graph, whose parameters change
    where addresses do; a stream that is captured gets single launches, and so does everything where no memory is left for a graph.
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
        self._bytes = memoryview(self._memory).cast("B")
        self._first = -ctypes.addressof(self._memory) % ALIGNMENT
        self._table = struct.Struct(f"={len(self._cells)}Q")
        self._sources = [(x // STEP - 1, x % STEP) for x in self._cells]
        self._maps: list[list[Any]] = []  # [source, offset, map, place, address encoded last]
        self._calls: list[Call] = []
        self._arrays: list[Any] = []  # of pointers to parameters
        self._addresses: tuple[int, ...] | None = None  # of the last run
        self._runs = 0
        self._graph: KernelGraph | None = None
        self._graph_is_current = False
        self._lock = threading.Lock()
        place = self._first + -(-8 * len(self._cells) // ALIGNMENT) * ALIGNMENT
        for launch in self._launches:
            self._add(launch, place)
            place += -(-launch.launcher.size // ALIGNMENT) * ALIGNMENT

    def _add(self, launch: Launch, place: int) -> None:
        """Pack a launch's constant parameters from `place` on, and note where the others are to be found."""
        launcher, start = launch.launcher, ctypes.addressof(self._memory)
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
            captured = cupy.cuda.runtime.streamIsCapturing(stream)
            self._runs += not captured  # a graph is not made while another one is under way
            if self._runs == RUNS_BEFORE_GRAPH and not captured:
                self._make_graph()
            if self._graph is None or captured:
                for function, columns, rows, threads, shared_bytes, parameters in self._calls:
                    cupy.cuda.driver.launchKernel(function, columns, rows, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
                return
            if not self._graph_is_current:
                self._graph.update()
                self._graph_is_current = True
            self._graph.launch(stream)

    def _make_graph(self) -> None:
        """From here on one launch for the host, unless the device has no memory left for a graph: the kernels are the same without."""
        try:
            self._graph, self._graph_is_current = KernelGraph(self._calls), True
        except NoRoomForGraph:
            self._graph = None

    def _take(self, addresses: tuple[int, ...]) -> None:
        """Fill the table, and encode tensor maps whose address has changed."""
        self._addresses = None  # until all is done: an interrupted call leaves half of it
        self._table.pack_into(self._memory, self._first, *[addresses[n] + offset for n, offset in self._sources])
        for entry in self._maps:
            n, offset, rest, place, encoded = entry
            address = addresses[n] + offset
            if address != encoded:
                self._bytes[place : place + 128] = tensor_map(address, *rest)
                entry[4] = address
        self._addresses = addresses
        self._graph_is_current = False
