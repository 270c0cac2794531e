"""The kernels compile for real GPUs, with no local memory and at most 48 KB of shared memory, where NVVM is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest


def nvvm_is_there() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.cuda_nvcc") is not None


@pytest.mark.skipif(not nvvm_is_there(), reason="no NVVM: pip install 'numba-cuda[cu12]'")
def test_every_kernel_compiles_into_registers():
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"}
    command = [sys.executable, "-m", "tests.numba.compile_kernels"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("attention") == 12
