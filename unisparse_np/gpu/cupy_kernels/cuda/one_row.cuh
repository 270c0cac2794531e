// Step 6 of one query, key by key, by one warp in float32: hidden keys are left out for good. Where the query may really see a key or
// value that is not finite its whole row is NaN, at the first such key: sums that end there would look like numbers.
#pragma once
#include "shape.cuh"

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

// Query `at` of a head: q its row, k and v its KV head, out its row of the output, which is written again.
DEVICE void attend_one_row(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, int64_t k_row_stride, int64_t v_row_stride,
                           const Shape& shape, const uint32_t* words, const int* anchors, int head, int at)
{
  const int lane = threadIdx.x & 31, kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  Row row = {};
  row.max = -INFINITY_F;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    if (32 * i + lane < HEAD_DIM) row.q[i] = element(q + 32 * i + lane);

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
  const float scale = nan ? __int_as_float(0x7fc00000) : row.sum == 0.f ? 0.f : 1.f / row.sum;
#pragma unroll
  for (int i = 0; i < PER_LANE; ++i)
    if (32 * i + lane < HEAD_DIM) out[32 * i + lane] = (uint16_t)pack(row.out[i] * scale, 0.f);
}
