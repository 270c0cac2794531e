// From one product to attention's inputs, and step 1 of ALGORITHM.md on the way: split q, k and v, normalise heads where the model
// does, rotate, write k and v into the cache, average composite tokens and find each block's anchors in the same registers.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  a warp a slab of tokens, head after head, so that cos and sin come from the first-level cache; each number is read once
//      (and once more as its partner's partner, from that cache) and written once
//   2  a warp a composite token of four heads side by side: four times the loads under way, cos and sin read once for the four
//
// Composites and anchors are those of compress.cu to the bit: it pools what this kernel writes, by the same functions in the
// same order. Without pooling (dense attention, or a start inside a block) the pointers of composites are null.
//
// Shared memory: squared norms [composite heads of the thread block][KV heads of each][BLOCK_SIZE].
#include "pool.cuh"

#define HALF (HEAD_DIM / 2)
// Heads that a warp works on side by side. WARPS is 1 for a single token; several heads of one composite are summed in their order.
#define AT_ONCE (WARPS > 1 && !SEVERAL_MEMBERS && HEAD_DIM % 16 == 0 && !IS_FLOAT32 ? 4 : 1)

// factor * (cos, sin) of position * inv_freq: table [T, HALF]. The angle is rounded to float32: models were trained with that.
// The first position is `start`, plus *position where there is one. Grid: enough threads.
extern "C" __global__ void rotary_table(
    const float* __restrict__ inv_freq, int start, const int* __restrict__ position, int tokens, float factor, float2* __restrict__ table)
{
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens * HALF) return;
  const float angle = (float)(start + (position ? *position : 0) + i / HALF) * inv_freq[i % HALF];
  table[i] = make_float2(factor * cosf(angle), factor * sinf(angle));
}

struct Heads {  // one of q, k, v
  const Element* from;       // [T, all heads, HEAD_DIM]
  Element* to;               // [heads, T, HEAD_DIM], strided
  const float* norm;         // [HEAD_DIM] or null
  int64_t head_stride, row_stride;
};

struct Angles { float cos[8], sin[8]; };  // of elements column .. column + 7 of a row; sin with the sign of what it is added to

DEVICE void read_angles(Angles& angles, const float2* table_row, int column) {
  if (HEAD_DIM % 16 == 0) {
    float pairs[2][8];
    const float* from = (const float*)(table_row + (column < HALF ? column : column - HALF));
    read8(pairs[0], from);
    read8(pairs[1], from + 8);
    const float sign = column < HALF ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      angles.cos[i] = pairs[i / 4][2 * (i % 4)];
      angles.sin[i] = sign * pairs[i / 4][2 * (i % 4) + 1];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float2 angle = table_row[(column + i) % HALF];
      angles.cos[i] = angle.x;
      angles.sin[i] = column + i < HALF ? -angle.y : angle.y;
    }
  }
}

DEVICE void read_partner(Piece& x, const Element* row, int column) {
  if (HEAD_DIM % 16 == 0) {
    read_row<HEAD_DIM>(x, row, column < HALF ? column + HALF : column < HEAD_DIM ? column - HALF : HEAD_DIM);
  } else {
    float partner[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) partner[i] = column + i < HEAD_DIM ? read(row + (column + i + HALF) % HEAD_DIM) : 0.f;
    write8((Element*)x.raw, partner);
  }
}

// x / sqrt(mean(x^2) + eps) * weight over a row, for both halves of a lane. All lanes of the warp take part.
DEVICE void normalise(float (&own)[8], float (&other)[8], const float* weight, float eps, int column) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = fmaf(own[i], own[i], sum);
#pragma unroll
  for (int step = LANES_PER_ROW / 2; step; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  const float share = rsqrtf(sum * (1.f / HEAD_DIM) + eps);
  float own_weight[8], other_weight[8];
  read_row<HEAD_DIM>(own_weight, weight, column);
#if HEAD_DIM % 16 == 0
  read_row<HEAD_DIM>(other_weight, weight, column < HALF ? column + HALF : column < HEAD_DIM ? column - HALF : HEAD_DIM);
#else
  for (int i = 0; i < 8; ++i) other_weight[i] = column + i < HEAD_DIM ? weight[(column + i + HALF) % HEAD_DIM] : 0.f;
#endif
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    own[i] *= share * own_weight[i];
    other[i] *= share * other_weight[i];
  }
}

