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

// cut_at of select_row.cuh by the whole thread block: each warp sums the scores from a threshold of its own on, so that a pass finds four
// bits of the right one. room: two turns of SELECT_WARPS numbers in shared memory.
DEVICE Cut cut_of_row(double share, const uint32_t* scores, int visible, uint32_t* room) {
  if (share >= 1.0) return {0, 0xffffffffu};  // every visible block, those of score 0 too
  constexpr int CANDIDATES = SELECT_WARPS - 1;  // t + 1, t + 2, .. units; the last warp sums all scores, in the first pass
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  WarpTeam team;
  // As in lowest_kept: t, the sum of the scores from t on, and from the smallest candidate that was too large
  uint32_t t = 0, from_t = 0, too_large = 0, wanted = 0;
  for (int bit = 28, turn = 0; bit >= 0; bit -= 4, turn ^= SELECT_WARPS) {
    const uint32_t of_warp = sum_from(scores, visible, warp < CANDIDATES ? t + ((warp + 1u) << bit) : 0, team);
    if (lane == 0) room[turn + warp] = of_warp;
    __syncthreads();
    const uint32_t sum = room[turn + (lane & (SELECT_WARPS - 1))];  // they only fall from candidate to candidate
    if (bit == 28) {
      from_t = __shfl_sync(0xffffffffu, sum, CANDIDATES);
      wanted = max(1u, (uint32_t)ceil(share * (double)from_t));
    }
    const int steps = __popc(__ballot_sync(0xffffffffu, lane < CANDIDATES && sum >= wanted));
    if (steps) {
      t += (uint32_t)steps << bit;
      from_t = __shfl_sync(0xffffffffu, sum, steps - 1);
    }
    if (steps < CANDIDATES) too_large = __shfl_sync(0xffffffffu, sum, steps);
    if (t && from_t - too_large < 2 * t) {  // of one score alone
      t = from_t - too_large;
      break;
    }
  }
  const uint32_t above = sum_from(scores, visible, t + 1, team);
  return {t, t ? (wanted - above + t - 1) / t : 0};
}
