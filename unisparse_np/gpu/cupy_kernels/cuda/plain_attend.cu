// Step 6 for what the tensor-core kernels do not take: float32, other head dims and block sizes, any scale.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  256 threads own a square of scores each and a strip of the output; keys and values take turns in one tile; the keys of a
//      tile are gathered from wherever selected blocks and anchors lie, so that blocks of any size fill it
//
// Shared memory: queries [TILE_ROWS][STRIDE] float4, keys or values [KEYS][STRIDE] float4, weights [TILE_ROWS][WEIGHT_STRIDE],
// positions [KEYS].
#include "plain.cuh"

#define KEYS (HEAD_DIM > 128 ? 32 : 64)
#define WEIGHT_STRIDE (KEYS + 16)  // the two rows that a warp writes at a time fall on different banks
#define SHARED_BYTES (16 * STRIDE * (TILE_ROWS + KEYS) + 4 * TILE_ROWS * WEIGHT_STRIDE + 4 * KEYS)
#define OWN_ROWS (TILE_ROWS / SIDE)
#define OWN_KEYS (KEYS / SIDE)
#define OWN_CHUNKS ((CHUNKS + SIDE - 1) / SIDE)  // of the output: chunks tx, tx + SIDE, ...
#define LN_2 0.6931471805599453f

// The keys that a query block attends to, in ascending order: the tokens of its selected blocks, the anchors of the others.
// All threads of a block walk alike.
struct Walk {
  const Shape& shape;
  const uint32_t* words;
  const int* anchors;  // [Nk, r] of this KV head
  int head, q_block, stop, seen_by_all;  // keys before `stop` exist for some row of the tile, those before `seen_by_all` for every row
  int block = 0, offset = 0;

  // positions[0 .. KEYS) = the next keys, -1 where there are none left; `hidden`: some row may not see some of them. Returns their number.
  DEVICE int next(int* positions, bool& hidden) {
    const int visible = ceil_div(stop, shape.block_size), thread = threadIdx.x;
    int filled = 0;
    hidden = false;
    while (filled < KEYS && block < visible) {
      const bool selected = selected_word(words, shape, head, q_block, block >> 5, visible) >> (block & 31) & 1;
      const int first = block * shape.block_size;
      const int length = selected ? min(shape.block_size, stop - first) : min(shape.key_anchors, shape.block_size);
      const int n = min(length - offset, KEYS - filled), mine = thread - filled + offset;
      if (thread >= filled && thread < filled + n) positions[thread] = selected ? first + mine : anchors[block * shape.key_anchors + mine];
      hidden = hidden || (n > 0 && first + shape.block_size > seen_by_all);
      filled += n;
      offset += n;
      if (offset == length) { ++block; offset = 0; }
    }
    if (thread >= filled && thread < KEYS) positions[thread] = -1;
    hidden = hidden || filled < KEYS;
    return filled;
  }
};

// out += weights * values. GUARDED: 0 * NaN is NaN, so what a row may not see is not multiplied.
template <bool GUARDED> DEVICE void add_values(float4 (&out)[OWN_ROWS][OWN_CHUNKS], const float* weights, const float4* values, int ty, int tx) {
#pragma unroll 1
  for (int key = 0; key < KEYS; key += 4) {
    float w[OWN_ROWS][4];
#pragma unroll
    for (int m = 0; m < OWN_ROWS; ++m) {
      const float4 four = *(const float4*)(weights + (ty + SIDE * m) * WEIGHT_STRIDE + key);
      w[m][0] = four.x, w[m][1] = four.y, w[m][2] = four.z, w[m][3] = four.w;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int c = 0; c < OWN_CHUNKS; ++c) {
        const float4 v = values[(key + i) * STRIDE + min(tx + SIDE * c, CHUNKS - 1)];
#pragma unroll
        for (int m = 0; m < OWN_ROWS; ++m) {
          if (GUARDED && w[m][i] == 0.f) continue;
          out[m][c].x += w[m][i] * v.x;
          out[m][c].y += w[m][i] * v.y;
          out[m][c].z += w[m][i] * v.z;
          out[m][c].w += w[m][i] * v.w;
        }
      }
  }
}