// Tokens [start, stop) of heads first_head .. first_head + count - 1, count <= N, by one warp: rotated, written, and added to each
// head's sum. norms, if given, receives the squared norm of every row: norms[head * BLOCK_SIZE + token % BLOCK_SIZE].
template <bool ROTATED, int N>
DEVICE void write_heads(float (&sums)[N][8], const Heads& heads, const float2* table, float eps, int64_t token_stride, int first_head,
                        int count, int start, int stop, float* norms) {
  const int lane = threadIdx.x & 31, part = lane / LANES_PER_ROW, column = (lane % LANES_PER_ROW) * 8;
#pragma unroll 1
  for (int r0 = start; r0 < stop; r0 += ROWS_AT_ONCE) {
    const int token = r0 + part;
    const bool exists = token < stop && column < HEAD_DIM;
    Piece own_pieces[N], other_pieces[N];
#pragma unroll
    for (int h = 0; h < N; ++h) {
      const Element* from = heads.from + token * token_stride + (first_head + h) * HEAD_DIM;
      const int at = exists && h < count ? column : HEAD_DIM;
      read_row<HEAD_DIM>(own_pieces[h], from, at);
      if (ROTATED) read_partner(other_pieces[h], from, at);
    }
    Angles angles;
    if (ROTATED && exists) read_angles(angles, table + (int64_t)token * HALF, column);
#pragma unroll
    for (int h = 0; h < N; ++h) {
      float own[8], other[8];
      widen(own, own_pieces[h]);
      if (ROTATED) {
        widen(other, other_pieces[h]);
        if (heads.norm) normalise(own, other, heads.norm, eps, column);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (exists) own[i] = fmaf(other[i], angles.sin[i], own[i] * angles.cos[i]);
      }
      Piece rotated;
      write8((Element*)rotated.raw, own);
      if (exists && h < count)
        write_row<HEAD_DIM>(heads.to + (first_head + h) * heads.head_stride + token * heads.row_stride, column, rotated);
      widen(own, rotated);  // what was written is what is pooled
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] += own[i];
      if (norms) {
        const float n = squared_norm(own);
        if (token < stop && column == 0) norms[h * BLOCK_SIZE + token % BLOCK_SIZE] = n;
      }
    }
  }
}

struct Pooling {  // of one thread block's composite heads; composites and norms may be null
  int width, members;  // tokens and heads of a composite
  uint32_t* composites;
  int64_t stride;  // of composite heads, in elements
  float* norms;
};

// The composite heads first_unit .. first_unit + units - 1 of one block of tokens, by the thread block.
template <bool ROTATED>
DEVICE void write_block(const Heads& heads, const Pooling& pooling, const float2* table, float eps, int64_t token_stride, int first_unit,
                        int units, int first_token, int last_token) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, width = pooling.width, members = SEVERAL_MEMBERS ? pooling.members : 1;
  for (int start = first_token + warp * width; start < last_token; start += WARPS * width) {
    const int stop = min(last_token, start + width);
    float sums[AT_ONCE][8];
#pragma unroll
    for (int h = 0; h < AT_ONCE; ++h)
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[h][i] = 0.f;
    for (int member = 0; member < members; ++member)
      write_heads<ROTATED>(sums, heads, table, eps, token_stride, first_unit * members + member, units, start, stop,
                           pooling.norms ? pooling.norms + member * BLOCK_SIZE : nullptr);
    if (pooling.composites == nullptr) continue;
#pragma unroll
    for (int h = 0; h < AT_ONCE; ++h) {
      finish_mean(sums[h], members * (stop - start));
      if (h < units && lane < LANES_PER_ROW)
        write_composite(sums[h], start / width, lane, pooling.composites + (((first_unit + h) * pooling.stride) >> 1), nullptr);
    }
  }
}

