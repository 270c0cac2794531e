"""What the backend takes from libcuda itself, for the stand-in of CuPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tests.emulator import cupy_on_cpu


class Driver:
    """libcuda: tensor maps and graphs. A graph's handle is its number in `graphs`, a node's its number in `nodes`."""

    graphs: ClassVar[list[list[int] | None]] = []  # a graph's nodes, None once it is destroyed
    nodes: ClassVar[list[Callable[[], None]]] = []
    cuTensorMapEncodeTiled = staticmethod(cupy_on_cpu.encode_tensor_map)
    cuTensorMapReplaceAddress = staticmethod(cupy_on_cpu.move_tensor_map)

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
    kernel = cupy_on_cpu.Kernel.by_handle[given.function]
    assert (given.grid_z, given.block_y, given.block_z) == (1, 1, 1)
    grid, threads, shared = (given.grid_x, given.grid_y), given.block_x, given.shared_bytes
    parameters = cupy_on_cpu.copied_parameters(kernel, given.parameters)

    def launch() -> None:
        cupy_on_cpu.Kernel.launched.append(kernel.name)
        kernel.launch(parameters, -1, *grid, threads, shared)

    return launch
