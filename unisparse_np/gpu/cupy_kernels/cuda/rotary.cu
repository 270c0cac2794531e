// From one product to attention's inputs, and step 1 of ALGORITHM.md on the way: split q, k and v, normalise heads where the model
// does, rotate, write k and v into the cache, average composite tokens and find each block's anchors in the same registers.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  a warp a slab of tokens, heads inside, so that cos and sin come from the first-level cache; each number is read once
//      (and once more as its partner's partner, from that cache) and written once
//
// Composites and anchors are those of compress.cu to the bit: it pools what this kernel writes, by the same functions in the
// same order. Without pooling (dense attention, or a start inside a block) the pointers of composites are null.
//
// Shared memory: squared norms [heads at once][KV heads of the composite][BLOCK_SIZE].
#include "pool.cuh"

#define HALF (HEAD_DIM / 2)
#define UNITS_AT_ONCE (WARPS == 1 ? 1 : 4)  // composite heads of one thread block; WARPS is 1 for a single token
#define SLAB (Q_COMPRESS > K_COMPRESS ? (Q_COMPRESS > 8 ? Q_COMPRESS : 8) : (K_COMPRESS > 8 ? K_COMPRESS : 8))

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

// Elements column .. column + 7 of one row, rotated. `other` are those that share their angles, HALF away.
DEVICE void rotate8(float (&own)[8], const float (&other)[8], const float2* table_row, int column) {
  if (HEAD_DIM % 16 == 0) {
    float angles[2][8];
    const float* from = (const float*)(table_row + (column < HALF ? column : column - HALF));
    read8(angles[0], from);
    read8(angles[1], from + 8);
    const float sign = column < HALF ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < 8; ++i) own[i] = fmaf(sign * other[i], angles[i / 4][2 * (i % 4) + 1], own[i] * angles[i / 4][2 * (i % 4)]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (column + i >= HEAD_DIM) break;
      const float2 angle = table_row[(column + i) % HALF];
      own[i] = fmaf(column + i < HALF ? -other[i] : other[i], angle.y, own[i] * angle.x);
    }
  }
}

