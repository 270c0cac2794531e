// The end of decode_attention.cu: what the warps of a thread block found becomes one result, and what the thread blocks of a group found
// becomes the output. Sums are always taken in the same order.
#pragma once
#include "decode_work.cuh"

#define LN_2 0.6931471805599453f

// Sums what the warps found, in their order, into found [ROWS][HEAD_DIM] and its {max, sum} [ROWS], both in global memory.
DEVICE void merge_warps(float* found, float2* statistics, const float* outputs, const float2* warp_statistics, int rows) {
  for (int e = threadIdx.x; e < rows * HEAD_DIM; e += THREADS) {
    const int row = e / HEAD_DIM;
    float highest = -INFINITY_F;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) highest = fmaxf(highest, warp_statistics[w * ROWS + row].x);
    const float base = highest == -INFINITY_F ? 0.f : highest;
    float out = 0.f, sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float2 s = warp_statistics[w * ROWS + row];
      const float weight = exp2_fast(s.x - base);
      out += weight * outputs[w * ROWS * HEAD_DIM + e];
      sum += weight * s.y;
    }
    found[e] = out;
    if (e % HEAD_DIM == 0) statistics[row] = make_float2(highest, sum);
  }
}

// The share of each of `count` thread blocks in row `row`, to weights [count]; returns the row's log-sum-exp. One warp.
DEVICE float weights_of_row(float* weights, const float2* statistics, int row, int count) {
  const int lane = threadIdx.x & 31;
  float highest = -INFINITY_F, sum = 0.f;
  for (int i = lane; i < count; i += 32) highest = fmaxf(highest, statistics[i * ROWS + row].x);
#pragma unroll
  for (int step = 16; step; step >>= 1) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, step));
  const float base = highest == -INFINITY_F ? 0.f : highest;
  for (int i = lane; i < count; i += 32) sum += exp2_fast(statistics[i * ROWS + row].x - base) * statistics[i * ROWS + row].y;
#pragma unroll
  for (int step = 16; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const float scale = sum == 0.f ? 0.f : 1.f / sum;
  for (int i = lane; i < count; i += 32) weights[i] = exp2_fast(statistics[i * ROWS + row].x - base) * scale;
  return sum == 0.f ? -INFINITY_F : (base + log2_fast(sum)) * LN_2;
}

// What each warp's thread blocks (w, w + WARPS, ..) found, weighted and summed: to sums [WARPS][ROWS][HEAD_DIM] in shared memory.
DEVICE void merge_thread_blocks(float* sums, const float* found, const float* weights, int rows, int count) {
  constexpr int ALL = ROWS * HEAD_DIM / 4, AT_ONCE = ALL < 128 ? (ALL + 31) / 32 : 4;  // columns of 4 numbers; a lane's
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, columns = rows * (HEAD_DIM / 4);
  for (int first = 0; first < columns; first += 32 * AT_ONCE) {
    float4 sum[AT_ONCE];
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c) sum[c] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int i = warp; i < count; i += WARPS) {
      const float4* from = (const float4*)(found + (int64_t)i * ROWS * HEAD_DIM);
#pragma unroll
      for (int c = 0; c < AT_ONCE; ++c) {
        const int column = min(first + 32 * c + lane, columns - 1);  // past the end: a number that is not used
        const float weight = weights[column / (HEAD_DIM / 4) * gridDim.x + i];
        const float4 x = from[column];
        sum[c].x += weight * x.x;
        sum[c].y += weight * x.y;
        sum[c].z += weight * x.z;
        sum[c].w += weight * x.w;
      }
    }
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c)
      if (first + 32 * c + lane < columns) ((float4*)(sums + warp * ROWS * HEAD_DIM))[first + 32 * c + lane] = sum[c];
  }
}

// One row of the output from the warps' sums, [WARPS] apart by ROWS * HEAD_DIM; whether it is finite. One warp.
DEVICE bool write_row(uint16_t* out, const float* sums) {
  float not_finite = 0.f;
  for (int dim = 2 * (threadIdx.x & 31); dim < HEAD_DIM; dim += 64) {
    float x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float2 both = *(const float2*)(sums + w * ROWS * HEAD_DIM + dim);
      x += both.x;
      y += both.y;
    }
    *(uint32_t*)(out + dim) = pack(x, y);
    not_finite += (x + y) * 0.f;
  }
  return !__any_sync(0xffffffffu, not_finite != 0.f);
}
