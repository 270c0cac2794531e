// Step 6 on sm_80 and later: exact attention over selected blocks and anchor keys, by cp.async and mma.sync.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  8 warps of 16 query rows, 64 keys a step, two-stage cp.async ring, Q in registers
//   2  4 warps of 32 query rows where head_dim <= 128: every fragment of K and V is used twice per load from shared memory,
//      which was the limit before; Q is read from shared memory instead, and two thread blocks share a multiprocessor
//   3  padded rows instead of a swizzle, so that any head_dim that is a multiple of 16 works
//   4  the block mask is walked by the kernel, anchors are tiles of the same loop (as in attend_sm90.cu)
//   5  the walk and the sources live in shared memory, one thread walks: registers stay free for the accumulators (no spills)
//
// Shared memory: Control (CONTROL_BYTES), Q [BM][PITCH], then KV_STAGES x { K [BN][PITCH], V [BN][PITCH] }; PITCH = HEAD_DIM + 8 elements, so that
// the eight rows of an ldmatrix fall into different banks.
#include "mask.cuh"

#define BM (BLOCK_SIZE == 64 ? 64 : 128)
#define BN (HEAD_DIM > 128 ? 32 : 64)
#define WARPS (HEAD_DIM > 128 && BM == 128 ? 8 : 4)
#define ROW_TILES (BM / WARPS / 16)  // m16 tiles a warp
#define THREADS (32 * WARPS)
#define KV_STAGES 2
#define PITCH (HEAD_DIM + 8)
#define ROW_BYTES (PITCH * 2)
#define Q_BYTES (BM * ROW_BYTES)
#define TILE_BYTES (BN * ROW_BYTES)
#define CONTROL_BYTES 256
#define SHARED_BYTES (CONTROL_BYTES + Q_BYTES + 2 * KV_STAGES * TILE_BYTES)
#define TILES_PER_BLOCK (BLOCK_SIZE / BN)

struct Source {  // rows of one head in global memory
  const uint16_t* rows;
  int64_t pitch;
  int count;
};

template <int ROWS> DEVICE void load_rows(uint32_t to, Source from, int first) {  // rows past the end are zero
  constexpr int CHUNKS = HEAD_DIM / 8;
#pragma unroll 1
  for (int e = threadIdx.x; e < ROWS * CHUNKS; e += THREADS) {
    const int r = e / CHUNKS, chunk = e % CHUNKS;
    const bool exists = first + r < from.count;
    copy_async(to + r * ROW_BYTES + chunk * 16, from.rows + (exists ? first + r : 0) * from.pitch + chunk * 8, exists);
  }
}

// Walks the key tiles of one query block, last first, then the anchor tiles. A tile is the position of its first key, or
// ~(first row of the compact anchors); `done` after the last.
struct TileWalk {
  const uint32_t* words;
  int head, q_block, visible, stop;
  int word, part, rank;
  uint32_t bits;
  bool in_anchors;

  DEVICE uint32_t word_at(const Shape& shape, int w) const { return selected_word(words, shape, head, q_block, w, visible); }

  // Returns false at the end.
  DEVICE bool next(const Shape& shape, int& tile) {
    while (!in_anchors) {
      if (part > 0) {
        const int block = 32 * word + 31 - __clz(bits);
        tile = block * BLOCK_SIZE + --part * BN;
        if (part == 0) bits &= ~(1u << (block & 31));
        if (tile < stop) return true;
        continue;
      }
      if (bits) {
        part = TILES_PER_BLOCK;
        continue;
      }
      if (--word < 0) {
        in_anchors = true;
        word = -(BN / 32);
        rank = shape.key_anchors;
        break;
      }
      bits = word_at(shape, word);
    }
    if (shape.key_anchors == 0) return false;
    while (true) {
      if (rank < shape.key_anchors) {
        tile = ~(rank++ * shape.anchor_pitch + 32 * word);
        return true;
      }
      word += BN / 32;
      if (word * 32 >= visible) return false;
      uint32_t unselected = 0;
      for (int w = word; w < word + BN / 32; ++w) unselected |= bits_below(w, visible) & ~word_at(shape, w);
      if (unselected) rank = 0;
    }
  }
};

