"""What the backend takes from libcuda itself, for the stand-in of CuPy."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from tests.emulator.kernel_on_cpu import Kernel, copied_parameters


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


class Driver:
    """libcuda: tensor maps and graphs. A graph's handle is its number in `graphs`, a node's its number in `nodes`."""

    graphs: ClassVar[list[list[int] | None]] = []  # a graph's nodes, None once it is destroyed
    nodes: ClassVar[list[Callable[[], None]]] = []
    cuTensorMapEncodeTiled = staticmethod(encode_tensor_map)
    cuTensorMapReplaceAddress = staticmethod(move_tensor_map)

    @staticmethod
    def cuGraphCreate(graph: Any, flags: int) -> int:
        Driver.graphs.append([])
        graph._obj.value = len(Driver.graphs)
        return 0

    @staticmethod
    def cuGraphAddKernelNode_v2(node: Any, graph: Any, before: Any, count: Any, parameters: Any) -> int:
        own = Driver.graphs[graph.value - 1]
        assert own is not None and count.value == (1 if own else 0) and (not own or before._obj.value == own[-1])  # a chain
        Driver.nodes.append(_node(parameters._obj))
        node._obj.value = len(Driver.nodes)
        own.append(node._obj.value)
        return 0

    @staticmethod
    def cuGraphInstantiateWithFlags(executable: Any, graph: Any, flags: Any) -> int:
        executable._obj.value = graph.value
        return 0

    @staticmethod
    def cuGraphLaunch(executable: Any, stream: Any) -> int:
        for node in Driver.graphs[executable.value - 1] or []:
            Driver.nodes[node - 1]()
        return 0

    @staticmethod
    def cuGraphExecDestroy(executable: Any) -> int:
        return 0

    @staticmethod
    def cuGraphDestroy(graph: Any) -> int:
        Driver.graphs[graph.value - 1] = None
        return 0


def _node(given: Any) -> Callable[[], None]:
    """A kernel node with a copy of its parameters."""
    kernel = Kernel.by_handle[given.function]
    assert (given.grid_z, given.block_y, given.block_z) == (1, 1, 1)
    grid, threads, shared = (given.grid_x, given.grid_y), given.block_x, given.shared_bytes
    parameters = copied_parameters(kernel, given.parameters)

    def launch() -> None:
        Kernel.launched.append(kernel.name)
        kernel.launch(parameters, -1, *grid, threads, shared)

    return launch
