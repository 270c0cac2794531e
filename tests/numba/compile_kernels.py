"""Compile every kernel for two GPUs without having one, and print what each uses. Needs NVVM: pip install 'numba-cuda[cu12]'.

Numba finds the types of a kernel only when it compiles it, and the simulator never does. A local array that does not end in
registers shows as `.local` memory, which would make a kernel many times slower.
"""

import importlib
import re
import sys
import types

import numpy as np
from numba import cuda
from numba.cuda import dispatcher
from numba.types import bool_, float16, float32, float64, int32, int64, uint16, uint32

CAPABILITIES = ((8, 0), (9, 0))


def array(dtype, dims):
    return dtype[(slice(None),) * (dims - 1) + (slice(None, None, 1),)]


def kernels():
    """Name, kernel and argument types, for every kernel of the package."""
    parts = ("anchors", "attend", "attended", "compress", "device", "scores", "select")
    here = {part: importlib.import_module(f"unisparse_np.gpu.numba_kernels.{part}") for part in parts}
    for real, x in ((np.float32, float32), (np.float64, float64)):
        x3, i1 = array(x, 3), array(int32, 1)
        for head_dim in (64, 128, 256):
            arguments = (x3, x3, x3, *[array(int32, 3)] * 3, int64, int64, int64, float64, x3, array(x, 2))
            yield f"attention {x} {head_dim}", here["attend"].attention_kernel(real, head_dim), arguments
        yield f"score {x}", here["scores"].score_kernel(real), (x3, x3, i1, i1, int64, int64, int64, float64, x3, x3)
        select = (x3, x3, array(float64, 1), array(x, 1), i1, i1, i1, i1, int64, array(bool_, 3))
        yield f"select {x}", here["select"].select, select
        yield f"mean_of_neighbours {x}", here["compress"].mean_of_neighbours, (x3, x3, int64, int64)
        yield f"mean_of_composites {x}", here["compress"].mean_of_composites, (x3, x3, int64, int64, int64)
        yield f"squared_norms {x}", here["anchors"].squared_norms, (x3, x3)
        yield f"rank_keys {x}", here["anchors"].rank_keys, (x3, int64, array(int32, 3))
        yield f"first_not_finite {x}", here["device"].first_not_finite, (x3, int64, array(int64, 1))
    lists = [array(int32, 3)] * 3
    yield "fill_lists", here["attended"].fill_lists, (array(bool_, 3), array(int32, 3), int64, array(int32, 1), int64, *lists)
    yield "widen float16", here["device"].copy_values, (array(float16, 3), array(float32, 3))
    yield "round to float16", here["device"].copy_values, (array(float32, 3), array(float16, 3))
    yield "widen bfloat16", here["device"].widen_bfloat16, (array(uint16, 3), array(uint32, 3))
    yield "round to bfloat16", here["device"].round_to_bfloat16, (array(uint32, 3), array(uint16, 3))


def main() -> int:
    cuda.is_available = lambda: True
    spilled = 0
    for capability in CAPABILITIES:
        dispatcher.get_current_device = lambda capability=capability: types.SimpleNamespace(compute_capability=capability)
        for name, kernel, arguments in kernels():
            ptx, _ = cuda.compile_ptx(kernel.py_func, arguments, cc=capability)
            local = re.findall(r"\.local .*\[(\d+)\]", ptx)
            shared = sum(int(size) for size in re.findall(r"\.shared .*\[(\d+)\]", ptx))
            print(f"sm_{capability[0]}{capability[1]} {name}: {shared} bytes shared, local {local or 'none'}")
            spilled += bool(local) or shared > 48 * 1024
    return spilled


if __name__ == "__main__":
    sys.exit(main())
