"""Ranks that exchange CuPy arrays: NCCL carries them between GPUs, MPI has started the ranks and carries Python objects."""

from __future__ import annotations

from typing import Any

import cupy
from cupy.cuda import nccl

from ...errors import BackendUnavailable, InvalidInput


class Nccl:
    """A Communicator (parallel.py) over CuPy arrays of this process's current device.

    To be made after `take_device`. Calls return at once and take their place in CuPy's current stream, between the kernels
    before and after them; they may be captured in a CUDA graph.

    Args:
        group: the ranks, as a Communicator whose `broadcast` works on the host: Mpi, or Single for one process.

    Raises:
        BackendUnavailable: NCCL cannot connect these ranks.
    """

    def __init__(self, group: Any) -> None:
        self.rank, self.size = group.rank, group.size
        self._group = group
        unique_id = group.broadcast(nccl.get_unique_id() if group.rank == 0 else None)
        try:
            self._nccl = nccl.NcclCommunicator(group.size, unique_id, group.rank)
        except nccl.NcclError as error:
            raise BackendUnavailable(f"NCCL cannot connect {group.size} ranks ({error}): NCCL_DEBUG=INFO shows why") from error

    def all_reduce(self, x: cupy.ndarray) -> cupy.ndarray:
        """The sum over ranks, in place where x is contiguous; adds in x's own dtype."""
        x = cupy.ascontiguousarray(x)
        self._nccl.allReduce(x.data.ptr, x.data.ptr, x.size, _nccl_dtype(x), nccl.NCCL_SUM, _stream())
        return x

    def all_gather(self, x: cupy.ndarray) -> cupy.ndarray:
        """[size, *x.shape]."""
        x = cupy.ascontiguousarray(x)
        gathered = cupy.empty((self.size, *x.shape), dtype=x.dtype)
        self._nccl.allGather(x.data.ptr, gathered.data.ptr, x.size, _nccl_dtype(x), _stream())
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small Python object, over the host."""
        return self._group.broadcast(value)


def take_device(rank: int, size: int) -> None:
    """Make GPU number `rank` this process's own, one of `size` on this machine. To be called before anything lies on a GPU.

    Raises:
        InvalidInput: this machine has fewer GPUs.
        BackendUnavailable: NCCL is not installed.
    """
    devices = cupy.cuda.runtime.getDeviceCount()
    if size > devices:
        raise InvalidInput(
            f"{size} ranks on a machine with {devices} visible GPUs: each rank needs one of its own, so start fewer a machine"
        )
    if not nccl.available:
        raise BackendUnavailable("several GPUs need NCCL, which CuPy does not find: pip install 'unisparse-np[multi-gpu]'")
    cupy.cuda.Device(rank).use()


def _nccl_dtype(x: cupy.ndarray) -> int:
    known = {"float16": nccl.NCCL_FLOAT16, "bfloat16": nccl.NCCL_BFLOAT16, "float32": nccl.NCCL_FLOAT32, "float64": nccl.NCCL_FLOAT64}
    return int(known[x.dtype.name])


def _stream() -> int:
    return int(cupy.cuda.get_current_stream().ptr)
