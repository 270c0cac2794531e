"""Launches that may start while the one before them ends (programmatic dependent launch, compute capability 9.0 and later).

A kernel launched so runs up to its `wait_for_launch_before` (cuda/ptx.cuh) beside the tail of the launch before it. What it reads until
then must be older than that launch: weights, in a decode step.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import cupy
import numpy as np

from ...errors import BackendUnavailable
from .device import capability, driver, source
from .launch import Launcher

PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CUlaunchAttributeID
OLDEST_DRIVER = 12030  # CUDA 12.3: the first whose graphs keep such launches


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared_bytes", ctypes.c_uint), ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)), ("num_attributes", ctypes.c_uint),
    ]  # fmt: skip


_OVERLAP = _Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, b"", 1)


class OverlappingLauncher(Launcher):
    """A Launcher whose launches may begin before the launch before them on the stream has ended."""

    def __call__(self, columns: int, rows: int, *arguments: Any) -> None:
        config = _Config(
            (columns, rows, 1), (self.threads, 1, 1), self.shared_bytes, cupy.cuda.get_current_stream().ptr, ctypes.pointer(_OVERLAP), 1
        )
        with self._lock:
            self.format.pack_into(self._memory, self._start, *arguments)
            status = _launch_kernel_ex()(ctypes.byref(config), self.function, self._parameters, None)
        if status:
            raise BackendUnavailable(f"cuLaunchKernelEx failed with CUresult {status}: the driver may be older than CUDA 12, update it")


def address(x: Any) -> Any:
    """A kernel argument as a Launcher takes it: an array's address, 0 for None, a struct's bytes, numbers as they are."""
    if isinstance(x, cupy.ndarray):
        return x.data.ptr
    return 0 if x is None else x.tobytes() if isinstance(x, np.ndarray) else x


@lru_cache(maxsize=1024)
def launcher_of(kernel: Any, file: str, name: str, threads: int, shared_bytes: int, overlap: bool) -> Launcher:
    """The Launcher of a kernel of `file`, made once; with `overlap` its launches may begin while the one before them ends."""
    return (OverlappingLauncher if overlap else Launcher)(kernel, source(file), name, threads, shared_bytes)


def overlap_is_possible() -> bool:
    """Whether the device can start a launch before the one before it has ended, and the driver can put that into a graph."""
    able = capability() >= (9, 0) and hasattr(driver(), "cuLaunchKernelEx")
    return able and cupy.cuda.runtime.driverGetVersion() >= OLDEST_DRIVER


@lru_cache
def _launch_kernel_ex() -> Any:
    function = driver().cuLaunchKernelEx
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return function
