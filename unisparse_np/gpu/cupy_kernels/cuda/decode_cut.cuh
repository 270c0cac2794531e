// Sums over the thread block of decode_select, and Top-P's cut found by all of it.
#pragma once
#include "select_row.cuh"

#define SELECT_WARPS 16

// One value a thread to one for all, by a tree that is always the same. room [SELECT_WARPS] in shared memory.
template <class Merge> DEVICE float over_thread_block(float x, float* room, Merge merge) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = merge(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  x = room[0];
  for (int w = 1; w < SELECT_WARPS; ++w) x = merge(x, room[w]);
  return x;
}

// Sums of N numbers over the thread block. room: two turns of N rows of SELECT_WARPS numbers in shared memory.
template <int N> DEVICE void sum_over_thread_block(uint32_t (&x)[N], uint32_t* room, int& turn) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t* here = room + (turn ^= 1) * N * SELECT_WARPS;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    x[n] = __reduce_add_sync(0xffffffffu, x[n]);
    if (lane == 0) here[n * SELECT_WARPS + warp] = x[n];
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = __reduce_add_sync(0xffffffffu, lane < SELECT_WARPS ? here[n * SELECT_WARPS + lane] : 0);
}

// cut_at of select_row.cuh by the whole thread block, which looks for the threshold two bits at a time. total: the sum of the scores.
DEVICE Cut cut_of_row(double share, const uint32_t* scores, int visible, uint32_t* room) {
  if (share >= 1.0) return {0, 0xffffffffu};  // every visible block, those of score 0 too
  int turn = 0;
  const auto sums_from = [&](uint32_t least, uint32_t apart, uint32_t (&sums)[3]) {  // of the scores from three candidates on
    sums[0] = sums[1] = sums[2] = 0;
    for (int i = threadIdx.x; i < visible; i += 32 * SELECT_WARPS) {
      const uint32_t score = scores[i];
#pragma unroll
      for (int n = 0; n < 3; ++n) sums[n] += score >= least + n * apart ? score : 0;
    }
    sum_over_thread_block(sums, room, turn);
  };
  uint32_t sums[3];
  sums_from(0, 1u << 30, sums);
  const uint32_t total = sums[0], wanted = max(1u, (uint32_t)ceil(share * (double)total));
  // As in lowest_kept: t, the sum of the scores from t on, and from the smallest candidate that was too large
  uint32_t t = 0, from_t = total, too_large = 0;
  for (int bit = 30; bit >= 0; bit -= 2) {
    const uint32_t unit = 1u << bit;
    sums_from(t + unit, unit, sums);
    const int steps = (sums[0] >= wanted) + (sums[1] >= wanted) + (sums[2] >= wanted);  // the sums only fall
    if (steps) {
      t += steps * unit;
      from_t = sums[steps - 1];
    }
    if (steps < 3) too_large = sums[steps];
    if (t && from_t - too_large < 2 * t) {  // of one score alone
      t = from_t - too_large;
      break;
    }
  }
  sums_from(t + 1, 0, sums);
  return {t, t ? (wanted - sums[0] + t - 1) / t : 0};
}
