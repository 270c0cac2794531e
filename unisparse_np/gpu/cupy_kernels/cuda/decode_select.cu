// Steps 1-5 for one query a head, a decode step: pool the new key, score the query against all composite keys, select blocks.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  two launches. decode_scores: composite keys are read once for all heads that share them (few_rows.cuh); scores go to global
//      memory, 4 bytes for every composite key and head. decode_select: a thread block a head sums them per block, one warp selects
//   2  the softmax of each cell of up to 16 composite keys is done where the scores are: 8 bytes a cell instead of 64; the whole
//      thread block looks for Top-P's cut; three thread blocks a multiprocessor score
//
// The block that the new key falls into is pooled again from the cached keys by the code of compress.cu: composites and anchors are
// the same to the bit as when the whole prompt is pooled at once. The number of keys lies in device memory.
#include "few_rows.cuh"
#include "pool.cuh"
#include "select_row.cuh"

#define ROWS (8 * ROW_TILES)
#define TILE 16  // composite keys
#define CELL (KEYS_PER_BLOCK < TILE ? KEYS_PER_BLOCK : TILE)  // composite keys that are summed at once; a block has one or more
#define SCORE_WARPS 8
#define SELECT_WARPS 16
#define UNIT 1073741824.f  // 2^30

DEVICE Shape at_position(const Shape& given, int position) {  // the problem of one query, the last of `position + 1` keys
  Shape shape = given;
  shape.q_offset = position;
  shape.k_len = position + 1;
  return shape;
}

// Eight dims of composite query `head` from `column`: the mean of its heads as float16, as compress.cu gives it.
DEVICE int4 composite_piece(const uint16_t* queries, int64_t q_head_stride, const Shape& shape, int head, int column) {
  float mean[8] = {};
  for (int m = 0; m < shape.head_compress; ++m) {
    float x[8];
    unpack8(x, *(const int4*)(queries + (head * shape.head_compress + m) * q_head_stride + column));
#pragma unroll
    for (int i = 0; i < 8; ++i) mean[i] += x[i];
  }
  const float share = 1.f / shape.head_compress;
#pragma unroll
  for (int i = 0; i < 8; ++i) mean[i] = saturate(mean[i] * share);
  return make_int4(pack_half(mean[0], mean[1]), pack_half(mean[2], mean[3]), pack_half(mean[4], mean[5]), pack_half(mean[6], mean[7]));
}

// Composites and anchors of key block `block`, whose last key is the newest, for composite KV head `head`. norms [members][BLOCK_SIZE].
DEVICE void pool_open_block(Input keys, const Shape& shape, int head, int block, uint32_t* kc, int* anchors, float* norms) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, members = shape.num_kv_heads / shape.num_composite_kv_heads;
  const int first = block * (BLOCK_SIZE / shape.k_compress), stop = ceil_div(shape.k_len, shape.k_compress);
  for (int u = first + warp; u < stop; u += SCORE_WARPS) {
    float mean[8];
    pool(mean, keys, head * members, members, u * shape.k_compress, min(shape.k_len, (u + 1) * shape.k_compress), norms);
    if (lane < LANES_PER_ROW) write_composite(mean, (int64_t)head * shape.num_k_composites + u, lane, kc, nullptr);
  }
  __syncthreads();
  if (shape.key_anchors == 0) return;
  for (int m = warp; m < members; m += SCORE_WARPS)
    pick_anchors(norms + m * BLOCK_SIZE, block * BLOCK_SIZE, shape.k_len - block * BLOCK_SIZE, shape.key_anchors,
                 anchors + ((int64_t)(head * members + m) * shape.num_k_blocks + block) * shape.key_anchors);
}

// From the scores of composite keys first .. first + 15 (below `stop`) with 8 rows to the cells of the rows that exist.
DEVICE void write_cells(const float (&z)[4], int first, int stop, int rows, float2* cells, int64_t pitch, float scale_log2) {
  constexpr int HALVES = CELL == TILE ? 1 : 2, LANES = CELL < 8 ? CELL : 8;  // cells that a lane's two keys belong to; lanes a cell
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    float logit[2], highest[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) logit[k] = highest[k] = first + g + 8 * k < stop ? z[2 * k + e] * scale_log2 : -INFINITY_F;
    if (HALVES == 1) highest[0] = highest[1] = fmaxf(logit[0], logit[1]);
#pragma unroll
    for (int k = 0; k < HALVES; ++k) {
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) highest[k] = fmaxf(highest[k], __shfl_xor_sync(0xffffffffu, highest[k], 4 * step));
      const float base = highest[k] == -INFINITY_F ? 0.f : highest[k];
      float sum = exp2_fast(logit[k] - base);
      if (HALVES == 1) sum += exp2_fast(logit[1] - base);
#pragma unroll
      for (int step = 1; step < LANES; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, 4 * step);
      const int cell = (first + g + 8 * k) / CELL;
      if (g % LANES == 0 && 2 * t + e < rows && cell * CELL < stop) cells[(2 * t + e) * pitch + cell] = make_float2(highest[k], sum);
    }
  }
}

