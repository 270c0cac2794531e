"""Imported first: refuses a machine that has neither a GPU nor the simulator, and settles how Numba runs here."""

from __future__ import annotations

from numba import config, cuda

from ...errors import BackendUnavailable
from .tile import IN_SIMULATOR

if not cuda.is_available():
    raise BackendUnavailable(
        "the numba backend found no CUDA GPU: set NUMBA_ENABLE_CUDASIM=1 before Python starts to run its kernels in Numba's simulator, "
        "or use backend='reference'"
    )

config.CUDA_LOW_OCCUPANCY_WARNINGS = 0  # a decode step is a small grid by nature

if IN_SIMULATOR:
    from .simulator import one_thread_at_a_time

    one_thread_at_a_time()
