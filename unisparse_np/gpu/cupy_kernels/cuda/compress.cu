// Step 1, and the anchors of step 6: average neighbouring tokens and heads, in one launch over q and k.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  one thread block a block of tokens, a warp a composite token, 16 bytes a lane a load: each row is read once, whole
//   2  the squared norms of the keys come from the same registers; the thread block then picks its anchors from shared memory
//   3  composites leave as float16 for the tensor cores of scores.cu (float32 too where the caller asks)
//   4  coarsen: a Top-P with composites of its own takes them from those of q_compress and k_compress, a fraction of q's and k's bytes
//
// Memory bound: q and k are read once. Sums are float32, in an order that depends on the composite alone, so that a composite
// is the same to the bit whatever it was cut with.
//
// Shared memory: squared norms [KV heads of the composite][BLOCK_SIZE].
#include "pool.cuh"
#include "shape.cuh"

#define WARPS 4

// Grid: Hc * Nq thread blocks for the queries, then Hkc * Nk for the keys; first_part leaves out those before it.
// qc, kc: [heads, tokens, d] as float16 and/or float32, either null; anchors [Hkv, Nk, r] or null.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 8) compress(
    const uint16_t* __restrict__ q, const uint16_t* __restrict__ k, int64_t q_head_stride, int64_t q_row_stride, int64_t k_head_stride,
    int64_t k_row_stride, const Shape shape, uint32_t* __restrict__ qc_half, float* __restrict__ qc_single, uint32_t* __restrict__ kc_half,
    float* __restrict__ kc_single, int* __restrict__ anchors, int first_part)
{
  DYNAMIC_SHARED(shared);
  float* norms = (float*)shared;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int q_parts = shape.num_composite_heads * shape.num_q_blocks;
  const int place = first_part + blockIdx.x;
  const bool of_keys = place >= q_parts;
  const int part = of_keys ? place - q_parts : place;
  const int blocks = of_keys ? shape.num_k_blocks : shape.num_q_blocks;
  const int head = part / blocks, block = part % blocks;
  const int width = of_keys ? shape.k_compress : shape.q_compress, length = of_keys ? shape.k_len : shape.q_len;
  const int members = of_keys ? shape.num_kv_heads / shape.num_composite_kv_heads : shape.head_compress;
  const int composites = of_keys ? shape.num_k_composites : shape.num_q_composites;
  const Input x = of_keys ? Input{k, k_head_stride, k_row_stride} : Input{q, q_head_stride, q_row_stride};
  float* wanted_norms = of_keys && anchors ? norms : nullptr;

  const int first = block * (BLOCK_SIZE / width), last = min(composites, first + BLOCK_SIZE / width);
  for (int t = first + warp; t < last; t += WARPS) {
    float mean[8];
    pool(mean, x, head * members, members, t * width, min(length, (t + 1) * width), wanted_norms);
    if (lane < LANES_PER_ROW)
      write_composite(mean, (int64_t)head * composites + t, lane, of_keys ? kc_half : qc_half, of_keys ? kc_single : qc_single);
  }
  if (wanted_norms == nullptr) return;
  __syncthreads();
  for (int m = warp; m < members; m += WARPS)
    pick_anchors(norms + m * BLOCK_SIZE, block * BLOCK_SIZE, min(BLOCK_SIZE, length - block * BLOCK_SIZE), shape.key_anchors,
                 anchors + ((int64_t)(head * members + m) * shape.num_k_blocks + block) * shape.key_anchors);
}

// Step 1 for a Top-P with composites of its own: means of `width` tokens from the composites of q_compress and k_compress tokens, each
// weighing as many tokens as it holds. qc [Hc, Tq, d], kc [Hkc, Tk, d] (heads kc_head_stride apart) -> coarse_qc [Hc, ceil(Lq / width), d],
// coarse_kc [Hkc, ceil(Lk / width), d], all float16. Grid: (enough threads for the longer, 8 elements each; Hc + Hkc).
extern "C" __global__ void coarsen(
    const uint16_t* __restrict__ qc, const uint16_t* __restrict__ kc, int64_t kc_head_stride, const Shape shape, int width,
    int4* __restrict__ coarse_qc, int4* __restrict__ coarse_kc)
{
  constexpr int CHUNKS = HEAD_DIM / 8;
  const int i = blockIdx.x * blockDim.x + threadIdx.x, t = i / CHUNKS, chunk = i % CHUNKS;
  const bool of_keys = blockIdx.y >= shape.num_composite_heads;
  const int head = of_keys ? blockIdx.y - shape.num_composite_heads : blockIdx.y;
  const int length = of_keys ? shape.k_len : shape.q_len, held = of_keys ? shape.k_compress : shape.q_compress;  // tokens a composite
  const int coarse = ceil_div(length, width), stop = min(length, (t + 1) * width);
  if (t >= coarse) return;
  const uint16_t* from = of_keys ? kc + head * kc_head_stride : qc + (int64_t)head * shape.num_q_composites * HEAD_DIM;
  float mean[8] = {};
#pragma unroll 4
  for (int start = t * width; start < stop; start += held) {
    const int4 raw = *(const int4*)(from + (int64_t)(start / held) * HEAD_DIM + chunk * 8);
    const uint32_t pairs[4] = {(uint32_t)raw.x, (uint32_t)raw.y, (uint32_t)raw.z, (uint32_t)raw.w};
    const float tokens = min(held, stop - start);
#pragma unroll
    for (int e = 0; e < 8; ++e) mean[e] = fmaf(tokens, from_half((uint16_t)(pairs[e / 2] >> 16 * (e & 1))), mean[e]);
  }
  const float share = 1.f / (stop - t * width);
  uint32_t out[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) out[e] = pack_half(mean[2 * e] * share, mean[2 * e + 1] * share);
  (of_keys ? coarse_kc : coarse_qc)[((int64_t)head * coarse + t) * CHUNKS + chunk] = make_int4(out[0], out[1], out[2], out[3]);
}

// float32 composites (a cache's, or those of the staged calls) as float16: pairs of elements.
extern "C" __global__ void to_half(const float2* __restrict__ from, uint32_t* __restrict__ to, int64_t pairs) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < pairs) to[i] = pack_half(saturate(from[i].x), saturate(from[i].y));
}
