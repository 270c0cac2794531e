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
//
// Shared memory: Q [BM][PITCH], K [BN][PITCH], V [BN][PITCH], Control, the list: blocks, last first, then the first word of each group of
// BN anchors; PITCH = HEAD_DIM + 8 elements, so that the eight rows of an ldmatrix fall into different banks.
#include "mask.cuh"

#define BM (BLOCK_SIZE == 64 ? 64 : 128)
#define BN (HEAD_DIM > 128 ? 32 : 64)
#define WARPS (HEAD_DIM > 128 && BM == 128 ? 8 : 4)
#define ROW_TILES (BM / WARPS / 16)  // m16 tiles a warp
#define THREADS (32 * WARPS)
#define PITCH (HEAD_DIM + 8)
#define ROW_BYTES (PITCH * 2)
#define Q_BYTES (BM * ROW_BYTES)
#define TILE_BYTES (BN * ROW_BYTES)
#define CONTROL_AT (Q_BYTES + 2 * TILE_BYTES)
#define TILES_PER_BLOCK (BLOCK_SIZE / BN)

// Copies ROWS rows of one head into padded shared memory; rows past the end are zero.
template <int ROWS> DEVICE void load_rows(uint32_t to, const uint16_t* from, int64_t pitch, int first, int count) {
  constexpr int CHUNKS = HEAD_DIM / 8, STEP = THREADS / CHUNKS;
  if constexpr (THREADS % CHUNKS == 0 && ROWS % STEP == 0) {
    const int t = thread_again(), r = t / CHUNKS, chunk = t % CHUNKS;
    const uint32_t target = to + r * ROW_BYTES + chunk * 16;
    const uint16_t* source = from + (first + r) * pitch + chunk * 8;
    if (first + ROWS <= count) {
#pragma unroll
      for (int i = 0; i < ROWS / STEP; ++i, source += STEP * pitch) copy_async(target + i * (STEP * ROW_BYTES), source, true);
    } else {
#pragma unroll 1
      for (int i = 0; i < ROWS / STEP; ++i, source += STEP * pitch) {
        const bool exists = first + r + i * STEP < count;
        copy_async(target + i * (STEP * ROW_BYTES), exists ? source : from, exists);
      }
    }
  } else {
#pragma unroll 1
    for (int e = threadIdx.x; e < ROWS * CHUNKS; e += THREADS) {
      const int r = e / CHUNKS, chunk = e % CHUNKS;
      const bool exists = first + r < count;
      copy_async(to + r * ROW_BYTES + chunk * 16, from + (exists ? first + r : 0) * pitch + chunk * 8, exists);
    }
  }
}

struct Control {  // in shared memory, because registers are short
  const uint16_t *keys, *values, *anchor_keys, *anchor_values;  // of this item's KV head
  int key_tiles, num_tiles, unused[6];
};
struct Visits {
  int blocks, anchor_groups;
};
// Lists what an item visits: selected blocks, last first, then the first word of each group of BN anchors with an unselected block. By one warp.
DEVICE Visits list_visits(uint16_t* list, const uint32_t* words, const Shape& shape, int head, int q_block, int visible) {
  const int lane = threadIdx.x & 31;
  Visits n = {0, 0};
  const int chunks = ceil_div(visible, 1024);
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int w = 32 * chunk + 31 - lane;  // the first lane has the last word
    uint32_t bits = selected_word(words, shape, head, q_block, w, visible);
    int upto = __popc(bits);
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    for (int at = n.blocks + upto - __popc(bits); bits; ++at) {
      const int bit = 31 - __clz(bits);
      bits &= ~(1u << bit);
      list[at] = (uint16_t)(32 * w + bit);
    }
    n.blocks += __shfl_sync(0xffffffffu, upto, 31);
  }
  for (int chunk = 0; shape.key_anchors && chunk < chunks; ++chunk) {
    const int w = 32 * chunk + lane;
    uint32_t any = __ballot_sync(0xffffffffu, unselected_word(words, shape, head, q_block, w, visible) != 0);
    if (BN == 64) any = (any | any >> 1) & 0x55555555u;
    if (any >> lane & 1) list[n.blocks + n.anchor_groups + __popc(any & ((1u << lane) - 1u))] = (uint16_t)w;
    n.anchor_groups += __popc(any);
  }
  return n;
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
  volatile Control& control = *(volatile Control*)(shared + CONTROL_AT);
  uint16_t* const list = (uint16_t*)(shared + CONTROL_AT + sizeof(Control));
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int2 item = work[blockIdx.x];
  const int head = item.x, first_row = item.y * BM, kv_head = head / (shape.num_q_heads / shape.num_kv_heads);
  const int q_block = first_row / BLOCK_SIZE, visible = visible_blocks(shape, q_block);
  load_rows<BM>(q_tile, queries + head * q_head_stride, q_row_stride, first_row, shape.q_len);
  if (warp == 0) {
    const Visits n = list_visits(list, words, shape, head, q_block, visible);
    if (lane == 0) {
      const int64_t anchor_at = (int64_t)kv_head * shape.key_anchors * shape.anchor_pitch * HEAD_DIM;
      control.keys = keys + kv_head * k_head_stride;
      control.values = values + kv_head * v_head_stride;
      control.anchor_keys = anchor_keys + anchor_at;
      control.anchor_values = anchor_values + anchor_at;
      control.key_tiles = n.blocks * TILES_PER_BLOCK;
      control.num_tiles = n.blocks * TILES_PER_BLOCK + n.anchor_groups * shape.key_anchors;
    }
  }
  __syncthreads();
  // A tile is the position of its first key, or ~(first row of the compact anchors).
  const auto tile_at = [&](int j) {
    const int key_tiles = control.key_tiles;
    if (j < key_tiles) return list[j / TILES_PER_BLOCK] * BLOCK_SIZE + (TILES_PER_BLOCK - 1 - j % TILES_PER_BLOCK) * BN;
    const int i = j - key_tiles, group = i / shape.key_anchors;
    return ~((i - group * shape.key_anchors) * shape.anchor_pitch + 32 * list[key_tiles / TILES_PER_BLOCK + group]);
  };
  const auto load_tile = [&](uint32_t to, const uint16_t* from, int64_t pitch, const uint16_t* anchors_from, int tile) {
    if (tile >= 0) load_rows<BN>(to, from, pitch, tile, shape.k_len);
    else load_rows<BN>(to, anchors_from, HEAD_DIM, ~tile, shape.key_anchors * shape.anchor_pitch);
    copy_commit();
  };
  const auto load_keys = [&](int j) { load_tile(k_tile, control.keys, k_row_stride, control.anchor_keys, tile_at(j)); };
  // tiles of keys no row of this item sees are left out (the upper half of a block of 256)
  const int stop = shape.causal ? min(shape.k_len, shape.q_offset + min(shape.q_len, first_row + BM)) : shape.k_len;
  int j = 0;
  while (j < control.key_tiles && tile_at(j) >= stop) ++j;
  if (j < control.num_tiles) load_keys(j);

  float o[ROW_TILES][HEAD_DIM / 8][4];
  float max0[ROW_TILES], max1[ROW_TILES], sum0[ROW_TILES], sum1[ROW_TILES];
