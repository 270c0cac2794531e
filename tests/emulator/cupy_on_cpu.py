"""A stand-in for CuPy on the CPU: arrays are NumPy's, and a RawKernel is the kernel's own source run by emulator.h.

With it the whole backend runs without a GPU, wrappers and kernels alike. Only what the backend uses is here.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.emulator.kernel_on_cpu import SOURCES, Kernel, Stream, launch_kernel
from tests.emulator.memory_on_cpu import MemoryPointer, MemoryPool, alloc, ndarray, viewing
from tests.emulator.products_on_cpu import product_plan

__all__ = ["ATTRIBUTES", "SOURCES", "Kernel", "MemoryPointer", "MemoryPool", "Stream", "alloc", "installed"]
NUM_MULTIPROCESSORS = 2
ATTRIBUTES = {"MultiProcessorCount": NUM_MULTIPROCESSORS, "MaxSharedMemoryPerBlockOptin": 227 << 10}


class Event:
    """Everything here has finished when it returns."""

    def __init__(self, disable_timing: bool = False) -> None: ...

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


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
        setattr(module, function, viewing(getattr(np, function)))
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
