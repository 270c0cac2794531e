"""The communicators' rules, without other processes."""

import subprocess
import sys

import numpy as np
import pytest

from unisparse_np.errors import CheckpointError, InvalidInput
from unisparse_np.parallel import ONE_PROCESS, Single, arrange, check_grid, launched_by, together


def test_one_process_gets_back_what_it_gives():
    alone, x = Single(), np.arange(6.0).reshape(2, 3)
    assert alone.all_reduce(x) is x
    assert alone.all_gather(x).shape == (1, 2, 3) and np.shares_memory(alone.all_gather(x), x)
    assert alone.broadcast("text") == "text"
    assert (alone.rank, alone.size) == (0, 1)
    assert arrange(alone, 1, backend=None) is ONE_PROCESS


def test_one_process_imports_no_mpi():
    code = "import sys; from unisparse_np.parallel import world; world(); print('mpi4py' in sys.modules, 'cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ("no launcher", 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, ("no launcher", 1)),  # a batch script, not one of srun's tasks
        ({"PMI_SIZE": "4", "PMI_RANK": "1"}, ("an MPICH-like mpiexec", 4)),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0"}, ("Open MPI's mpirun", 2)),
        ({"SLURM_STEP_NUM_TASKS": "8"}, ("srun", 8)),
        ({"PMIX_RANK": "0"}, ("a PMIx launcher", None)),
    ],
)
def test_the_launcher_is_known_by_its_variables(environment, expected):
    assert launched_by(environment) == expected


@pytest.mark.parametrize(("size", "tensor", "context"), [(1, None, 1), (4, None, 1), (4, None, 2), (4, 2, 2), (4, 4, 1), (6, None, 3)])
def test_grids_that_fit(size, tensor, context):
    check_grid(size, tensor, context)


@pytest.mark.parametrize(
    ("size", "tensor", "context", "words"),
    [
        (1, 4, 1, "mpirun -n 4 unisparse-np"),
        (1, None, 2, "mpirun -n 2 unisparse-np"),
        (1, 2, 3, "mpirun -n 6 unisparse-np"),
        (4, None, 3, "a multiple of 3"),
        (4, 2, 1, "start 2, or leave --tensor-parallel out"),
        (4, 4, 2, "make 8 processes, but 4 were started"),
    ],
)
def test_grids_that_do_not_fit_say_what_does(size, tensor, context, words):
    with pytest.raises(InvalidInput, match=words):
        check_grid(size, tensor, context)


def test_alone_an_error_passes_as_it_is():
    def fail():
        raise CheckpointError("no weights")

    with pytest.raises(CheckpointError, match=r"^no weights$"):
        together(Single(), fail)
    assert together(Single(), lambda: 5) == 5
