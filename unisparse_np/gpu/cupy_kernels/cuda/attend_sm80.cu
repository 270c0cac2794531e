// Step 6 on sm_80 and later: exact attention over selected blocks and anchor keys, by cp.async and mma.sync.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  8 warps of 16 query rows, 64 keys a step, two-stage cp.async ring, Q in registers
//   2  4 warps of 32 query rows where head_dim <= 128: every fragment of K and V is used twice per load from shared memory,
//      which was the limit before; Q is read from shared memory instead, and two thread blocks share a multiprocessor
//   3  padded rows instead of a swizzle, so that any head_dim that is a multiple of 16 works
//   4  the block mask is walked by the kernel, anchors are tiles of the same loop (as in attend_sm90.cu)
//   5  what the item visits is listed once, by one warp, in shared memory; one stage of K and of V: the values come in under QK, the
//      next keys under the softmax and PV, and 70 KB a thread block (head_dim 128) leave room for two on an A100 too
//   6  addresses are worked out anew from the thread's index at each use: registers are for the accumulators
//   7  the rows' maxima are found under the last products of QK, the weights of the next 16 keys under the products with the values of
//      these; sums and output are scaled only where a row of the warp has a new maximum; what an item is about waits in shared memory
//
// Shared memory: Q [BM][PITCH], K [BN][PITCH], V [BN][PITCH], Item, the list (see attend_sm80_visits.cuh); PITCH = HEAD_DIM + 8 elements,
// so that the eight rows of an ldmatrix fall into different banks.
#include "mask.cuh"
#include "attend_sm80_visits.cuh"

#define ROW_TILES (BM / WARPS / 16)  // m16 tiles a warp
#define Q_BYTES (BM * ROW_BYTES)
#define TILE_BYTES (BN * ROW_BYTES)
#define ITEM_AT (Q_BYTES + 2 * TILE_BYTES)
#define EARLY_MAXIMA (HEAD_DIM > 64)  // the rows' maxima are found under the last products of QK, where registers allow
#define LEAST_THREAD_BLOCKS (HEAD_DIM == 64 ? (BM == 64 ? 5 : 3) : HEAD_DIM <= 128 && BM == 64 ? 3 : 1)  // a multiprocessor, by registers

// In tensor-core layout; thread t holds row t % 32 / 4 of each m16 tile of its warp, and the row 8 below it.
typedef float Scores[ROW_TILES][BN / 2];
typedef float Output[ROW_TILES][HEAD_DIM / 8][4];
typedef float PerRow[ROW_TILES][2];

// s [the warp's rows, BN keys] += Q K^T over 16 of the head's dimensions. Addresses of what this lane reads by ldmatrix.
DEVICE void score_step(Scores& s, uint32_t q_at, uint32_t k_at) {
  uint32_t a[ROW_TILES][4];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) load_matrix(a[m], q_at + 16 * m * ROW_BYTES);
#pragma unroll
  for (int n = 0; n < BN / 16; ++n) {
    uint32_t b[4];
    load_matrix(b, k_at + n * 16 * ROW_BYTES);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      mma(s[m] + 8 * n, a[m], b[0], b[1]);
      mma(s[m] + 8 * n + 4, a[m], b[2], b[3]);
    }
  }
}

// o += the weights times the values of 16 keys.
DEVICE void add_values(Output& o, const uint32_t (&p)[ROW_TILES][4], uint32_t v_at) {
#pragma unroll
  for (int n = 0; n < HEAD_DIM / 16; ++n) {
    uint32_t b[4];
    load_matrix_transposed(b, v_at + n * 32);
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      mma(o[m][2 * n], p[m], b[0], b[1]);
      mma(o[m][2 * n + 1], p[m], b[2], b[3]);
    }
  }
}

// The largest score of each row.
DEVICE void find_largest(PerRow& top, const Scores& s) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float x = fmaxf(s[m][2 * r], s[m][2 * r + 1]);
#pragma unroll
      for (int j = 1; j < BN / 8; ++j) x = fmaxf(x, fmaxf(s[m][4 * j + 2 * r], s[m][4 * j + 2 * r + 1]));
      top[m][r] = quad_max(x);
    }
  }
}

// The online softmax of a thread's rows, in powers of two: `largest` is scale_log2 times the largest score so far.
struct Softmax {
  PerRow largest, sum;