// Grid: (tiles of TILE_ROWS rows, each within one query block, the last first; Hq). words: the block mask, null for dense attention.
// anchors [Hkv, Nk, r] or null where r is 0. output [Hq, Lq, d], lse [Hq, Lq]; a row with nothing to attend has 0 and -inf.
extern "C" __global__ void __launch_bounds__(THREADS, 2) attend_plain(
    const Element* __restrict__ queries, const Element* __restrict__ keys, const Element* __restrict__ values, Element* __restrict__ output,
    int64_t q_head_stride, int64_t q_row_stride, int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride, int64_t v_row_stride,
    int64_t out_head_stride, int64_t out_row_stride, const Shape shape, const uint32_t* __restrict__ words, const int* __restrict__ anchors, float* __restrict__ lse)
{
  DYNAMIC_SHARED(shared);
  float4* q_tile = (float4*)shared;
  float4* tile = q_tile + TILE_ROWS * STRIDE;
  float* weights = (float*)(tile + KEYS * STRIDE);
  int* positions = (int*)(weights + TILE_ROWS * WEIGHT_STRIDE);
  const int ty = threadIdx.x / SIDE, tx = threadIdx.x % SIDE;
  const int tiles_per_block = ceil_div(shape.block_size, TILE_ROWS), head = blockIdx.y, kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  const int t = gridDim.x - 1 - blockIdx.x, q_block = t / tiles_per_block;
  const int first_row = q_block * shape.block_size + t % tiles_per_block * TILE_ROWS;
  const int last_row = min(min(shape.q_len, (q_block + 1) * shape.block_size), first_row + TILE_ROWS);
  if (first_row >= last_row) return;  // the last query block may be short of tiles

  load_tile<TILE_ROWS>(q_tile, queries + head * q_head_stride, q_row_stride, shape.scale_log2, [&](int n) { return first_row + n < last_row ? first_row + n : -1; });
  const Element* k = keys + kv_head * k_head_stride;
  const Element* v = values + kv_head * v_head_stride;
  Walk walk{shape, words, anchors + (int64_t)kv_head * shape.num_k_blocks * shape.key_anchors, head, q_block,
            last_visible_key(shape, last_row - 1) + 1, last_visible_key(shape, first_row) + 1};

  float4 out[OWN_ROWS][OWN_CHUNKS];
  float highest[OWN_ROWS], total[OWN_ROWS];  // in powers of two; total over this thread's own keys
#pragma unroll
  for (int m = 0; m < OWN_ROWS; ++m) {
    highest[m] = -INFINITY_F;
    total[m] = 0.f;
#pragma unroll
    for (int c = 0; c < OWN_CHUNKS; ++c) out[m][c] = make_float4(0.f, 0.f, 0.f, 0.f);
  }

  while (true) {
    __syncthreads();  // the tile before is used up
    bool hidden;
    if (walk.next(positions, hidden) == 0) break;
    __syncthreads();
    load_tile<KEYS>(tile, k, k_row_stride, 1.f, [&](int n) { return positions[n]; });
    __syncthreads();
    float s[OWN_ROWS][OWN_KEYS];
    multiply(s, q_tile, tile, ty, tx);
#pragma unroll
    for (int m = 0; m < OWN_ROWS; ++m) {
      float best = highest[m];
#pragma unroll
      for (int n = 0; n < OWN_KEYS; ++n) {
        if (hidden) {
          const int position = positions[tx + SIDE * n];
          if (position < 0 || position > last_visible_key(shape, first_row + ty + SIDE * m)) s[m][n] = -INFINITY_F;
        }
        best = fmaxf(best, s[m][n]);
      }
      best = side_max(best);
      const float base = best == -INFINITY_F ? 0.f : best;  // a row that has seen nothing yet: 2^-inf = 0
      const float shrink = exp2_fast(highest[m] - base);
      highest[m] = best;
      total[m] *= shrink;
#pragma unroll
      for (int n = 0; n < OWN_KEYS; ++n) {
        const float w = exp2_fast(s[m][n] - base);
        total[m] += w;
        weights[(ty + SIDE * m) * WEIGHT_STRIDE + tx + SIDE * n] = w;
      }
#pragma unroll
      for (int c = 0; c < OWN_CHUNKS; ++c) {
        out[m][c].x *= shrink;
        out[m][c].y *= shrink;
        out[m][c].z *= shrink;
        out[m][c].w *= shrink;
      }
    }
    __syncthreads();  // the keys are used up
    load_tile<KEYS>(tile, v, v_row_stride, 1.f, [&](int n) { return positions[n]; });
    __syncthreads();
    if (hidden) add_values<true>(out, weights, tile, ty, tx);
    else add_values<false>(out, weights, tile, ty, tx);
  }

#pragma unroll
  for (int m = 0; m < OWN_ROWS; ++m) {
    const int row = first_row + ty + SIDE * m;
    const float whole = side_sum(total[m]), share = whole == 0.f ? 0.f : 1.f / whole;
    if (row >= last_row) continue;
    Element* to = output + head * out_head_stride + row * out_row_stride;
#pragma unroll
    for (int c = 0; c < OWN_CHUNKS; ++c) {
      const float result[4] = {out[m][c].x * share, out[m][c].y * share, out[m][c].z * share, out[m][c].w * share};
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (4 * (tx + SIDE * c) + i < HEAD_DIM) to[4 * (tx + SIDE * c) + i] = narrow(result[i]);
    }
    if (tx == 0) lse[(int64_t)head * shape.q_len + row] = whole == 0.f ? -INFINITY_F : (highest[m] + log2_fast(whole)) * LN_2;
  }
}
