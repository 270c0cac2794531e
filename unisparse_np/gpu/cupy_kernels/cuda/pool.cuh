// What the kernels that pool tokens share: how a warp lies over a row, and how composites, norms and anchors leave it.
//
// A composite is the same to the bit whichever kernel pooled it: lane l of a row holds elements 8 l .. 8 l + 7, ROWS_AT_ONCE
// rows are added side by side, member heads one after the other, and the partial sums meet in `finish_mean`.
#pragma once
#include "elements.cuh"

#define LANES_PER_ROW (HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)  // 8 elements a lane; those past HEAD_DIM idle
#define ROWS_AT_ONCE (32 / LANES_PER_ROW)
#define LARGEST_HALF 65504.f

DEVICE float saturate(float x) { return x > LARGEST_HALF ? LARGEST_HALF : x < -LARGEST_HALF ? -LARGEST_HALF : x; }

// The squared norm of one row, known to all of its lanes. NaN counts as infinite. The roundings are spelled out.
DEVICE float squared_norm(const float (&x)[8]) {
  float n = x[0] * x[0];
#pragma unroll
  for (int i = 1; i < 8; ++i) n = fmaf(x[i], x[i], n);
#pragma unroll
  for (int step = LANES_PER_ROW / 2; step; step >>= 1) n += __shfl_xor_sync(0xffffffffu, n, step);
  return n == n ? n : INFINITY_F;
}

// From each lane's sums to the mean of `count` rows, in the first LANES_PER_ROW lanes.
DEVICE void finish_mean(float (&mean)[8], int count) {
  const float share = 1.f / count;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
#pragma unroll
    for (int step = LANES_PER_ROW; step < 32; step *= 2) mean[i] += __shfl_xor_sync(0xffffffffu, mean[i], step);
    mean[i] *= share;
  }
}

// Row `at` of composites [.., HEAD_DIM], as float16 and/or float32 (either null), by the first LANES_PER_ROW lanes.
DEVICE void write_composite(const float (&mean)[8], int64_t at, int lane, uint32_t* half, float* single) {
  if (lane * 8 >= HEAD_DIM) return;
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    if (half) half[(at * HEAD_DIM + lane * 8 + i) >> 1] = pack_half(saturate(mean[i]), saturate(mean[i + 1]));
    if (single) {
      single[at * HEAD_DIM + lane * 8 + i] = mean[i];
      single[at * HEAD_DIM + lane * 8 + i + 1] = mean[i + 1];
    }
  }
}

// The r keys of smallest norm of one block, by one warp: ascending, lower position first on ties, -1 where there are none left.
DEVICE void pick_anchors(const float* norms, int first, int count, int key_anchors, int* anchors) {
  const int lane = threadIdx.x & 31;
  float last_norm = -1.f;
  int last = -1;
  for (int rank = 0; rank < key_anchors; ++rank) {
    float best = INFINITY_F;
    int place = BLOCK_SIZE;
    for (int i = lane; i < count; i += 32) {  // the smallest after the one before
      const float n = norms[i];
      const bool after = n > last_norm || (n == last_norm && i > last);
      if (after && (n < best || (n == best && i < place))) { best = n; place = i; }
    }
    for (int step = 16; step; step >>= 1) {
      const float n = __shfl_xor_sync(0xffffffffu, best, step);
      const int i = __shfl_xor_sync(0xffffffffu, place, step);
      if (n < best || (n == best && i < place)) { best = n; place = i; }
    }
    if (lane == 0) anchors[rank] = place < BLOCK_SIZE ? first + place : -1;
    last_norm = best;
    last = place;
  }
}

struct Input {  // one head after the other, each with rows of HEAD_DIM contiguous elements
  const uint16_t* data;
  int64_t head_stride, row_stride;
};

// The mean of tokens [start, stop) of `members` heads, by one warp: lane l < LANES_PER_ROW ends with elements 8 l .. 8 l + 7.
// norms, if given, receives the squared norm of every row: norms[member * BLOCK_SIZE + token % BLOCK_SIZE].
DEVICE void pool(float (&mean)[8], Input x, int first_head, int members, int start, int stop, float* norms) {
  const int lane = threadIdx.x & 31, part = lane / LANES_PER_ROW, column = (lane % LANES_PER_ROW) * 8;
  const int tokens = stop - start;
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] = 0.f;
  for (int member = 0; member < members; ++member) {
    const uint16_t* from = x.data + (first_head + member) * x.head_stride + start * x.row_stride + column;
#pragma unroll 4
    for (int r0 = 0; r0 < tokens; r0 += ROWS_AT_ONCE) {
      const int r = r0 + part;
      int4 raw = make_int4(0, 0, 0, 0);
      if (r < tokens && column < HEAD_DIM) raw = *(const int4*)(from + r * x.row_stride);
      float row[8];
      unpack8(row, raw);
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[i] += row[i];
      if (norms) {
        const float n = squared_norm(row);
        if (r < tokens && column == 0) norms[member * BLOCK_SIZE + (start + r) % BLOCK_SIZE] = n;
      }
    }
  }
  finish_mean(mean, members * tokens);
}
