"""A RawKernel on the CPU: the kernel's own source, run by emulator.h, launched or recorded in a graph."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import struct
import subprocess
import tempfile
import types
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "unisparse_np" / "gpu" / "cupy_kernels" / "cuda"
BUILT = Path(tempfile.gettempdir()) / "unisparse_emulator"


@lru_cache
def library(folder: Path, file: str, kernel: str, defines: tuple[str, ...]) -> ctypes.CDLL:
    """The shared library of one kernel with its defines; rebuilt when any source changed."""
    sources = [HERE / "emulator.h", HERE / "launch.cpp", folder / file, *sorted(folder.glob("*.cuh"))]
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + repr((file, kernel, defines)).encode()).hexdigest()[:16]
    BUILT.mkdir(exist_ok=True)
    built = BUILT / f"{kernel}_{key}.so"
    if not built.exists():
        unfinished = built.with_suffix(f".{np.random.default_rng().integers(1 << 60)}")
        flags = ["-O1", "-march=native", "-std=c++17", "-w", "-Wno-psabi", "-fPIC", "-shared", "-DUNISPARSE_EMULATOR"]
        names = [f'-DSOURCE="{file}"', f"-DKERNEL={kernel}", f"-I{HERE}", f"-I{folder}"]
        command = ["g++", *flags, *names, *defines, str(HERE / "launch.cpp"), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.rename(built)
    return ctypes.CDLL(str(built))


class Kernel:
    """Called as a RawKernel is: kernel(grid, block, arguments, shared_mem=bytes)."""

    seed = 0  # of the emulator's choices; tests change it
    folder = SOURCES  # tests put a copy with a planted bug here
    launched: list[str] = []  # noqa: RUF012
    by_handle: dict[int, Kernel] = {}  # noqa: RUF012
    shared_limits: dict[tuple, int] = {}  # noqa: RUF012  of the compiled kernel, whoever set it last

    def __init__(self, file: str, name: str, defines: tuple[str, ...]) -> None:
        self.file, self.name, self.defines = file, name, defines

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return Kernel.shared_limits.get((self.file, self.name, self.defines), 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, size: int) -> None:
        Kernel.shared_limits[self.file, self.name, self.defines] = size

    @property
    def kernel(self) -> types.SimpleNamespace:
        """The cupy.cuda.Function, which launchKernel takes by its handle."""
        handle = id(self)
        Kernel.by_handle[handle] = self
        return types.SimpleNamespace(ptr=handle)

    def __call__(self, grid: tuple, block: tuple, arguments: tuple, shared_mem: int = 0) -> None:
        Kernel.launched.append(self.name)
        values = [_argument(x) for x in arguments]
        if Stream.recording is not None:
            Stream.recording.append(lambda _alive=arguments: run(self, values, grid, block, shared_mem))
            return
        run(self, values, grid, block, shared_mem)

    def launch(self, pointers: Any, given: int, x: int, y: int, threads: int, shared_mem: int) -> None:
        """Run the kernel with the parameters that `given` pointers point to (a negative count is not checked)."""
        assert shared_mem <= self.max_dynamic_shared_size_bytes, f"{self.name}: {shared_mem} bytes of shared memory were not asked for"
        built = library(Kernel.folder, self.file, self.name, self.defines)
        declared = built.shared_bytes_of_source()
        assert declared in (-1, shared_mem) or self.name == "merge_scores", (
            f"{self.name}: wrapper gives {shared_mem} bytes of shared memory, the source needs {declared}"
        )
        built.launch(pointers, given, x, y, threads, ctypes.c_long(shared_mem), ctypes.c_uint(Kernel.seed))


def run(kernel: Kernel, values: list[Any], grid: tuple, block: tuple, shared_mem: int, *_: Any) -> None:
    """One launch: runs the kernel to its end."""
    pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
    x, y = (*grid, 1)[:2]
    kernel.launch(pointers, len(values), int(x), int(y), int(block[0]), shared_mem)


def launch_kernel(handle: int, x: int, y: int, z: int, threads: int, _y: int, _z: int, shared: int, _stream: int, at: int, _: int) -> None:
    """cupy.cuda.driver.launchKernel: parameters from an array of pointers at an address."""
    kernel = Kernel.by_handle[handle]
    Kernel.launched.append(kernel.name)
    if Stream.recording is not None:
        parameters = copied_parameters(kernel, at)
        Stream.recording.append(lambda: kernel.launch(parameters, -1, x, y, threads, shared))
        return
    kernel.launch(ctypes.c_void_p(at), -1, x, y, threads, shared)


def copied_parameters(kernel: Kernel, at: int) -> Any:
    """Pointers to a copy of a launch's parameters, as a graph keeps them: the caller packs the next launch's in the same place."""
    device, launch = (importlib.import_module(f"unisparse_np.gpu.cupy_kernels.{name}") for name in ("device", "launch"))
    types_of = launch.signature(device.source(kernel.file), kernel.name)
    _, offsets, size = launch.parameter_layout(types_of)
    raw = ctypes.create_string_buffer(size + launch.ALIGNMENT)
    start = ctypes.addressof(raw) + (-ctypes.addressof(raw) % launch.ALIGNMENT)
    given = (ctypes.c_void_p * len(offsets)).from_address(at)
    for pointer, offset, kind in zip(given, offsets, types_of, strict=True):
        ctypes.memmove(start + offset, pointer, struct.calcsize("=" + launch._PARAMETERS[kind][0]))
    pointers = (ctypes.c_void_p * len(offsets))(*(start + offset for offset in offsets))
    pointers.owner = raw
    return pointers


class Graph:
    """Recorded launches with the arguments they had."""

    def __init__(self, launches: list[Callable[[], None]]) -> None:
        self.launches = launches

    def launch(self) -> None:
        for launch in self.launches:
            launch()


class Stream:
    """A stream that can be captured: its launches are then recorded instead of run."""

    recording: list[Callable[[], None]] | None = None

    def __init__(self, non_blocking: bool = False) -> None: ...

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None: ...

    def begin_capture(self) -> None:
        Stream.recording = []

    def end_capture(self) -> Graph:
        graph = Graph(Stream.recording or [])
        Stream.recording = None
        return graph


def _argument(x: Any) -> Any:
    """A ctypes value whose address is what a kernel parameter is read from."""
    if isinstance(x, np.ndarray) and x.dtype.type is np.void:
        raw = ctypes.create_string_buffer(x.nbytes + 64)
        start = ctypes.addressof(raw) + (-ctypes.addressof(raw) % 64)
        ctypes.memmove(start, x.ctypes.data, x.nbytes)
        value = (ctypes.c_char * x.nbytes).from_address(start)
        value.owner = raw
        return value
    if isinstance(x, np.ndarray):
        return ctypes.c_void_p(x.ctypes.data)
    integers = {"int32": ctypes.c_int32, "int64": ctypes.c_int64, "uint64": ctypes.c_uint64}
    kinds = integers | {"float32": ctypes.c_float, "float64": ctypes.c_double}
    return kinds[x.dtype.name](x.item())
