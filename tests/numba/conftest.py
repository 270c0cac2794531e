"""These tests run the Numba kernels on a GPU where there is one, and in Numba's simulator elsewhere.

Numba decides once, when it is imported, so the simulator is switched on here, before any test imports it, and the variable is
taken back at once: programs that other tests start do not inherit it.
"""

import ctypes
import importlib.util
import os

import pytest


def gpu_is_there() -> bool:
    try:
        return ctypes.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


if importlib.util.find_spec("numba") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    with pytest.MonkeyPatch.context() as patch:
        if not gpu_is_there():
            patch.setitem(os.environ, "NUMBA_ENABLE_CUDASIM", "1")
        import numba.cuda  # noqa: F401