#pragma unroll
  for (int m = 0; m < ROW_TILES; ++m) {
    max0[m] = max1[m] = -INFINITY_F;
    sum0[m] = sum1[m] = 0.f;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; ++i) o[m][i][0] = o[m][i][1] = o[m][i][2] = o[m][i][3] = 0.f;
  }
  const float c = shape.scale_log2;
#pragma unroll 1
  for (; j < control.num_tiles; ++j) {
    const int tile = tile_at(j);
    copy_wait<0>();
    __syncthreads();  // these keys are there, and nobody reads the values before any more
    load_tile(v_tile, control.values, v_row_stride, control.anchor_values, tile);

    float s[ROW_TILES][BN / 2];
    const int thread = thread_again(), lane = thread & 31;  // ldmatrix reads four 8 x 8 matrices; lane / 8 is the one this lane addresses
    const uint32_t q_at = q_tile + ((thread >> 5) * (16 * ROW_TILES) + (lane & 15)) * ROW_BYTES + (lane >> 4) * 16;
    const uint32_t k_at = k_tile + ((lane >> 4) * 8 + (lane & 7)) * ROW_BYTES + (lane >> 3 & 1) * 16;
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m)
#pragma unroll
      for (int j = 0; j < BN / 2; ++j) s[m][j] = 0.f;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
      uint32_t a[ROW_TILES][4];
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m)
        load_matrix(a[m], q_at + 16 * m * ROW_BYTES + step * 32);
#pragma unroll
      for (int n = 0; n < BN / 16; ++n) {
        uint32_t b[4];
        load_matrix(b, k_at + n * 16 * ROW_BYTES + step * 32);
#pragma unroll
        for (int m = 0; m < ROW_TILES; ++m) {
          mma(s[m] + 8 * n, a[m], b[0], b[1]);
          mma(s[m] + 8 * n + 4, a[m], b[2], b[3]);
        }
      }
    }
    if (tile < 0 || tile + BN - 1 > last_visible_key(shape, first_row)) {
#pragma unroll
      for (int m = 0; m < ROW_TILES; ++m) {
        const int t = thread_again(), row = first_row + (t >> 5) * (16 * ROW_TILES) + ((t & 31) >> 2), column = (t & 3) * 2;
        const int last0 = last_visible_key(shape, row + 16 * m), last1 = shape.causal ? last0 + 8 : last0;
        const Mask<BN> mask = {anchors, kv_head, visible, last0, last1, last_visible_key(shape, first_row), column};
        if (tile >= 0) {
          mask.hide_keys(s[m], tile);
        } else {
          uint32_t unselected[BN / 32];
          const int word = ~tile % shape.anchor_pitch / 32;
#pragma unroll
          for (int w = 0; w < BN / 32; ++w) unselected[w] = unselected_word(words, shape, head, q_block, word + w, visible);
          mask.hide_anchors(s[m], ~tile, unselected, shape);
        }
      }
    }
    copy_wait<0>();
    __syncthreads();  // the values are there, and nobody reads these keys any more
    if (j + 1 < control.num_tiles) load_keys(j + 1);
    uint32_t p[ROW_TILES][BN / 16][4];
#pragma unroll
    for (int m = 0; m < ROW_TILES; ++m) {
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
      for (int step = 0; step < BN / 16; ++step)
#pragma unroll
        for (int i = 0; i < 4; ++i) p[m][step][i] = pack(s[m][8 * step + 2 * i], s[m][8 * step + 2 * i + 1]);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        o[m][i][0] *= scale0;
        o[m][i][1] *= scale0;
        o[m][i][2] *= scale1;
        o[m][i][3] *= scale1;
      }
    }
    const int again = thread_again() & 31;
    const uint32_t v_at = v_tile + (again & 15) * ROW_BYTES + (again >> 4) * 16;
#pragma unroll
    for (int step = 0; step < BN / 16; ++step) {
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

  const int t = thread_again(), row = first_row + (t >> 5) * (16 * ROW_TILES) + ((t & 31) >> 2), column = (t & 3) * 2;
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
