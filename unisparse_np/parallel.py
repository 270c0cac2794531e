"""Processes that run one model together. MPI starts and connects them and carries NumPy arrays; a GPU backend brings its own carrier.

`world()` is all of them. `arrange()` puts them in a grid: `tensor` ranks share out heads, MLP columns and vocabulary rows,
`context` ranks share out the prompt's blocks. One process alone gets `Single`, which costs nothing and imports nothing.
"""

from __future__ import annotations

import os
import pickle
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NoReturn, Protocol, TypeVar

import numpy as np

from .errors import BackendUnavailable, InvalidInput, UniSparseError

Result = TypeVar("Result")
# What each launcher tells its processes about their number. SLURM sets the last one for the tasks of srun only, not for a batch script.
SIZE_VARIABLES = {"OMPI_COMM_WORLD_SIZE": "Open MPI's mpirun", "PMI_SIZE": "an MPICH-like mpiexec", "SLURM_STEP_NUM_TASKS": "srun"}
SPINS, SLEEP_SECONDS = 200, 1e-4  # about as long as each other
LAUNCHED_WITHOUT_SIZE = "PMIX_RANK"  # a launcher of the PMIx family: the size is known only to MPI


class Communicator(Protocol):
    """Some processes that exchange arrays. Every one of them must make the same calls in the same order."""

    rank: int
    size: int

    def all_reduce(self, x: Any) -> Any:
        """The sum of all ranks' x, of x's shape and dtype, the same bits on every rank. x itself may be overwritten."""

    def all_gather(self, x: Any) -> Any:
        """All ranks' x, which are of one shape: [size, *x.shape]."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, a small Python object."""


class Single:
    """One process: every call hands back what it was given."""

    rank, size = 0, 1

    def all_reduce(self, x: Any) -> Any:
        """x itself."""
        return x

    def all_gather(self, x: Any) -> Any:
        """A view [1, *x.shape]."""
        return x[None]

    def broadcast(self, value: Any) -> Any:
        """value itself."""
        return value

    def gather_values(self, value: Any) -> list[Any]:
        """[value]."""
        return [value]


class Mpi:
    """Ranks of an MPI communicator; arrays are NumPy's."""

    def __init__(self, communicator: Any) -> None:
        self._mpi = communicator
        self.rank, self.size = communicator.Get_rank(), communicator.Get_size()

    def all_reduce(self, x: np.ndarray) -> np.ndarray:
        """The sum over ranks; 16-bit numbers are added up in float32 and rounded once."""
        sums = np.array(x, dtype=np.float32 if x.dtype.itemsize == 2 else x.dtype, order="C")
        _wait(self._mpi.Iallreduce(_in_place(), sums))
        return sums.astype(x.dtype, copy=False)

    def all_gather(self, x: np.ndarray) -> np.ndarray:
        """[size, *x.shape]; sent as bytes, as MPI has no bfloat16."""
        gathered = np.empty((self.size, *x.shape), dtype=x.dtype)
        sent = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        _wait(self._mpi.Iallgather(sent, gathered.reshape(-1).view(np.uint8)))
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, pickled."""
        return self.gather_values(value if self.rank == 0 else None)[0]

    def gather_values(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank; small Python objects, which wait as arrays do."""
        own = np.frombuffer(pickle.dumps(value), dtype=np.uint8)
        sizes = self.all_gather(np.array([len(own)]))[:, 0]
        padded = np.zeros(sizes.max(), dtype=np.uint8)
        padded[: len(own)] = own
        return [pickle.loads(data[:size]) for data, size in zip(self.all_gather(padded), sizes, strict=True)]

    def split(self, color: int) -> Mpi:
        """The ranks that give the same color, in the order they have here."""
        return Mpi(self._mpi.Split(color, self.rank))

    def on_this_host(self) -> Mpi:
        """The ranks of this machine."""
        from mpi4py import MPI

        return Mpi(self._mpi.Split_type(MPI.COMM_TYPE_SHARED, self.rank))

    def abort(self, code: int) -> NoReturn:
        """End every process of the job at once, whatever it waits for."""
        sys.stdout.flush()
        sys.stderr.flush()
        self._mpi.Abort(code)
        raise SystemExit(code)  # not reached: MPI has ended the process


@dataclass(frozen=True)
class Ranks:
    """Where a process stands. world: all of them, over NumPy; tensor and context: its row and column, over the backend's arrays."""

    world: Single | Mpi
    tensor: Communicator
    context: Communicator


ONE_PROCESS = Ranks(Single(), Single(), Single())


