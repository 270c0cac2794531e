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
//   7  a tile in two halves: the weights of the first come from its scores while the tensor cores score the second, and the weights of
//      the second while they add the values of the first. The output is scaled only where a row of the warp has a new maximum.
//
// Shared memory: Q [BM][PITCH], K [BN][PITCH], V [BN][PITCH], Item, the list (see attend_sm80_visits.cuh); PITCH = HEAD_DIM + 8 elements,
// so that the eight rows of an ldmatrix fall into different banks.
#include "mask.cuh"
#include "attend_sm80_visits.cuh"

#define ROW_TILES (BM / WARPS / 16)  // m16 tiles a warp
#define HALF (BN / 2)                // keys that are scored, weighed and added together
#define Q_BYTES (BM * ROW_BYTES)
#define TILE_BYTES (BN * ROW_BYTES)
#define ITEM_AT (Q_BYTES + 2 * TILE_BYTES)

// In tensor-core layout; thread t holds row t % 32 / 4 of each m16 tile of its warp, and the row 8 below it.
typedef float Scores[ROW_TILES][HALF / 2];
typedef uint32_t Weights[ROW_TILES][HALF / 16][4];
typedef float Output[ROW_TILES][HEAD_DIM / 8][4];

// s [the warp's rows, HALF keys] = Q K^T. Addresses of what this lane reads by ldmatrix.
DEVICE void score(Scores& s, uint32_t q_at, uint32_t k_at) {
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
    for (int j = 0; j < HALF / 2; ++j) s[m][j] = 0.f;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    uint32_t a[ROW_TILES][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) load_matrix(a[m], q_at + 16 * m * ROW_BYTES + step * 32);
#pragma unroll
    for (int n = 0; n < HALF / 16; ++n) {
      uint32_t b[4];
      load_matrix(b, k_at + n * 16 * ROW_BYTES + step * 32);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        mma(s[m] + 8 * n, a[m], b[0], b[1]);
        mma(s[m] + 8 * n + 4, a[m], b[2], b[3]);
      }
    }
  }
}

// o += the weights times the values of HALF keys.
DEVICE void add_values(Output& o, const Weights& p, uint32_t v_at) {
#pragma unroll
  for (int step = 0; step < HALF / 16; ++step) {
#pragma unroll
    for (int n = 0; n < HEAD_DIM / 16; ++n) {
      uint32_t b[4];
      load_matrix_transposed(b, v_at + step * 16 * ROW_BYTES + n * 32);
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        mma(o[m][2 * n], p[m][step], b[0], b[1]);
        mma(o[m][2 * n + 1], p[m][step], b[2], b[3]);
      }
    }
  }
}

// The online softmax of a thread's rows, in powers of two: [m][0] the row in the upper half of an m16 tile, [m][1] the row in the lower.
struct Softmax {
  float largest[ROW_TILES][2], sum[ROW_TILES][2], scale[ROW_TILES][2];

  DEVICE void begin() {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      largest[m][0] = largest[m][1] = -INFINITY_F;
      sum[m][0] = sum[m][1] = 0.f;
    }
  }
  // Weights of HALF more keys from their scores; c: scale_log2. Returns whether `scale`, what the output so far is to be scaled by, is
  // anything but 1 in a row of the warp.
  DEVICE bool weigh(Weights& p, const Scores& s, float c) {
    bool moved = false;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x = fmaxf(s[m][2 * r], s[m][2 * r + 1]);
#pragma unroll
        for (int j = 1; j < HALF / 8; ++j) x = fmaxf(x, fmaxf(s[m][4 * j + 2 * r], s[m][4 * j + 2 * r + 1]));
        x = quad_max(x) * c;
        moved |= x > largest[m][r];
        x = fmaxf(x, largest[m][r]);
        const float from = x == -INFINITY_F ? 0.f : x;  // rows that saw nothing yet
        scale[m][r] = exp2_fast(largest[m][r] - from);
        largest[m][r] = x;
        sum[m][r] *= scale[m][r];
#pragma unroll
        for (int j = 0; j < HALF / 8; ++j) {
          const float a = exp2_fast(fmaf(s[m][4 * j + 2 * r], c, -from)), b = exp2_fast(fmaf(s[m][4 * j + 2 * r + 1], c, -from));
          sum[m][r] += a + b;
          p[m][j / 2][2 * (j % 2) + r] = pack(a, b);
        }
      }
    }
    return __any_sync(0xffffffffu, moved);
  }
  DEVICE void rescale(Output& o) const {
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[m][i][e] *= scale[m][e / 2];
  }
};

// Hides what a row may not see of HALF keys or anchors from `tile` on.
DEVICE void hide(Scores& s, int tile, const volatile Item& item, const uint32_t* words, const int* anchors, const Shape& shape) {
  const int t = thread_again(), first_row = item.first_row, visible = item.visible, tile_last = last_visible_key(shape, first_row);
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    const int row = first_row + (t >> 5) * (16 * ROW_TILES) + 16 * m + ((t & 31) >> 2);
    const Mask<HALF> mask = {anchors, item.kv_head, visible, last_visible_key(shape, row), last_visible_key(shape, row + 8), tile_last, (t & 3) * 2};
    if (tile >= 0) {
      mask.hide_keys(s[m], tile);
    } else {
      const uint32_t unselected[1] = {unselected_word(words, shape, item.head, item.q_block, ~tile % shape.anchor_pitch / 32, visible)};
      mask.hide_anchors(s[m], ~tile, unselected, shape);
    }
  }
}

// One thread block an item. Strides in elements, last axis contiguous; compact anchors [Hkv, r * anchor_pitch, d].
// The other arguments are those of attend_sm90.
extern "C" __global__ void __launch_bounds__(THREADS) attend_sm80(
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

    Scores early, late;
    Weights p, q;
    const int thread = thread_again(), lane = thread & 31;  // ldmatrix reads four 8 x 8 matrices; lane / 8 is the one this lane addresses
    const uint32_t q_at = q_tile + ((thread >> 5) * (16 * ROW_TILES) + (lane & 15)) * ROW_BYTES + (lane >> 4) * 16;
    const uint32_t k_at = k_tile + ((lane >> 4) * 8 + (lane & 7)) * ROW_BYTES + (lane >> 3 & 1) * 16;
    const bool partly = tile < 0 || tile + BN - 1 > last_visible_key(shape, item.first_row);
    score(early, q_at, k_at);
    if (partly) hide(early, tile, item, words, anchors, shape);
    score(late, q_at, k_at + HALF * ROW_BYTES);
    const bool early_moved = softmax.weigh(p, early, c);
    if (partly) hide(late, tile < 0 ? tile - HALF : tile + HALF, item, words, anchors, shape);
    walk.go_on(item, shape);
    tile = walk.tile(item, list, shape);
    copy_wait<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (tile != NO_TILE) load_tile(k_tile, item.keys, k_row_stride, item.anchor_keys, tile);

    const int again = thread_again() & 31;
    const uint32_t v_at = v_tile + (again & 15) * ROW_BYTES + (again >> 4) * 16;
    if (early_moved) softmax.rescale(o);
    add_values(o, p, v_at);
    if (softmax.weigh(q, late, c)) softmax.rescale(o);
    add_values(o, q, v_at + HALF * ROW_BYTES);
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