struct Control {  // what one thread keeps for all; in shared memory, because registers are short
  TileWalk walk;
  Source keys, values, anchor_keys, anchor_values;
  int tile[2], more[2];  // the tile in each stage, and whether there is one
};

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
  Control& control = *(Control*)shared;
  const uint32_t q_tile = shared_address(shared) + CONTROL_BYTES, kv_tiles = q_tile + Q_BYTES;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int2 item = work[blockIdx.x];
  const int head = item.x, first_row = item.y * BM, kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  const int q_block = first_row / shape.block_size, visible = visible_blocks(shape, q_block);
  if (threadIdx.x == 0) {
    const int anchor_rows = shape.key_anchors * shape.anchor_pitch;
    const int64_t anchor_at = (int64_t)kv_head * anchor_rows * HEAD_DIM;
    control.keys = {keys + kv_head * k_head_stride, k_row_stride, shape.k_len};
    control.values = {values + kv_head * v_head_stride, v_row_stride, shape.k_len};
    control.anchor_keys = {anchor_keys + anchor_at, HEAD_DIM, anchor_rows};
    control.anchor_values = {anchor_values + anchor_at, HEAD_DIM, anchor_rows};
    const int stop = shape.causal ? min(shape.k_len, shape.q_offset + min(shape.q_len, first_row + BM)) : shape.k_len;
    control.walk = {words, head, q_block, visible, stop, ceil_div(visible, 32), 0, 0, 0, false};
    control.more[0] = control.walk.next(shape, control.tile[0]);
  }
  const Source q = {queries + head * q_head_stride, q_row_stride, shape.q_len};
  load_rows<BM>(q_tile, q, first_row);
  __syncthreads();
  const auto load_tile = [&](int stage) {
    const uint32_t to = kv_tiles + stage * (2 * TILE_BYTES);
    const int tile = control.tile[stage];
    load_rows<BN>(to, tile < 0 ? control.anchor_keys : control.keys, tile < 0 ? ~tile : tile);
    load_rows<BN>(to + TILE_BYTES, tile < 0 ? control.anchor_values : control.values, tile < 0 ? ~tile : tile);
    copy_commit();
  };
  int stage = 0;
  if (control.more[0]) load_tile(0);
  if (threadIdx.x == 0) control.more[1] = control.more[0] && control.walk.next(shape, control.tile[1]);

  float o[ROW_TILES][HEAD_DIM / 8][4];
  float max0[ROW_TILES], max1[ROW_TILES], sum0[ROW_TILES], sum1[ROW_TILES];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    max0[m] = max1[m] = -INFINITY_F;
    sum0[m] = sum1[m] = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) o[m][i][0] = o[m][i][1] = o[m][i][2] = o[m][i][3] = 0.f;
  }
  const int warp_row = warp * (16 * ROW_TILES);           // of the tile
  const int row = first_row + warp_row + (lane >> 2);     // this thread's first row; it has rows row + 16 m and row + 16 m + 8
  const int column = (lane & 3) * 2, matrix = lane >> 3;  // of ldmatrix's four 8 x 8 matrices, the one this lane addresses
  const float c = shape.scale_log2;
#pragma unroll 1
  while (true) {
    copy_wait<0>();
    __syncthreads();  // this stage is full, the other is free
    if (!control.more[stage]) break;
    const int tile = control.tile[stage];
    if (control.more[stage ^ 1]) load_tile(stage ^ 1);
    const uint32_t k_tile = kv_tiles + stage * (2 * TILE_BYTES), v_tile = k_tile + TILE_BYTES;

    float s[ROW_TILES][BN / 2];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int j = 0; j < BN / 2; ++j) s[m][j] = 0.f;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        load_matrix(a[m], q_tile + (warp_row + 16 * m + (lane & 15)) * ROW_BYTES + (2 * step + (lane >> 4)) * 16);
