"""Starting a Python file or command on several ranks, and the reason for skipping where that is not possible."""

import importlib.util
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import IO

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 240  # seconds, after which a job that hangs is ended and fails its test


@cache
def mpiexec() -> str | None:
    """The launcher beside this Python, otherwise the system's."""
    return shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")


def missing() -> str | None:
    """What keeps several ranks from starting, or None."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (pip install mpi4py mpich)"
    return None if mpiexec() else "there is no mpiexec (pip install mpich)"


needs_mpi = pytest.mark.skipif(missing() is not None, reason=f"several ranks cannot start: {missing()}")


def start_ranks(count: int, *arguments: str, stderr: int | IO[str] = subprocess.PIPE) -> subprocess.Popen:
    """`python ARGUMENTS` on so many ranks, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [str(mpiexec()), "-n", str(count), sys.executable, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=stderr, text=True, env=environment, cwd=ROOT)


def run_ranks(count: int, *arguments: str, input: str = "") -> subprocess.CompletedProcess:
    """The same, to its end."""
    with start_ranks(count, *arguments) as process:
        try:
            output, errors = process.communicate(input, timeout=TIMEOUT)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
