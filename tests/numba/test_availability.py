"""What is missing is named, with the way to get it."""

import os
import subprocess
import sys

import pytest

from tests.numba.conftest import gpu_is_there

CALL = """
from unisparse_np.attention import load_backend
try:
    print(load_backend("numba").name)
except Exception as error:
    print(type(error).__name__, error)
"""


def output_of(code: str, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "NUMBA_ENABLE_CUDASIM"} | variables
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout


@pytest.mark.skipif(gpu_is_there(), reason="there is a GPU")
def test_no_gpu_and_no_simulator():
    printed = output_of(CALL)
    assert printed.startswith("BackendUnavailable the numba backend found no CUDA GPU") and "NUMBA_ENABLE_CUDASIM=1" in printed


def test_the_simulator_needs_no_gpu():
    assert output_of(CALL, NUMBA_ENABLE_CUDASIM="1") == "numba\n"


def test_no_numba():
    printed = output_of("import sys\nsys.modules['numba'] = None\n" + CALL)
    assert printed.startswith("BackendUnavailable the numba backend needs numba") and "pip install 'unisparse-np[gpu]'" in printed
