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


@needs_mpi
def test_the_benchmark_of_several_gpus_runs():
    done = run_ranks(2, "benchmarks/llama_multi_gpu.py", "--shape", "tiny", "--tokens", "512", "--backend", "reference", "--runs", "1")
    assert done.returncode == 0, done.stderr
    assert "tensor=2 context=1 seconds=" in done.stdout