DEVICE void read_partner(float (&x)[8], const Element* row, int column) {
  if (HEAD_DIM % 16 == 0) {
    read_row<HEAD_DIM>(x, row, column < HALF ? column + HALF : column < HEAD_DIM ? column - HALF : HEAD_DIM);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = column + i < HEAD_DIM ? read(row + (column + i + HALF) % HEAD_DIM) : 0.f;
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

// Tokens [start, stop) of `members` heads from first_head on, by one warp: rotated, written, and averaged into `mean`.
// norms, if given, receives the squared norm of every row: norms[member * BLOCK_SIZE + token % BLOCK_SIZE].
template <bool ROTATED>
DEVICE void write_heads(float (&mean)[8], const Heads& heads, const float2* table, float eps, int64_t token_stride, int first_head,
                        int members, int start, int stop, float* norms) {
  const int lane = threadIdx.x & 31, part = lane / LANES_PER_ROW, column = (lane % LANES_PER_ROW) * 8;
  const int tokens = stop - start;
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] = 0.f;
  for (int member = 0; member < members; ++member) {
    const int head = first_head + member;
#pragma unroll 4
    for (int r0 = 0; r0 < tokens; r0 += ROWS_AT_ONCE) {
      const int token = start + r0 + part;
      const bool exists = r0 + part < tokens && column < HEAD_DIM;
      const Element* from = heads.from + token * token_stride + head * HEAD_DIM;
      float own[8], other[8];
      read_row<HEAD_DIM>(own, from, exists ? column : HEAD_DIM);
      if (ROTATED) {
        read_partner(other, from, exists ? column : HEAD_DIM);
        if (heads.norm) normalise(own, other, heads.norm, eps, column);
        if (exists) rotate8(own, other, table + (int64_t)token * HALF, column);
      }
      Element* to = heads.to + head * heads.head_stride + token * heads.row_stride;
      if (exists) write_row<HEAD_DIM>(to, column, own);
#if !IS_FLOAT32
      unpack8(own, make_int4(pack(own[0], own[1]), pack(own[2], own[3]), pack(own[4], own[5]), pack(own[6], own[7])));  // as written
#endif
#pragma unroll
      for (int i = 0; i < 8; ++i) mean[i] += own[i];
      if (norms) {
        const float n = squared_norm(own);
        if (r0 + part < tokens && column == 0) norms[member * BLOCK_SIZE + token % BLOCK_SIZE] = n;
      }
    }
  }
}

// qkv [T, Hq + 2 Hkv, d] -> q [Hq, T, d]; k, v [Hkv, T, d] by their strides, from row *position on where there is one.
// qc [Hc, Tq, d], kc [Hkc, Tk, d] by its head stride, anchors [Hkv, Nk, r] by its head stride: of these tokens, or null. Tokens count
// from the chunk's first, which is key first_key of the sequence. Grid: (composite heads of q, k and v / UNITS_AT_ONCE, blocks).
extern "C" __global__ void __launch_bounds__(32 * WARPS, 5) rotate_heads(
    const Element* qkv, const float2* table, const float* __restrict__ q_norm, const float* __restrict__ k_norm,
    float eps, int tokens, int num_q_heads, int num_kv_heads, int q_members, int k_members, const int* position,
    Element* __restrict__ q, Element* __restrict__ k, Element* __restrict__ v, int64_t k_head_stride, int64_t k_row_stride,
    int64_t v_head_stride, int64_t v_row_stride, uint32_t* __restrict__ qc, uint32_t* __restrict__ kc, int64_t kc_head_stride,
    int* __restrict__ anchors, int64_t anchor_head_stride, int key_anchors, int first_key)
{
  DYNAMIC_SHARED(shared);
  float* norms = (float*)shared;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, block = blockIdx.y;
  const int64_t token_stride = (int64_t)(num_q_heads + 2 * num_kv_heads) * HEAD_DIM;
  wait_for_launch_before();  // qkv, table and position are not __restrict__: their reads must not be moved up
  const int row = position ? *position : 0;
  const Heads queries = {qkv, q, q_norm, (int64_t)tokens * HEAD_DIM, HEAD_DIM};
  const Heads keys = {qkv + num_q_heads * HEAD_DIM, k + row * k_row_stride, k_norm, k_head_stride, k_row_stride};
  const Heads values = {keys.from + num_kv_heads * HEAD_DIM, v + row * v_row_stride, nullptr, v_head_stride, v_row_stride};
  const int q_units = num_q_heads / q_members, k_units = num_kv_heads / k_members;
  const int first_unit = blockIdx.x * UNITS_AT_ONCE, last_unit = min(first_unit + UNITS_AT_ONCE, q_units + 2 * k_units);
  const int first_token = block * BLOCK_SIZE, last_token = min(tokens, first_token + BLOCK_SIZE);
  const int q_composites = (tokens + Q_COMPRESS - 1) / Q_COMPRESS;

  float mean[8];
  for (int slab = first_token + warp * SLAB; slab < last_token; slab += WARPS * SLAB) {
    const int end = min(last_token, slab + SLAB);
    for (int unit = first_unit; unit < last_unit; ++unit) {
      if (unit < q_units) {
        for (int t = slab; t < end; t += Q_COMPRESS) {
          const int stop = min(end, t + Q_COMPRESS);
          write_heads<true>(mean, queries, table, eps, token_stride, unit * q_members, q_members, t, stop, nullptr);
          if (qc == nullptr) continue;
          finish_mean(mean, q_members * (stop - t));
          if (lane < LANES_PER_ROW) write_composite(mean, (int64_t)unit * q_composites + t / Q_COMPRESS, lane, qc, nullptr);
        }
      } else if (unit < q_units + k_units) {
        const int of_keys = unit - q_units;
        float* of_unit = anchors ? norms + (unit - first_unit) * k_members * BLOCK_SIZE : nullptr;
        for (int t = slab; t < end; t += K_COMPRESS) {
          const int stop = min(end, t + K_COMPRESS);
          write_heads<true>(mean, keys, table, eps, token_stride, of_keys * k_members, k_members, t, stop, of_unit);
          if (kc == nullptr) continue;
          finish_mean(mean, k_members * (stop - t));
          if (lane < LANES_PER_ROW) write_composite(mean, t / K_COMPRESS, lane, kc + ((of_keys * kc_head_stride) >> 1), nullptr);
        }
      } else {
        write_heads<false>(mean, values, table, eps, token_stride, (unit - q_units - k_units) * k_members, k_members, slab, end, nullptr);
      }
    }
  }
  if (anchors == nullptr) return;
  __syncthreads();
  for (int unit = first_unit; unit < last_unit; ++unit) {
    if (unit < q_units || unit >= q_units + k_units) continue;
    for (int m = warp; m < k_members; m += WARPS)
      pick_anchors(norms + ((unit - first_unit) * k_members + m) * BLOCK_SIZE, first_key + first_token, last_token - first_token,
                   key_anchors, anchors + ((unit - q_units) * k_members + m) * anchor_head_stride + block * key_anchors);
  }
}
