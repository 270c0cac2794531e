// Step 6 for the few rows whose output came out not finite: each is computed again, key by key, in float32.
//
// The tensor cores multiply the values of hidden keys by a weight of 0, and 0 * NaN is NaN: a NaN behind a query's position, in
// a block that the query's own block shares, would reach it. The fast kernels only notice an output that is not finite; here
// hidden keys are left out for good. A row that may really see what is not finite is NaN, found at the first such key.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  checking V's tile of the diagonal in the fast kernels: 2 % slower on short lists
//   2  this, which costs them a sum
//
// Shared memory: none.
#include "one_row.cuh"

#define WARPS 4

// Grid: a few thread blocks of WARPS warps; a warp takes one row at a time. Arguments as in attend_sm80.
extern "C" __global__ void __launch_bounds__(32 * WARPS) repair(
    const uint16_t* __restrict__ queries, const uint16_t* __restrict__ keys, const uint16_t* __restrict__ values, uint16_t* __restrict__ output,
    int64_t q_head_stride, int64_t q_row_stride, int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride, int64_t v_row_stride,
    const Shape shape, const uint32_t* __restrict__ words, const int* __restrict__ anchors, const int* __restrict__ broken)
{
  const int lane = threadIdx.x & 31, rows = 16 * broken[0];
  const int group = shape.num_q_heads / shape.num_kv_heads;
  for (int n = blockIdx.x * WARPS + (threadIdx.x >> 5); n < rows; n += gridDim.x * WARPS) {
    const int head = broken[2 + 2 * (n / 16)], at = broken[3 + 2 * (n / 16)] + n % 16, kv_head = head / group;
    if (at >= shape.q_len) continue;
    const uint16_t* q = queries + head * q_head_stride + at * q_row_stride;
    const uint16_t* k = keys + kv_head * k_head_stride;
    const uint16_t* v = values + kv_head * v_head_stride;
    uint16_t* out = output + ((int64_t)head * shape.q_len + at) * HEAD_DIM;
    float old = 0.f;
    for (int i = lane; i < HEAD_DIM; i += 32) old += element(out + i) * 0.f;
    if (!__any_sync(0xffffffffu, old != 0.f)) continue;  // this row is fine
    attend_one_row(q, k, v, out, k_row_stride, v_row_stride, shape, words, anchors, head, at);
  }
}
