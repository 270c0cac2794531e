"""What compute-sanitizer is run on: `python -m tests.gpu.sanitized CASE`. CuPy's memory pool is off: every array has its own bounds.

native, portable   whole calls on small problems: blocks of 64, 128, 256, head_dim 64, 128 and 96, anchors, both rules, NaN, dense
decode             steps of DecodeAttention after a pooled prompt, sparse and dense, and calls of few queries
native finite      the same without the NaN, so that no kernel reads an output again
record             the smallest program that hands a record over shared memory by mbarriers, as attend_sm90.cu does

The last tells what the tools can follow: see docs/kernels.md, "Tools".
"""

from __future__ import annotations

import sys

import cupy
import ml_dtypes
import numpy as np

from tests.decoding import Decoding
from unisparse_np import Problem, UniSparseConfig
from unisparse_np.gpu import cupy_kernels as engine
from unisparse_np.gpu.cupy_kernels import attend, scores

PROBLEMS = [
    Problem(2, 1, 70, 230, 64, UniSparseConfig(64, 4, 4, 2, top_p=0.3, sink_blocks=0, local_blocks=0), q_offset=130),
    Problem(1, 1, 140, 290, 64, UniSparseConfig(top_p=0.2, key_anchors=2, sink_blocks=0), causal=False),
    Problem(2, 1, 130, 300, 128, UniSparseConfig(top_p=0.6, row_threshold=0.1)),
    Problem(1, 1, 270, 520, 64, UniSparseConfig(256, 16, 16, top_p=0.3, sink_blocks=0, local_blocks=0)),
    Problem(1, 1, 100, 300, 128, UniSparseConfig(128, 32, 32, top_p=0.5)),
    Problem(1, 1, 40, 100, 96, UniSparseConfig(64, 8, 8, top_p=0.5)),
    Problem(2, 1, 69, 235, 64, UniSparseConfig(64, 4, 2, top_p=0.3, row_threshold=0.1, top_p_compress=8), q_offset=131),
]


def calls(portable: bool, with_nan: bool = True) -> None:
    """Every problem sparse and dense, once with a NaN behind a query. The outputs stay where they are."""
    if portable:
        attend.HOPPER_HEAD_DIMS = scores.HOPPER_HEAD_DIMS = ()
    for n, problem in enumerate(PROBLEMS):
        rng = np.random.default_rng(n)
        q, k, v = (
            cupy.asarray(rng.standard_normal((heads, length, problem.head_dim)).astype(ml_dtypes.bfloat16))
            for heads, length in ((problem.num_q_heads, problem.q_len), *2 * [(problem.num_kv_heads, problem.k_len)])
        )
        if n == 2 and with_nan:
            v[:, -1] = np.nan
        engine.run_sparse(q, k, v, problem)
        engine.run_dense(q, k, v, problem)


def decode() -> None:
    """Steps across the edge of a block, of a composite and of a ragged prompt; then a sparse and a dense call of three queries."""
    both = UniSparseConfig(64, 4, 2, top_p=0.5, row_threshold=0.1, top_p_compress=8, key_anchors=2)
    for config, head_dim in ((UniSparseConfig(top_p=0.5), 128), (both, 64), ("dense", 128)):
        Decoding(config, 4, 2, head_dim, 400, ml_dtypes.bfloat16).run(cupy, [200, 201, 255, 256, 399])
    rng = np.random.default_rng(0)
    q, k, v = (cupy.asarray(rng.standard_normal((heads, length, 64)).astype(np.float16)) for heads, length in ((4, 3), (2, 300), (2, 300)))
    few = Problem(4, 2, 3, 300, 64, UniSparseConfig(64, top_p=0.5))
    engine.run_sparse(q, k, v, few)
    engine.run_dense(q, k, v, few)


RECORD = r"""
__device__ unsigned address(const void* p) { return (unsigned)__cvta_generic_to_shared(p); }
__device__ void arrive(unsigned b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
__device__ void wait(unsigned b, unsigned parity) {
  asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}"
               ::"r"(b), "r"(parity) : "memory");
}
// Warp 0 hands 8 records to warp 1, one after the other, through one place in shared memory. READERS lanes read it, lane 0 arrives.
extern "C" __global__ void hand_over(int* out) {
  __shared__ alignas(16) int record[4];
  __shared__ alignas(8) unsigned long long full, empty;
  const unsigned f = address(&full), e = address(&empty);
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(f));
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(e));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const int lane = threadIdx.x & 31;
  for (int n = 0; n < 8; ++n) {
    if (threadIdx.x < 32) {
      wait(e, (n & 1) ^ 1);
      if (lane == 0) { record[0] = 3 * n; arrive(f); }
    } else {
      wait(f, n & 1);
      int seen = lane < READERS ? record[0] : 0;
      if (READERS == 1) seen = __shfl_sync(0xffffffffu, seen, 0);
      __syncwarp();
      if (lane == 0) arrive(e);
      out[32 * n + lane] = seen;
    }
  }
}
"""


def hand_over(readers: int) -> None:
    """The records arrive, and are read by one lane or by all of a warp."""
    kernel = cupy.RawModule(code=RECORD, options=("-std=c++17", f"-DREADERS={readers}"), backend="nvrtc").get_function("hand_over")
    out = cupy.zeros(256, np.int32)
    kernel((1,), (64,), (out,))
    assert (cupy.asnumpy(out).reshape(8, 32) == 3 * np.arange(8)[:, None]).all()


CASES = {
    "decode": decode,
    "native": lambda: calls(portable=False),
    "native finite": lambda: calls(portable=False, with_nan=False),
    "portable": lambda: calls(portable=True),
    "record": lambda: hand_over(32),
    "record read by one lane": lambda: hand_over(1),
}

if __name__ == "__main__":
    cupy.cuda.set_allocator(None)
    CASES[sys.argv[1]]()
    cupy.cuda.Device().synchronize()
    print("done")
