"""A chain of kernel launches as one CUDA graph: one launch for the host, whatever there is to launch.

Made of the launches' own parameters through libcuda: capturing a stream, as CuPy does, would need one that nobody else uses.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from ...errors import BackendUnavailable
from . import device

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY


class NoRoomForGraph(BackendUnavailable):
    """The device has no memory left for a graph, which lies outside CuPy's pool."""


class Call(NamedTuple):
    """One launch: a CUfunction, its grid, its thread block and shared memory, and the address of its array of pointers to parameters."""

    function: int
    columns: int
    rows: int
    threads: int
    shared_bytes: int
    parameters: int


class NodeParameters(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS of CUDA 12."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        *((f"{what}_{axis}", ctypes.c_uint) for what in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        *((name, ctypes.c_void_p) for name in ("parameters", "extra", "kernel", "context")),
    ]


class KernelGraph:
    """The calls, one after the other, with the parameters that they have when the graph is made.

    An executable graph does not run beside itself: launches on several streams wait for each other.
    """

    def __init__(self, calls: Iterable[Call]) -> None:
        graph, node = ctypes.c_void_p(), ctypes.c_void_p()
        _call("cuGraphCreate", ctypes.byref(graph), 0)
        weakref.finalize(self, device.driver().cuGraphDestroy, graph)
        for n, call in enumerate(calls):
            before, node, count = node, ctypes.c_void_p(), ctypes.c_size_t(min(n, 1))  # of those that come before
            parameters = NodeParameters(
                call.function, call.columns, call.rows, 1, call.threads, 1, 1, call.shared_bytes, call.parameters, None, None, None
            )
            _call("cuGraphAddKernelNode_v2", ctypes.byref(node), graph, ctypes.byref(before), count, ctypes.byref(parameters))
        self._executable = ctypes.c_void_p()
        _call("cuGraphInstantiateWithFlags", ctypes.byref(self._executable), graph, ctypes.c_ulonglong(0))
        self._launch = device.driver().cuGraphLaunch
        weakref.finalize(self, device.driver().cuGraphExecDestroy, self._executable)

    def launch(self, stream: int) -> None:
        """Launch on a stream."""
        status = self._launch(self._executable, ctypes.c_void_p(stream))
        if status:
            raise _failed("cuGraphLaunch", status)


def _call(name: str, *arguments: Any) -> None:
    status = getattr(device.driver(), name)(*arguments)
    if status:
        raise _failed(name, status)


def _failed(name: str, status: int) -> BackendUnavailable:
    if status == OUT_OF_MEMORY:
        return NoRoomForGraph(f"{name} found no GPU memory: free memory that other programs hold")
    return BackendUnavailable(f"{name} failed with CUresult {status}: an earlier call may have failed on the GPU, see `compute-sanitizer`")