// Grid: (1 + thread blocks that share the closed blocks, Hkc * row groups); thread block 0 pools the open block and scores it.
// kc [Hkc, num_k_composites, d] float16, anchors [Hkv, num_k_blocks, r]: extended by the new key. cells [Hc, pitch]: the maximum of a cell's
// logits and the sum of 2^(logit - maximum).
// Shared memory: norms [members][BLOCK_SIZE], then the rows [ROW_TILES][ROWS_BYTES].
extern "C" __global__ void __launch_bounds__(32 * SCORE_WARPS, HEAD_DIM > 128 || ROW_TILES > 1 ? 2 : 3) decode_scores(
    const uint16_t* queries, const uint16_t* keys, int64_t q_head_stride, int64_t k_head_stride, int64_t k_row_stride,
    const Shape given, const int* position, uint16_t* kc, int* anchors, float2* cells, int64_t pitch)
{
  DYNAMIC_SHARED(shared);
  float* norms = (float*)shared;
  let_next_launch_start();
  wait_for_launch_before();  // no pointer is __restrict__: reads must not move up over this
  const Shape shape = at_position(given, *position);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int heads = shape.num_composite_heads / shape.num_composite_kv_heads, groups = ceil_div(heads, ROWS);
  const int kv_head = blockIdx.y / groups, first_row = blockIdx.y % groups * ROWS, rows = min(ROWS, heads - first_row);
  const int first_head = kv_head * heads + first_row;
  const int members = shape.num_kv_heads / shape.num_composite_kv_heads;
  const uint32_t q_rows = shared_address(shared) + 4 * members * BLOCK_SIZE;
  for (int e = warp; e < ROW_TILES * KEY_PIECES; e += SCORE_WARPS) {
    const int row = e / KEY_PIECES * 8 + g, column = e % KEY_PIECES * 32 + 8 * t;
    int4 piece = make_int4(0, 0, 0, 0);
    if (row < rows && column < HEAD_DIM) piece = composite_piece(queries, q_head_stride, shape, first_head + row, column);
    store_shared(piece_of_rows(q_rows + e / KEY_PIECES * ROWS_BYTES, e % KEY_PIECES), piece);
  }

  const int open_block = (shape.k_len - 1) / BLOCK_SIZE, per_block = BLOCK_SIZE / shape.k_compress;
  const int closed = open_block * per_block, composites = ceil_div(shape.k_len, shape.k_compress);
  const bool opens = blockIdx.x == 0;
  if (opens) pool_open_block({keys, k_head_stride, k_row_stride}, shape, kv_head, open_block, (uint32_t*)kc, anchors, norms);
  __syncthreads();

  const uint16_t* from = kc + (int64_t)kv_head * shape.num_k_composites * HEAD_DIM;
  const int start = opens ? closed : 0, stop = opens ? composites : closed;
  const int step = opens ? SCORE_WARPS : SCORE_WARPS * (gridDim.x - 1), first = opens ? warp : (blockIdx.x - 1) * SCORE_WARPS + warp;
  KeyTile k;
  const auto load = [&](int tile) {
    const int low = start + tile * TILE + g, high = low + 8;
    k.load(low < stop ? from + (int64_t)low * HEAD_DIM : nullptr, high < stop ? from + (int64_t)high * HEAD_DIM : nullptr, t, load_written);
  };
  const int tiles = ceil_div(stop - start, TILE);
  if (first < tiles) load(first);
  for (int tile = first; tile < tiles; tile += step) {
    float z[ROW_TILES][4];
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
      k.multiply(z[n], q_rows + n * ROWS_BYTES, [](float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_half(d, a, b0, b1); });
    if (tile + step < tiles) load(tile + step);
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
      write_cells(z[n], start + tile * TILE, stop, rows - 8 * n, cells + (first_head + 8 * n) * pitch, pitch, shape.scale_log2);
  }
}

