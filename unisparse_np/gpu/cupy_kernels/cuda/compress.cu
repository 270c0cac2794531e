// Step 1, and the anchors of step 6: average neighbouring tokens and heads, in one launch over q and k.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  one thread block a block of tokens, a warp a composite token, 16 bytes a lane a load: each row is read once, whole
//   2  the squared norms of the keys come from the same registers; the thread block then picks its anchors from shared memory
//   3  composites leave as float16 for the tensor cores of scores.cu (float32 too where the caller asks)
//
// Memory bound: q and k are read once. Sums are float32, in an order that depends on the composite alone, so that a composite
// is the same to the bit whatever it was cut with.
//
// Shared memory: squared norms [KV heads of the composite][BLOCK_SIZE].
#include "shape.cuh"

#define WARPS 4
#define LANES_PER_ROW (HEAD_DIM <= 64 ? 8 : HEAD_DIM <= 128 ? 16 : 32)  // 8 elements a lane; those past HEAD_DIM idle
#define ROWS_AT_ONCE (32 / LANES_PER_ROW)
#define LARGEST_HALF 65504.f

struct Input {  // one head after the other, each with rows of HEAD_DIM contiguous elements
  const uint16_t* data;
  int64_t head_stride, row_stride;
};

DEVICE float saturate(float x) { return x > LARGEST_HALF ? LARGEST_HALF : x < -LARGEST_HALF ? -LARGEST_HALF : x; }

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
      const float2 a = unpack(raw.x), b = unpack(raw.y), c = unpack(raw.z), d = unpack(raw.w);
      mean[0] += a.x; mean[1] += a.y; mean[2] += b.x; mean[3] += b.y;
      mean[4] += c.x; mean[5] += c.y; mean[6] += d.x; mean[7] += d.y;
      if (norms) {
        float n = a.x * a.x + a.y * a.y + b.x * b.x + b.y * b.y + c.x * c.x + c.y * c.y + d.x * d.x + d.y * d.y;
        for (int step = LANES_PER_ROW / 2; step; step >>= 1) n += __shfl_xor_sync(0xffffffffu, n, step);
        if (r < tokens && column == 0) norms[member * BLOCK_SIZE + (start + r) % BLOCK_SIZE] = n == n ? n : INFINITY_F;
      }
    }
  }
  const float share = 1.f / (members * tokens);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    for (int step = LANES_PER_ROW; step < 32; step *= 2) mean[i] += __shfl_xor_sync(0xffffffffu, mean[i], step);
    mean[i] *= share;
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

// float32 composites (a cache's, or those of the staged calls) as float16: pairs of elements.
extern "C" __global__ void to_half(const float2* __restrict__ from, uint32_t* __restrict__ to, int64_t pairs) {
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < pairs) to[i] = pack_half(saturate(from[i].x), saturate(from[i].y));
}

// Step 6: the anchor keys and values side by side, [Hkv, r, anchor_pitch, d], so that 128 of them make a tile. Places without
// a key are zero. Grid: (anchor_pitch * r rows / rows a thread block, Hkv).
extern "C" __global__ void gather_anchors(
    const uint16_t* __restrict__ k, const uint16_t* __restrict__ v, int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride,
    int64_t v_row_stride, const Shape shape, const int* __restrict__ anchors, int4* __restrict__ anchor_keys, int4* __restrict__ anchor_values)
{
  constexpr int CHUNKS = HEAD_DIM / 8;
  const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  const int row = (int)(i / CHUNKS), chunk = (int)(i % CHUNKS), head = blockIdx.y;
  if (row >= shape.key_anchors * shape.anchor_pitch) return;
  const int rank = row / shape.anchor_pitch, block = row % shape.anchor_pitch;
  int4 key = make_int4(0, 0, 0, 0), value = key;
  const int position = block < shape.num_k_blocks ? anchors[((int64_t)head * shape.num_k_blocks + block) * shape.key_anchors + rank] : -1;
  if (position >= 0) {
    key = *(const int4*)(k + head * k_head_stride + position * k_row_stride + chunk * 8);
    value = *(const int4*)(v + head * v_head_stride + position * v_row_stride + chunk * 8);
  }
  const int64_t at = ((int64_t)head * shape.key_anchors * shape.anchor_pitch + row) * CHUNKS + chunk;
  anchor_keys[at] = key;
  anchor_values[at] = value;
}