#pragma unroll
      for (int n = 0; n < BN / 16; ++n) {
        uint32_t b[4];
        load_matrix(b, k_tile + (n * 16 + (matrix >> 1) * 8 + (lane & 7)) * ROW_BYTES + (2 * step + (matrix & 1)) * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma(s[m] + 8 * n, a[m], b[0], b[1]);
          mma(s[m] + 8 * n + 4, a[m], b[2], b[3]);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
      const int last0 = last_visible_key(shape, row + 16 * m), last1 = shape.causal ? last0 + 8 : last0;
      const Mask<BN> mask = {words, anchors, head, kv_head, q_block, visible, last0, last1, last_visible_key(shape, first_row), column};
      mask.hide(s[m], tile, shape);
      float x0 = max0[m], x1 = max1[m];
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        x0 = fmaxf(x0, fmaxf(s[m][4 * j], s[m][4 * j + 1]));
        x1 = fmaxf(x1, fmaxf(s[m][4 * j + 2], s[m][4 * j + 3]));
      }
      x0 = quad_max(x0);
      x1 = quad_max(x1);
      const float n0 = x0 == -INFINITY_F ? 0.f : x0 * c, n1 = x1 == -INFINITY_F ? 0.f : x1 * c;  // rows that saw nothing yet
      const float scale0 = exp2_fast(fmaf(max0[m], c, -n0)), scale1 = exp2_fast(fmaf(max1[m], c, -n1));
      max0[m] = x0;
      max1[m] = x1;
      sum0[m] *= scale0;
      sum1[m] *= scale1;
#pragma unroll
      for (int j = 0; j < BN / 8; ++j) {
        s[m][4 * j] = exp2_fast(fmaf(s[m][4 * j], c, -n0));
        s[m][4 * j + 1] = exp2_fast(fmaf(s[m][4 * j + 1], c, -n0));
        s[m][4 * j + 2] = exp2_fast(fmaf(s[m][4 * j + 2], c, -n1));
        s[m][4 * j + 3] = exp2_fast(fmaf(s[m][4 * j + 3], c, -n1));
        sum0[m] += s[m][4 * j] + s[m][4 * j + 1];
        sum1[m] += s[m][4 * j + 2] + s[m][4 * j + 3];
      }
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        o[m][i][0] *= scale0;
        o[m][i][1] *= scale0;
        o[m][i][2] *= scale1;
        o[m][i][3] *= scale1;
      }
    }
#pragma unroll
    for (int step = 0; step < BN / 16; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        a[m][0] = pack(s[m][8 * step], s[m][8 * step + 1]);
        a[m][1] = pack(s[m][8 * step + 2], s[m][8 * step + 3]);
        a[m][2] = pack(s[m][8 * step + 4], s[m][8 * step + 5]);
        a[m][3] = pack(s[m][8 * step + 6], s[m][8 * step + 7]);
      }
#pragma unroll
      for (int n = 0; n < HEAD_DIM / 16; ++n) {
        uint32_t b[4];
        load_matrix_transposed(b, v_tile + (step * 16 + (matrix & 1) * 8 + (lane & 7)) * ROW_BYTES + (2 * n + (matrix >> 1)) * 16);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma(o[m][2 * n], a[m], b[0], b[1]);
          mma(o[m][2 * n + 1], a[m], b[2], b[3]);
        }
      }
    }
    __syncthreads();  // every warp has read this stage's tile word
    if (threadIdx.x == 0) control.more[stage] = control.more[stage ^ 1] && control.walk.next(shape, control.tile[stage]);
    stage ^= 1;
  }

#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    sum0[m] = quad_sum(sum0[m]);
    sum1[m] = quad_sum(sum1[m]);
    const float scale0 = sum0[m] == 0.f ? 0.f : 1.f / sum0[m], scale1 = sum1[m] == 0.f ? 0.f : 1.f / sum1[m];
    const int r0 = row + 16 * m, r1 = r0 + 8;
    const int64_t at = (int64_t)head * shape.q_len;
    float not_finite = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
      const float a = o[m][i][0] * scale0, b = o[m][i][1] * scale0, d = o[m][i][2] * scale1, e = o[m][i][3] * scale1;
      not_finite += a * 0.f + b * 0.f + d * 0.f + e * 0.f;
      if (r0 < shape.q_len) output[((at + r0) * HEAD_DIM + 8 * i + column) >> 1] = pack(a, b);
      if (r1 < shape.q_len) output[((at + r1) * HEAD_DIM + 8 * i + column) >> 1] = pack(d, e);
    }
    if (__any_sync(0xffffffffu, not_finite != 0.f) && lane == 0) {
      const int slot = atomicAdd(broken, 1);
      broken[2 + 2 * slot] = head;
      broken[3 + 2 * slot] = r0;
    }
    if ((lane & 3) == 0) {
      if (r0 < shape.q_len) lse[at + r0] = (max0[m] * c + log2_fast(sum0[m])) * 0.6931471805599453f;
      if (r1 < shape.q_len) lse[at + r1] = (max1[m] * c + log2_fast(sum1[m])) * 0.6931471805599453f;
    }
  }
}
