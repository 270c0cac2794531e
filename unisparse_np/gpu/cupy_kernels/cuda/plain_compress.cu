// Step 1, and the anchors of step 6, for what compress.cu does not take: float32 and other head dims.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  a warp a composite token, its lanes side by side along the row; the anchors are a kernel of their own and read the keys again
//
// Sums are float32, in an order that depends on the composite (or key) alone: the same to the bit whatever it was cut with.
//
// Shared memory: find_anchors_plain keeps the squared norms of its block [block_size].
#include "plain.cuh"
#define BLOCK_SIZE 4096  // the largest there may be, which is what pick_anchors takes for "none"
#include "pool.cuh"

#define POOL_WARPS 4

// Grid: (ceil(composites / POOL_WARPS), composite heads). x: heads of rows of HEAD_DIM elements -> out [composite heads, composites, d].
// A composite token is the mean of `width` tokens (the last of those that exist) of `members` neighbouring heads.
extern "C" __global__ void pool_plain(const Element* __restrict__ x, int64_t head_stride, int64_t row_stride, int length, int width, int members,
                                      int composites, float* __restrict__ out)
{
  const int lane = threadIdx.x & 31, t = blockIdx.x * POOL_WARPS + (threadIdx.x >> 5), head = blockIdx.y;
  if (t >= composites) return;
  const int start = t * width, tokens = min(length, start + width) - start;
  for (int dim = lane; dim < HEAD_DIM; dim += 32) {
    float sum = 0.f;
    for (int member = 0; member < members; ++member) {
      const Element* from = x + (head * members + member) * head_stride + start * row_stride + dim;
#pragma unroll 8
      for (int r = 0; r < tokens; ++r) sum += widen(from[r * row_stride]);
    }
    out[((int64_t)head * composites + t) * HEAD_DIM + dim] = sum / (members * tokens);
  }
}

// Grid: (ceil(coarse / POOL_WARPS), heads). x [heads, composites, d]: means of `held` of the `length` tokens -> means of `width` tokens
// out [heads, coarse, d], in which each weighs as many tokens as it holds.
extern "C" __global__ void coarsen_plain(const float* __restrict__ x, int length, int held, int width, int composites, int coarse,
                                         float* __restrict__ out)
{
  const int lane = threadIdx.x & 31, t = blockIdx.x * POOL_WARPS + (threadIdx.x >> 5), head = blockIdx.y;
  if (t >= coarse) return;
  const int first = t * width, stop = min(length, first + width);
  for (int dim = lane; dim < HEAD_DIM; dim += 32) {
    const float* from = x + (int64_t)head * composites * HEAD_DIM + dim;
    float sum = 0.f;
    for (int start = first; start < stop; start += held) sum += min(held, stop - start) * from[(int64_t)(start / held) * HEAD_DIM];
    out[((int64_t)head * coarse + t) * HEAD_DIM + dim] = sum / (stop - first);
  }
}

// Grid: (Nk, Hkv). k: heads of rows of HEAD_DIM elements -> anchors [Hkv, Nk, r], positions in ascending norm, -1 where there are none left.
extern "C" __global__ void find_anchors_plain(const Element* __restrict__ k, int64_t head_stride, int64_t row_stride, int length, int block_size,
                                              int key_anchors, int* __restrict__ anchors)
{
  DYNAMIC_SHARED(shared);
  float* norms = (float*)shared;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first = blockIdx.x * block_size, count = min(block_size, length - first);
  for (int r = warp; r < count; r += POOL_WARPS) {
    const Element* row = k + blockIdx.y * head_stride + (first + r) * row_stride;
    float norm = 0.f;
    for (int dim = lane; dim < HEAD_DIM; dim += 32) norm += widen(row[dim]) * widen(row[dim]);
    for (int step = 16; step; step >>= 1) norm += __shfl_xor_sync(0xffffffffu, norm, step);
    if (lane == 0) norms[r] = norm == norm ? norm : INFINITY_F;
  }
  __syncthreads();
  if (warp == 0) pick_anchors(norms, first, count, key_anchors, anchors + ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * key_anchors);
}
