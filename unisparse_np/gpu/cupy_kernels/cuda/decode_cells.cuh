// Scores of composite keys in a decode step: from what mma.sync leaves in the registers to cells, the softmax of up to 16 keys of a block.
#pragma once
#include "shape.cuh"

#define ROWS (8 * ROW_TILES)
#define TILE 16  // composite keys
#define CELL (KEYS_PER_BLOCK < TILE ? KEYS_PER_BLOCK : TILE)  // composite keys that are summed at once; a block has one or more

DEVICE Shape at_position(const Shape& given, int position) {  // the problem of one query, the last of `position + 1` keys
  Shape shape = given;
  shape.q_offset = position;
  shape.k_len = position + 1;
  return shape;
}

// Scores of composite keys first .. first + 15 become logits, -inf from `stop` on. Lane (g, t): keys g and g + 8, rows 2 t and 2 t + 1.
DEVICE void to_logits(float (&z)[4], int first, int stop, float scale_log2) {
  const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) z[i] = first + g + 8 * (i >> 1) < stop ? z[i] * scale_log2 : -INFINITY_F;
}

// The same of coarse keys: each where its first fine key was, -inf in the places of its others.
DEVICE void to_coarse(float (&z)[4], int first, const Shape& shape) {
  constexpr int HALVES = COARSE == TILE ? 1 : 2, LANES = COARSE < 8 ? COARSE : 8;
  const int g = (threadIdx.x & 31) >> 2;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float sum[2], tokens[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      tokens[k] = min(shape.k_compress, max(0, shape.k_len - (first + g + 8 * k) * shape.k_compress));
      sum[k] = tokens[k] > 0.f ? tokens[k] * z[2 * k + e] : 0.f;
    }
    if (HALVES == 1) sum[0] += sum[1], tokens[0] += tokens[1];
    z[e] = z[2 + e] = -INFINITY_F;
#pragma unroll
    for (int k = 0; k < HALVES; ++k) {
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) {
        sum[k] += __shfl_xor_sync(0xffffffffu, sum[k], 4 * step);
        tokens[k] += __shfl_xor_sync(0xffffffffu, tokens[k], 4 * step);
      }
      if (g % LANES == 0 && tokens[k] > 0.f) z[2 * k + e] = sum[k] / tokens[k];
    }
  }
}

// From 16 keys' logits to the cells of the rows that exist.
DEVICE void write_cells(const float (&logits)[4], int first, int stop, int rows, float2* cells, int64_t pitch) {
  constexpr int HALVES = CELL == TILE ? 1 : 2, LANES = CELL < 8 ? CELL : 8;  // cells that a lane's two keys belong to; lanes a cell
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float highest[2] = {logits[e], logits[2 + e]};
    if (HALVES == 1) highest[0] = highest[1] = fmaxf(highest[0], highest[1]);
#pragma unroll
    for (int k = 0; k < HALVES; ++k) {
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) highest[k] = fmaxf(highest[k], __shfl_xor_sync(0xffffffffu, highest[k], 4 * step));
      const float base = highest[k] == -INFINITY_F ? 0.f : highest[k];
      float sum = exp2_fast(logits[2 * k + e] - base);
      if (HALVES == 1) sum += exp2_fast(logits[2 + e] - base);
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, 4 * step);
      const int cell = (first + g + 8 * k) / CELL;
      if (g % LANES == 0 && 2 * t + e < rows && cell * CELL < stop) cells[(2 * t + e) * pitch + cell] = make_float2(highest[k], sum);
    }
  }
}