@cache
def world() -> Single | Mpi:
    """The processes that were started together; mpi4py is imported only under an MPI launcher that started several.

    Raises:
        BackendUnavailable: mpi4py or its MPI library is missing, or it is of another MPI than the launcher.
    """
    launcher, size = launched_by(os.environ)
    if size == 1:
        return Single()
    try:
        from mpi4py import MPI
    except ImportError:
        raise BackendUnavailable(f"{launcher} started several processes, which need mpi4py: pip install 'unisparse-np[mpi]'") from None
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise BackendUnavailable(f"mpi4py finds no MPI library ({reason}): install your cluster's MPI, or pip install mpich") from None
    found = MPI.COMM_WORLD.Get_size()
    if found == 1 and size is not None:
        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        raise BackendUnavailable(
            f"{launcher} started {size} processes, but mpi4py runs on another MPI ({library}) in which each is alone: "
            "start them with the launcher of that MPI"
        )
    return Single() if found == 1 else Mpi(MPI.COMM_WORLD)


def launched_by(environment: Any) -> tuple[str, int | None]:
    """(what started this process, how many it started): ("no launcher", 1) outside MPI, None for a number only MPI knows."""
    for variable, launcher in SIZE_VARIABLES.items():
        if environment.get(variable, "").isdigit():
            return launcher, int(environment[variable])
    return ("a PMIx launcher", None) if LAUNCHED_WITHOUT_SIZE in environment else ("no launcher", 1)


def check_grid(size: int, tensor_parallel: int | None, context_parallel: int) -> None:
    """Whether `size` processes make a grid of tensor_parallel x context_parallel; tensor_parallel None is what context leaves.

    Raises:
        InvalidInput: they do not; the message says how to start as many as are needed.
    """
    if size % context_parallel == 0 and tensor_parallel in (None, size // context_parallel):
        return
    wanted = (tensor_parallel or 1) * context_parallel
    if size == 1:
        raise InvalidInput(f"{wanted} processes are asked for, but this is one alone: start them with mpirun -n {wanted} unisparse-np ...")
    if tensor_parallel is None:
        raise InvalidInput(
            f"--context-parallel {context_parallel} does not divide {size} processes: start a multiple of {context_parallel}"
        )
    raise InvalidInput(
        f"--tensor-parallel {tensor_parallel} and --context-parallel {context_parallel} make {wanted} processes, but {size} were started: "
        f"start {wanted}, or leave --tensor-parallel out"
    )


def arrange(everyone: Single | Mpi, context_parallel: int, backend: Any) -> Ranks:
    """The grid of `everyone`. Neighbouring ranks, which share a machine, are tensor ranks: those exchange the most.

    Args:
        context_parallel: a divisor of the number of processes (`check_grid`).
        backend: a loaded backend. One whose arrays are not NumPy's has `take_device(rank, size)` for this process's place
            among those of its machine, and `carrier(group)`, a Communicator of its arrays; see gpu/cupy_kernels/nccl.py.

    Raises:
        InvalidInput, BackendUnavailable: on all ranks, when some cannot take a device of their own or lack what connects them.
    """
    if isinstance(everyone, Single):
        return ONE_PROCESS
    tensor_parallel = everyone.size // context_parallel
    groups: tuple[Communicator, ...] = (
        everyone.split(everyone.rank // tensor_parallel),
        everyone.split(everyone.rank % tensor_parallel),
    )
    if hasattr(backend, "take_device"):
        here = everyone.on_this_host()
        together(everyone, lambda: backend.take_device(here.rank, here.size))
        groups = tuple(backend.carrier(group) if group.size > 1 else group for group in groups)
    tensor, context = (group if group.size > 1 else Single() for group in groups)
    return Ranks(everyone, tensor, context)


def together(everyone: Single | Mpi, work: Callable[[], Result]) -> Result:
    """work() on every rank; where it fails on some, all raise the first one's error, so that none is left waiting.

    Raises:
        UniSparseError: of the first rank that failed; its rank and host are named unless all failed alike.
    """
    if isinstance(everyone, Single):
        return work()
    result, failure = None, None
    try:
        result = work()
    except UniSparseError as error:
        failure = error
    failures = everyone.gather_values(None if failure is None else (type(failure), str(failure), platform.node()))
    failed = [(rank, *what) for rank, what in enumerate(failures) if what is not None]
    if not failed:
        return result  # type: ignore[return-value]
    rank, kind, text, host = failed[0]
    same = len({what[2] for what in failed}) == 1 and len(failed) == everyone.size
    shared = kind(text if same else f"rank {rank} on {host}: {text}")
    shared.on_all_ranks = True
    raise shared from failure


def _wait(request: Any) -> None:
    """Until the exchange is done. A short wait spins; a longer one sleeps in between, as MPI itself does not, and leaves the core to
    a rank that has work: where ranks outnumber cores (4 on 2), an all-reduce of 256 KB takes 2.3 ms instead of 7. Ctrl-C gets through.
    """
    for _ in range(SPINS):
        if request.Test():
            return
    while not request.Test():
        time.sleep(SLEEP_SECONDS)


def _in_place() -> Any:
    from mpi4py import MPI

    return MPI.IN_PLACE
