// Step 6 for the few rows whose output came out not finite: each is computed again, key by key, in float32.
//
// The tensor cores multiply the values of hidden keys by a weight of 0, and 0 * NaN is NaN: a NaN behind a query's position, in
// a block that the query's own block shares, would reach it. The fast kernels only notice an output that is not finite; here
// hidden keys are left out for good. What a row may really see and is NaN stays NaN, found at the first such key.
//
// Ladder: 1 checking V's tile of the diagonal in the fast kernels (2 % slower on short lists); 2 this, which costs them a sum.
#include "shape.cuh"

#define WARPS 4
#define PER_LANE ((HEAD_DIM + 31) / 32)

DEVICE float element(const uint16_t* x) {
  return unpack(*x).x;
}

struct Row {
  float q[PER_LANE], out[PER_LANE], max, sum;

  DEVICE void absorb(const uint16_t* k, const uint16_t* v, int lane, float c) {
    float dot = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (32 * i + lane < HEAD_DIM) dot += q[i] * element(k + 32 * i + lane);
    for (int step = 16; step; step >>= 1) dot += __shfl_xor_sync(0xffffffffu, dot, step);
    dot *= c;
    const float highest = fmaxf(max, dot), shrink = exp2_fast(max - highest);
    const float weight = dot == dot ? exp2_fast(dot - highest) : dot;
    max = highest;
    sum = sum * shrink + weight;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (32 * i + lane < HEAD_DIM) out[i] = out[i] * shrink + weight * element(v + 32 * i + lane);
  }
  DEVICE bool is_nan() const {
    float total = sum;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) total += out[i] * 0.f;
    return __any_sync(0xffffffffu, total != total);
  }
};

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
    Row row = {};
    row.max = -INFINITY_F;
    float old = 0.f;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i) {
      if (32 * i + lane >= HEAD_DIM) continue;
      row.q[i] = element(q + 32 * i + lane);
      old += element(out + 32 * i + lane) * 0.f;
    }
    if (!__any_sync(0xffffffffu, old != 0.f)) continue;  // this row is fine

    const int q_block = at / shape.block_size, visible = visible_blocks(shape, q_block), last = last_visible_key(shape, at);
    bool nan = false;
    for (int block = 0; block < visible && !nan; ++block) {
      const bool selected = selected_word(words, shape, head, q_block, block >> 5, visible) >> (block & 31) & 1;
      const int keys_here = selected ? min(shape.block_size, last + 1 - block * shape.block_size) : shape.key_anchors;
      for (int j = 0; j < keys_here && !nan; ++j) {
        const int position = selected ? block * shape.block_size + j : anchors[((int64_t)kv_head * shape.num_k_blocks + block) * shape.key_anchors + j];
        if (position < 0 || position > last) continue;
        row.absorb(k + position * k_row_stride, v + position * v_row_stride, lane, shape.scale_log2);
        nan = row.is_nan();
      }
    }
    const float scale = row.sum == 0.f ? 0.f : 1.f / row.sum;
#pragma unroll
    for (int i = 0; i < PER_LANE; ++i)
      if (32 * i + lane < HEAD_DIM) out[32 * i + lane] = (uint16_t)pack(row.out[i] * scale, 0.f);
  }
}
