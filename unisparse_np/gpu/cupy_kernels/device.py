"""What the kernels need from CuPy and the driver: the device's facts, compiled kernels, tensor maps."""

from __future__ import annotations

import ctypes
import re
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import cupy
import numpy as np

from ...errors import BackendUnavailable

SOURCES = Path(__file__).parent / "cuda"
OLDEST_CAPABILITY = (8, 0)
TENSOR_MAP_BYTES = 128


def capability() -> tuple[int, int]:
    """Compute capability of the current device. Raises BackendUnavailable when there is none, or it is too old."""
    try:
        return _capability(cupy.cuda.runtime.getDevice())
    except cupy.cuda.runtime.CUDARuntimeError as error:
        old_driver = "InsufficientDriver" in str(error)  # also what CuPy finds where there is no driver at all
        advice = "update the driver, or take the CuPy of an older CUDA (nvidia-smi names the newest)" if old_driver else "check nvidia-smi"
        raise BackendUnavailable(f"CuPy finds no usable CUDA device ({error}): {advice}, or use backend='reference'") from error


@lru_cache
def _capability(device: int) -> tuple[int, int]:
    digits = cupy.cuda.Device(device).compute_capability  # "90"
    found = int(digits[:-1]), int(digits[-1])
    if found < OLDEST_CAPABILITY:
        raise BackendUnavailable(
            f"this GPU has compute capability {found[0]}.{found[1]} and the kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} "
            "(A100, RTX 30 or later): use backend='reference'"
        )
    return found


def num_multiprocessors() -> int:
    """Streaming multiprocessors of the current device."""
    return _attributes(cupy.cuda.runtime.getDevice())["MultiProcessorCount"]


@lru_cache
def _attributes(device: int) -> dict[str, int]:
    return cupy.cuda.Device(device).attributes


@lru_cache
def source(name: str) -> str:
    """A .cu file with the project's own headers put in their places: CuPy's cache looks at this text alone."""
    return _expand(SOURCES / name, set())


def kernel(file: str, name: str, shared_bytes: int, **defines: int) -> Any:
    """A kernel of a .cu file, compiled for the current device (CuPy keeps the result on disk) and given its shared memory.

    The defines go into the text: CuPy asks the compiler once for every new list of options, 20 ms each, even if all is on disk.
    Raises BackendUnavailable when the device has less shared memory.
    """
    return _kernel(file, name, shared_bytes, cupy.cuda.runtime.getDevice(), **defines)


@lru_cache(maxsize=1024)
def _kernel(file: str, name: str, shared_bytes: int, device: int, **defines: int) -> Any:
    most = _attributes(device)["MaxSharedMemoryPerBlockOptin"]
    if shared_bytes > most:
        raise BackendUnavailable(
            f"this GPU gives a thread block {most} bytes of shared memory and the kernel {name} needs {shared_bytes} for this head_dim "
            "and length: take float32, another GPU, or backend='reference'"
        )
    code = source(file)
    code = "".join(f"#define {key} {value}\n" for key, value in sorted(defines.items()) if key in code) + code
    options = ["-std=c++17"]
    if capability() == (9, 0):
        options.append("-arch=sm_90a")  # wgmma and setmaxnreg; CuPy's own -arch=sm_90 comes after it and yields
    with _compiling:
        function = _module(code, tuple(options)).get_function(name)
    if shared_bytes > max(48 * 1024, function.max_dynamic_shared_size_bytes):  # of the compiled kernel: others may have asked for more
        function.max_dynamic_shared_size_bytes = shared_bytes
    return function


def compile_seconds() -> float:
    """Time this process has spent on making kernels ready: compiling them, or reading them from CuPy's cache on disk."""
    return _compiling.seconds


class _Stopwatch:
    """Adds up the time inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started


_compiling = _Stopwatch()


@lru_cache(maxsize=256)
def _module(code: str, options: tuple[str, ...]) -> Any:
    return cupy.RawModule(code=code, options=options, backend="nvrtc")


@lru_cache(maxsize=4096)
def tensor_map(
    address: int, heads: int, length: int, dim: int, head_stride: int, row_stride: int, is_float16: bool, box_rows: int, box_columns: int
) -> bytes:
    """A CUtensorMap over [H, L, d] of 16-bit elements (strides in elements) in boxes of rows x columns of one head.

    Tiles lie in shared memory as panels of 64 columns with a 128-byte swizzle, whatever the strides. Boxes of all columns: the view
    is (64, L, d / 64, H), and one instruction fetches all panels. Boxes of 64 columns: (d, L, 1, H), with zeros for columns past d.
    """
    buffer = np.zeros(TENSOR_MAP_BYTES + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    buffer = buffer[start : start + TENSOR_MAP_BYTES]
    panels = box_columns // 64
    sizes = (ctypes.c_uint64 * 4)(64 if panels > 1 else dim, length, panels, heads)
    strides = (ctypes.c_uint64 * 3)(2 * row_stride, 128, 2 * head_stride)
    box = (ctypes.c_uint32 * 4)(64, box_rows, panels, 1)
    steps = (ctypes.c_uint32 * 4)(1, 1, 1, 1)
    float16, bfloat16, no_interleave, swizzle_128, promote_128, zero_fill = 6, 9, 0, 3, 2, 0
    status = driver().cuTensorMapEncodeTiled(
        buffer.ctypes.data, float16 if is_float16 else bfloat16, 4, ctypes.c_void_p(address), sizes, strides, box, steps,
        no_interleave, swizzle_128, promote_128, zero_fill,
    )  # fmt: skip
    if status:
        raise BackendUnavailable(f"cuTensorMapEncodeTiled failed with CUresult {status}: the driver may be older than CUDA 12, update it")
    return buffer.tobytes()


def move_tensor_map(at: int, address: int) -> None:
    """Give the CUtensorMap that lies at an address of the host another array of the same shape: a fraction of what encoding costs."""
    status = driver().cuTensorMapReplaceAddress(at, address)
    if status:
        raise BackendUnavailable(f"cuTensorMapReplaceAddress failed with CUresult {status}: the array must begin on a 16-byte boundary")


@lru_cache
def driver() -> Any:
    """libcuda, for the driver calls that CuPy does not offer."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuTensorMapEncodeTiled.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(f"the CUDA driver is missing or older than CUDA 12 ({error}): install or update it") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.cuTensorMapEncodeTiled.argtypes = [
        pointer, number, ctypes.c_uint32, pointer, pointer, pointer, pointer, pointer, number, number, number, number,
    ]  # fmt: skip
    library.cuTensorMapReplaceAddress.argtypes = [pointer, pointer]
    return library


def _expand(path: Path, seen: set[str]) -> str:
    lines = []
    for line in path.read_text().splitlines():
        include = re.match(r'#include "(\w+\.cuh)"', line)
        if include is None:
            lines.append("" if line == "#pragma once" else line)
        elif include[1] not in seen:
            seen.add(include[1])
            lines.append(_expand(SOURCES / include[1], seen))
    return "\n".join(lines)
