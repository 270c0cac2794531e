"""The MPI communicator on 2 and 4 ranks."""

from pathlib import Path

import pytest

from .launch import needs_mpi, run_ranks

HERE = Path(__file__).parent


@needs_mpi
@pytest.mark.parametrize("count", [2, 4])
def test_every_call_on_every_rank(count):
    done = run_ranks(count, "-m", "mpi4py", str(HERE / "communicators_on_ranks.py"), str(count))
    assert done.returncode == 0, done.stderr
    assert all(f"rank {rank} is done" in done.stdout for rank in range(count))