// One value a thread to one for all, by a tree that is always the same. room [SELECT_WARPS] in shared memory.
template <class Merge> DEVICE float over_thread_block(float x, float* room, Merge merge) {
#pragma unroll
  for (int step = 16; step; step >>= 1) x = merge(x, __shfl_xor_sync(0xffffffffu, x, step));
  __syncthreads();
  if ((threadIdx.x & 31) == 0) room[threadIdx.x >> 5] = x;
  __syncthreads();
  x = room[0];
  for (int w = 1; w < SELECT_WARPS; ++w) x = merge(x, room[w]);
  return x;
}

struct ThreadBlockTeam {  // for cut_at; room: two rows of SELECT_WARPS numbers in shared memory
  int first, step, turn;
  uint32_t* room;
  DEVICE ThreadBlockTeam(float* room) : first(threadIdx.x), step(32 * SELECT_WARPS), turn(0), room((uint32_t*)room) {}
  DEVICE uint32_t gather(uint32_t of_warp) {  // in lane w what warp w gave
    turn ^= SELECT_WARPS;
    if ((threadIdx.x & 31) == 0) room[turn + (threadIdx.x >> 5)] = of_warp;
    __syncthreads();
    return (threadIdx.x & 31) < SELECT_WARPS ? room[turn + (threadIdx.x & 31)] : 0;
  }
  DEVICE uint32_t sum(uint32_t x) { return __reduce_add_sync(0xffffffffu, gather(__reduce_add_sync(0xffffffffu, x))); }
  DEVICE uint32_t max(uint32_t x) { return __reduce_max_sync(0xffffffffu, gather(__reduce_max_sync(0xffffffffu, x))); }
};

// Grid: Hc. cells [Hc, pitch] as decode_scores writes them -> words [Hc, words_per_row], counts [Hc].
// Shared memory: {block sums [32 * words_per_row], the same in units}, then 2 * SELECT_WARPS numbers.
extern "C" __global__ void __launch_bounds__(32 * SELECT_WARPS) decode_select(
    const float2* cells, int64_t pitch, const double* top_p, const float* row_threshold, const Shape given,
    const int* position, uint32_t* words, int* counts)
{
  DYNAMIC_SHARED(shared);
  constexpr int CELLS_PER_BLOCK = KEYS_PER_BLOCK / CELL;
  let_next_launch_start();
  const double share = top_p ? top_p[blockIdx.x] : 0.0;
  const Shape shape = at_position(given, *position);
  wait_for_launch_before();
  const int head = blockIdx.x, composites = ceil_div(shape.k_len, shape.k_compress), visible = ceil_div(shape.k_len, BLOCK_SIZE);
  const int cells_seen = ceil_div(composites, CELL);
  float* sums = (float*)shared;
  uint32_t* units = (uint32_t*)(sums + 32 * shape.words_per_row);
  float* room = (float*)(units + 32 * shape.words_per_row);
  cells += head * pitch;

  // Step 2: the row's maximum, then each block's sum and that of all
  float highest = -INFINITY_F, total = 0.f;
  for (int i = threadIdx.x; i < cells_seen; i += 32 * SELECT_WARPS) highest = fmaxf(highest, cells[i].x);
  highest = over_thread_block(highest, room, [](float a, float b) { return fmaxf(a, b); });
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) {
    float sum = 0.f;
#pragma unroll
    for (int i = j * CELLS_PER_BLOCK; i < (j + 1) * CELLS_PER_BLOCK; ++i)
      if (i < cells_seen) sum += cells[i].y * exp2_fast(cells[i].x - highest);
    sums[j] = sum;
    total += sum;
  }
  total = over_thread_block(total, room, [](float a, float b) { return a + b; });

  // Step 3: there is one composite query, so that a block's mean and its peak are one and the same
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) {
    sums[j] /= total;
    units[j] = as_handed_out((uint32_t)__float2int_rn(sums[j] * UNIT));
  }
  __syncthreads();
  Cut cut = {0, 0};
  if (top_p) {
    ThreadBlockTeam team(room);
    cut = cut_at(share, units, visible, team);
  }
  if (threadIdx.x >= 32) return;
  const int count = select_row(top_p ? units : nullptr, cut, sums, row_threshold ? row_threshold + head : nullptr, shape, 0,
                               words + (int64_t)head * shape.words_per_row);
  if (threadIdx.x == 0) counts[head] = count;
}
