// Sums over the thread block of decode_select, and Top-P's cut found by all of it.
#pragma once
#include "select_row.cuh"

#define SELECT_WARPS 16
#define BIN_BITS 11
#define BINS (1 << BIN_BITS)
#define CUT_ROOM (SELECT_WARPS + 4)

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

// What lies before this thread's x, thread after thread. room [SELECT_WARPS] in shared memory.
DEVICE uint32_t sum_before(uint32_t x, uint32_t* room) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  uint32_t upto = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(0xffffffffu, upto, step);
    if (lane >= step) upto += other;
  }
  if (lane == 31) room[warp] = upto;
  __syncthreads();
  return __reduce_add_sync(0xffffffffu, lane < warp ? room[lane] : 0) + upto - x;
}

// cut_at of select_row.cuh by the whole thread block: a histogram tells 11 bits of the threshold at a time, from the highest bit that any
// score has. Many scores are next to nothing and would all meet in bin 0: that one is what the others leave of the sum. total, highest: of
// the scores. bins [BINS] and room [CUT_ROOM] in shared memory.
DEVICE Cut cut_of_row(double share, const uint32_t* scores, int visible, uint32_t total, uint32_t highest, uint32_t* bins, uint32_t* room) {
  if (share >= 1.0) return {0, 0xffffffffu};  // every visible block, those of score 0 too
  constexpr int A_THREAD = BINS / (32 * SELECT_WARPS);
  const uint32_t wanted = max(1u, (uint32_t)ceil(share * (double)total));
  if (total < wanted) return {0, 0};
  uint32_t* found = room + SELECT_WARPS;  // the bin where the sum reaches `wanted`, the sum above it, and its own
  uint32_t t = 0, above = 0, inside = total;  // the threshold is in t .. t + 2^bits - 1; sums of the scores above and in there
  for (int bits = 32 - __clz(highest | 1); bits; bits = max(0, bits - BIN_BITS)) {
    const int shift = max(0, bits - BIN_BITS);
    for (int b = threadIdx.x; b < BINS; b += 32 * SELECT_WARPS) bins[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < visible; i += 32 * SELECT_WARPS) {
      const uint32_t score = scores[i], bin = (score - t) >> shift;
      if (score >= t && bin && (score - t) >> bits == 0) atomicAdd(bins + bin, score);
    }
    __syncthreads();
    uint32_t here[A_THREAD], mine = 0;  // from the highest bin down, neighbours to a thread; the last thread has bin 0 last
#pragma unroll
    for (int n = 0; n < A_THREAD; ++n) mine += here[n] = bins[BINS - 1 - (A_THREAD * threadIdx.x + n)];
    uint32_t before = above + sum_before(mine, room);
    if (threadIdx.x == 32 * SELECT_WARPS - 1) {
      here[A_THREAD - 1] = above + inside - before - mine;
      mine += here[A_THREAD - 1];
    }
    if (before < wanted && before + mine >= wanted) {
#pragma unroll
      for (int n = 0; n < A_THREAD; ++n) {
        if (before < wanted && before + here[n] >= wanted) {
          found[0] = BINS - 1 - (A_THREAD * threadIdx.x + n);
          found[1] = before;
          found[2] = here[n];
        }
        before += here[n];
      }
    }
    __syncthreads();
    t += found[0] << shift;
    above = found[1];
    inside = found[2];
    if (t && inside < 2 * t) {  // of one score alone
      t = inside;
      break;
    }
  }
  return {t, t ? (wanted - above + t - 1) / t : 0};
}