  DEVICE void begin() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      largest[m][0] = largest[m][1] = -INFINITY_F;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }
  // Takes the largest scores of a tile into account; from: what its weights are to be taken against.
  DEVICE void raise_maxima(PerRow& from, const PerRow& top, float c, Output& o) {
    PerRow scale;
    bool moved = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float x = top[m][r] * c;
        moved |= x > largest[m][r];
        const float now = fmaxf(x, largest[m][r]);
        from[m][r] = now == -INFINITY_F ? 0.f : now;  // rows that saw nothing yet
        scale[m][r] = exp2_fast(largest[m][r] - from[m][r]);
        largest[m][r] = now;
      }
    }
    if (!__any_sync(0xffffffffu, moved)) return;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sum[m][r] *= scale[m][r];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 8; ++i) {
          o[m][i][2 * r] *= scale[m][r];
          o[m][i][2 * r + 1] *= scale[m][r];
        }
      }
    }
  }
  // Weights of 16 keys from their scores.
  DEVICE void weigh(uint32_t (&p)[ROW_TILES][4], const Scores& s, int step, const PerRow& from, float c) {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = s[m] + 8 * step + 2 * i;
        const float a = exp2_fast(fmaf(pair[0], c, -from[m][i % 2])), b = exp2_fast(fmaf(pair[1], c, -from[m][i % 2]));
        sum[m][i % 2] += a + b;
        p[m][i] = pack(a, b);
      }
    }
  }
};

// Hides what a row may not see of a tile.
DEVICE void hide(Scores& s, int tile, const volatile Item& item, const uint32_t* words, const int* anchors, const Shape& shape) {
  const int t = thread_again(), first_row = item.first_row, visible = item.visible, tile_last = last_visible_key(shape, first_row);
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    const int row = first_row + (t >> 5) * (16 * ROW_TILES) + 16 * m + ((t & 31) >> 2);
    const Mask<BN> mask = {anchors, item.kv_head, visible, last_visible_key(shape, row), last_visible_key(shape, row + 8), tile_last, (t & 3) * 2};
    if (tile >= 0) {
      mask.hide_keys(s[m], tile);
    } else {
      uint32_t unselected[BN / 32];
      const int word = ~tile % shape.anchor_pitch / 32;
#pragma unroll
      for (int w = 0; w < BN / 32; ++w) unselected[w] = unselected_word(words, shape, item.head, item.q_block, word + w, visible);
      mask.hide_anchors(s[m], ~tile, unselected, shape);
    }
  }
}

// One thread block an item. Strides in elements, last axis contiguous; compact anchors [Hkv, r * anchor_pitch, d].
// The other arguments are those of attend_sm90.
extern "C" __global__ void __launch_bounds__(THREADS, LEAST_THREAD_BLOCKS) attend_sm80(
    const uint16_t* __restrict__ queries, const uint16_t* __restrict__ keys, const uint16_t* __restrict__ values, uint32_t* __restrict__ output,
    const uint16_t* __restrict__ anchor_keys, const uint16_t* __restrict__ anchor_values, int64_t q_head_stride, int64_t q_row_stride,
    int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride, int64_t v_row_stride, const Shape shape,
    const int2* __restrict__ work, const uint32_t* __restrict__ words, const int* __restrict__ anchors, float* __restrict__ lse,
    int* __restrict__ broken)
{
  DYNAMIC_SHARED(shared);
  const uint32_t q_tile = shared_address(shared), k_tile = q_tile + Q_BYTES, v_tile = k_tile + TILE_BYTES;
  volatile Item& item = *(volatile Item*)(shared + ITEM_AT);
  uint16_t* const list = (uint16_t*)(shared + ITEM_AT + sizeof(Item));
  {
    const int2 place = work[blockIdx.x];
    const int head = place.x, first_row = place.y * BM;
    load_rows<BM>(q_tile, queries + head * q_head_stride, q_row_stride, first_row, shape.q_len);
    if (threadIdx.x == 0) {
      const int kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
      const int64_t anchor_at = (int64_t)kv_head * shape.key_anchors * shape.anchor_pitch * HEAD_DIM;
      item.keys = keys + kv_head * k_head_stride;
      item.values = values + kv_head * v_head_stride;
      item.anchor_keys = anchor_keys + anchor_at;
      item.anchor_values = anchor_values + anchor_at;
      item.head = head;
      item.kv_head = kv_head;
      item.first_row = first_row;
      item.q_block = first_row / BLOCK_SIZE;
      item.visible = visible_blocks(shape, first_row / BLOCK_SIZE);
    }
    if (threadIdx.x < 32) {
      __syncwarp();
      list_visits(item, list, words, shape);
    }
  }
  __syncthreads();
  const auto load_tile = [&](uint32_t to, const uint16_t* from, int64_t pitch, const uint16_t* anchors_from, int tile) {
    if (tile >= 0) load_rows<BN>(to, from, pitch, tile, shape.k_len);
    else load_rows<BN>(to, anchors_from, HEAD_DIM, ~tile, shape.key_anchors * shape.anchor_pitch);
    copy_commit();
  };
  Walk walk = {0, 0};
  {  // tiles of keys no row of this item sees are left out (the upper half of a block of 256)
    const int stop = shape.causal ? min(shape.k_len, shape.q_offset + min(shape.q_len, item.first_row + BM)) : shape.k_len;
    while (walk.entry < item.num_blocks && walk.tile(item, list, shape) >= stop) walk.go_on(item, shape);
  }
  int tile = walk.tile(item, list, shape);
  if (tile != NO_TILE) load_tile(k_tile, item.keys, k_row_stride, item.anchor_keys, tile);

  Output o;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) o[m][i][0] = o[m][i][1] = o[m][i][2] = o[m][i][3] = 0.f;
  Softmax softmax;
  softmax.begin();
  const float c = shape.scale_log2;
