"""A stand-in for CuPy on the CPU: arrays are NumPy's, and a RawKernel is the kernel's own source run by emulator.h.

With it the whole backend runs without a GPU, wrappers and kernels alike. Only what the backend uses is here.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import re
import struct
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "unisparse_np" / "gpu" / "cupy_kernels" / "cuda"
BUILT = Path(tempfile.gettempdir()) / "unisparse_emulator"
NUM_MULTIPROCESSORS = 2
ATTRIBUTES = {"MultiProcessorCount": NUM_MULTIPROCESSORS, "MaxSharedMemoryPerBlockOptin": 227 << 10}


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


class Event:
    """Everything here has finished when it returns."""

    def __init__(self, disable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


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


class RawModule:
    def __init__(self, code: str, options: tuple[str, ...] = (), backend: str = "nvrtc", **_: Any) -> None:
        self.code = code
        self.defines = tuple(
            f"-D{name}={value}" for name, value in re.findall(r"^#define (\w+) (-?\d+)$", code.split("//")[0], re.MULTILINE)
        )

    def get_function(self, name: str) -> Kernel:
        for path in SOURCES.glob("*.cu"):
            if path.read_text().splitlines()[0] in self.code:
                return Kernel(path.name, name, self.defines)
        raise AssertionError(f"no source file holds {name}")


def encode_tensor_map(to: int, _type: int, rank: int, base: Any, sizes: Any, strides: Any, box: Any, _steps: Any, *_: int) -> int:
    """cuTensorMapEncodeTiled for the emulator's TensorMap."""
    assert to % 64 == 0 and rank == 4 and base.value % 16 == 0 and all(stride % 16 == 0 for stride in strides)
    encoded = np.zeros(128, np.uint8)
    encoded[:8].view(np.uint64)[0] = base.value
    encoded[8:40].view(np.int64)[:] = list(sizes)
    encoded[40:72].view(np.int64)[:] = [2, *strides]
    encoded[72:88].view(np.int32)[:] = list(box)
    ctypes.memmove(to, encoded.ctypes.data, 128)
    return 0


def move_tensor_map(at: int, address: int) -> int:
    """cuTensorMapReplaceAddress for it."""
    assert at % 64 == 0 and address % 16 == 0
    ctypes.c_uint64.from_address(at).value = address
    return 0


def product_plan(rows: int, inner: int, tokens: int, dtype: np.dtype, out_dtype: np.dtype, *_: int) -> Callable[..., None]:
    """What products.product_plan makes, in NumPy: out [tokens, rows] = x [tokens, inner] weight [rows, inner]^T, or added to it."""

    def multiply(weight: int, x: int, out: int, add: bool) -> None:
        left, right = _memory(x, (tokens, inner), dtype), _memory(weight, (rows, inner), dtype)
        result, place = left.astype(np.float32) @ right.astype(np.float32).T, _memory(out, (tokens, rows), out_dtype)
        place[...] = result + place.astype(np.float32) if add else result  # without add the place is not read

    return multiply


def _memory(pointer: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    raw = (ctypes.c_char * (int(np.prod(shape)) * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(raw, dtype).reshape(shape)


@contextlib.contextmanager
def installed(capability: str) -> Iterator[types.ModuleType]:
    """The cupy backend over the stand-in, as if on a device of this compute capability ("90", "80"); undone afterwards."""
    ours = [name for name in sys.modules if name == "cupy" or name.startswith("unisparse_np.gpu.cupy_kernels")]
    before = {name: sys.modules.pop(name) for name in ours}
    sys.modules["cupy"] = _module(capability)
    try:
        backend = importlib.import_module("unisparse_np.gpu.cupy_kernels")
        device = importlib.import_module("unisparse_np.gpu.cupy_kernels.device")
        importlib.import_module("unisparse_np.gpu.cupy_kernels.products").product_plan = product_plan
        libcuda = importlib.import_module("tests.emulator.libcuda_on_cpu")
        device.driver = lambda: libcuda.Driver
        yield backend
    finally:
        for name in [name for name in sys.modules if name == "cupy" or name.startswith("unisparse_np.gpu.cupy_kernels")]:
            del sys.modules[name]
        sys.modules.update(before)


def _module(capability: str) -> types.ModuleType:
    module = types.ModuleType("cupy")
    module.ndarray = ndarray  # type: ignore[attr-defined]
    functions = (
        "arange",
        "argsort",
        "asarray",
        "ascontiguousarray",
        "concatenate",
        "count_nonzero",
        "cumsum",
        "empty",
        "empty_like",
        "exp",
        "isfinite",
        "log",
        "max",
        "maximum",
        "minimum",
        "packbits",
        "repeat",
        "rint",
        "stack",
        "unpackbits",
        "where",
        "zeros",
    )
    for function in functions:
        setattr(module, function, _viewing(getattr(np, function)))
    module.asnumpy = np.array  # type: ignore[attr-defined]
    module.RawModule = RawModule  # type: ignore[attr-defined]
    module.get_default_memory_pool = MemoryPool  # type: ignore[attr-defined]
    device = types.SimpleNamespace(compute_capability=capability, attributes=ATTRIBUTES)
    runtime = types.SimpleNamespace(
        CUDARuntimeError=RuntimeError, getDevice=lambda: 0, memGetInfo=lambda: (1 << 34,) * 2,
        streamIsCapturing=lambda _: Stream.recording is not None,
    )  # fmt: skip
    memory = types.SimpleNamespace(OutOfMemoryError=MemoryError)
    module.cuda = types.SimpleNamespace(  # type: ignore[attr-defined]
        Device=lambda *_: device,
        Event=Event,
        Stream=Stream,
        get_current_stream=lambda: types.SimpleNamespace(ptr=0, synchronize=lambda: None),
        alloc=alloc,
        runtime=runtime,
        memory=memory,
        driver=types.SimpleNamespace(launchKernel=launch_kernel),
    )
    return module


def _viewing(function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        result = np.asarray(function(*arguments, **options))
        if function in (np.empty, np.empty_like):
            result.view(np.uint8)[...] = unwritten()
        return result.view(ndarray)

    return call


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