// qkv [T, Hq + 2 Hkv, d] -> q [Hq, T, d]; k, v [Hkv, T, d] by their strides, from row *position on where there is one.
// qc [Hc, Tq, d], kc [Hkc, Tk, d] by its head stride, anchors [Hkv, Nk, r] by its head stride: of these tokens, or null. Tokens count
// from the chunk's first, which is key first_key of the sequence. Grid: (AT_ONCE composite heads of q, of k, of v; blocks of tokens).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) rotate_heads(
    const Element* qkv, const float2* table, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
    float eps, int tokens, int num_q_heads, int num_kv_heads, int q_members, int k_members, const int* position,
    Element* __restrict__ q, Element* __restrict__ k, Element* __restrict__ v, int64_t k_head_stride, int64_t k_row_stride,
    int64_t v_head_stride, int64_t v_row_stride, uint32_t* __restrict__ qc, uint32_t* __restrict__ kc, int64_t kc_head_stride,
    int* __restrict__ anchors, int64_t anchor_head_stride, int key_anchors, int first_key)
{
  DYNAMIC_SHARED(shared);
  float* norms = (float*)shared;
  const int warp = threadIdx.x >> 5, block = blockIdx.y;
  const int64_t token_stride = (int64_t)(num_q_heads + 2 * num_kv_heads) * HEAD_DIM;
  const int q_units = num_q_heads / q_members, k_units = num_kv_heads / k_members;
  const int q_groups = (q_units + AT_ONCE - 1) / AT_ONCE, k_groups = (k_units + AT_ONCE - 1) / AT_ONCE;
  const int first_token = block * BLOCK_SIZE, last_token = min(tokens, first_token + BLOCK_SIZE);
  const int q_composites = (tokens + Q_COMPRESS - 1) / Q_COMPRESS;
  wait_for_launch_before();  // qkv, table and position are not __restrict__: their reads must not be moved up
  const int row = position ? *position : 0;
  const Element* k_from = qkv + num_q_heads * HEAD_DIM;

  int group = blockIdx.x;
  if (group < q_groups) {
    const Heads heads = {qkv, q, q_norm, (int64_t)tokens * HEAD_DIM, HEAD_DIM};
    const Pooling pooling = {Q_COMPRESS, q_members, qc, (int64_t)q_composites * HEAD_DIM, nullptr};
    write_block<true>(heads, pooling, table, eps, token_stride, group * AT_ONCE, min(AT_ONCE, q_units - group * AT_ONCE), first_token, last_token);
    return;
  }
  group -= q_groups;
  if (group >= k_groups) {
    group -= k_groups;
    const Heads heads = {k_from + num_kv_heads * HEAD_DIM, v + row * v_row_stride, nullptr, v_head_stride, v_row_stride};
    const Pooling pooling = {K_COMPRESS, k_members, nullptr, 0, nullptr};
    write_block<false>(heads, pooling, table, eps, token_stride, group * AT_ONCE, min(AT_ONCE, k_units - group * AT_ONCE), first_token, last_token);
    return;
  }
  const int first_unit = group * AT_ONCE, units = min(AT_ONCE, k_units - first_unit);
  const Heads heads = {k_from, k + row * k_row_stride, k_norm, k_head_stride, k_row_stride};
  const Pooling pooling = {K_COMPRESS, k_members, kc, kc_head_stride, anchors ? norms : nullptr};
  write_block<true>(heads, pooling, table, eps, token_stride, first_unit, units, first_token, last_token);
  if (anchors == nullptr) return;
  __syncthreads();
  for (int m = warp; m < units * k_members; m += WARPS)
    pick_anchors(norms + m * BLOCK_SIZE, first_key + first_token, last_token - first_token, key_anchors,
                 anchors + (first_unit * k_members + m) * anchor_head_stride + block * key_anchors);
}