#pragma unroll 1
  while (tile != NO_TILE) {
    copy_wait<0>();
    __syncthreads();  // these keys are there, and nobody reads the values before any more
    load_tile(v_tile, item.values, v_row_stride, item.anchor_values, tile);

    Scores s;
    const int thread = thread_again(), lane = thread & 31;  // ldmatrix reads four 8 x 8 matrices; lane / 8 is the one this lane addresses
    const uint32_t q_at = q_tile + ((thread >> 5) * (16 * ROW_TILES) + (lane & 15)) * ROW_BYTES + (lane >> 4) * 16;
    const uint32_t k_at = k_tile + ((lane >> 4) * 8 + (lane & 7)) * ROW_BYTES + (lane >> 3 & 1) * 16;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int j = 0; j < BN / 2; ++j) s[m][j] = 0.f;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) score_step(s, q_at + step * 32, k_at + step * 32);
    PerRow top, from;
    if (EARLY_MAXIMA) find_largest(top, s);
    if (tile < 0 || tile + BN - 1 > last_visible_key(shape, item.first_row)) {
      hide(s, tile, item, words, anchors, shape);
      if (EARLY_MAXIMA) find_largest(top, s);
    }
    walk.go_on(item, shape);
    tile = walk.tile(item, list, shape);
    copy_wait<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (tile != NO_TILE) load_tile(k_tile, item.keys, k_row_stride, item.anchor_keys, tile);

    if (!EARLY_MAXIMA) find_largest(top, s);
    softmax.raise_maxima(from, top, c, o);
    const int again = thread_again() & 31;
    const uint32_t v_at = v_tile + (again & 15) * ROW_BYTES + (again >> 4) * 16;
#pragma unroll
    for (int step = 0; step < BN / 16; ++step) {
      uint32_t p[ROW_TILES][4];
      softmax.weigh(p, s, step, from, c);
      add_values(o, p, v_at + step * 16 * ROW_BYTES);
    }
  }

  const int thread = thread_again(), lane = thread & 31, head = item.head;
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    float not_finite = 0.f;
    const int first = item.first_row + (thread >> 5) * (16 * ROW_TILES) + 16 * m + (lane >> 2);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first + 8 * r;
      const int64_t at = (int64_t)head * shape.q_len + row;
      const float sum = quad_sum(softmax.sum[m][r]), scale = sum == 0.f ? 0.f : 1.f / sum;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        const float a = o[m][i][2 * r] * scale, b = o[m][i][2 * r + 1] * scale;
        not_finite += a * 0.f + b * 0.f;
        if (row < shape.q_len) output[(at * HEAD_DIM + 8 * i + (lane & 3) * 2) >> 1] = pack(a, b);
      }
      if ((lane & 3) == 0 && row < shape.q_len) lse[at] = (softmax.largest[m][r] + log2_fast(sum)) * 0.6931471805599453f;
    }
    if (__any_sync(0xffffffffu, not_finite != 0.f) && lane == 0) {
      const int slot = atomicAdd(broken, 1);
      broken[2 + 2 * slot] = head;
      broken[3 + 2 * slot] = first;
    }
  }
}
