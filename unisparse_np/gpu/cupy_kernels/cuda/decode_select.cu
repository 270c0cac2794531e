// Steps 1-5 for one query a head, a decode step: pool the new key, score the query against all composite keys, select blocks.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  two launches. decode_scores: composite keys are read once for all heads that share them (few_rows.cuh); scores go to global
//      memory, 4 bytes for every composite key and head. decode_select: a thread block a head sums them per block, one warp selects
//   2  the softmax of each cell of up to 16 composite keys is done where the scores are: 8 bytes a cell instead of 64; the whole
//      thread block looks for Top-P's cut; three thread blocks a multiprocessor score
//   3  the first closed composite keys are asked for while the launch before ends; cells are read once; all warps write the words
//   4  only the newest key is pooled, not its whole block; Top-P's cut is found by histograms of 11 bits of the scores
//
// Where Top-P has composites of its own, of COARSE fine ones each, a coarse key's logit is the mean of its fine keys' logits: a dot
// product is linear. Nothing more is read for them.
//
// The composite that the new key falls into is pooled again from the cached keys by the code of compress.cu: composites and anchors
// are the same to the bit as when the whole prompt is pooled at once. The number of keys lies in device memory.
//
// Shared memory of decode_scores: the rows of composite queries [ROW_TILES][ROWS_BYTES]. Of decode_select: block shares
// [32 * words_per_row], the same of coarse keys where there are any, units [32 * words_per_row], ties [words_per_row], a histogram [BINS],
// then CUT_ROOM numbers.
#include "decode_cells.cuh"
#include "decode_cut.cuh"
#include "few_rows.cuh"
#include "pool.cuh"

#define SCORE_WARPS 8
#define UNIT 1073741824.f  // 2^30

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

// The squared norm of one row, as pool() has it, known to all lanes.
DEVICE float norm_of(Input keys, int head, int position) {
  const int column = (threadIdx.x & 31) % LANES_PER_ROW * 8;
  int4 raw = make_int4(0, 0, 0, 0);
  if (column < HEAD_DIM) raw = *(const int4*)(keys.data + head * keys.head_stride + position * keys.row_stride + column);
  float row[8];
  unpack8(row, raw);
  return squared_norm(row);
}

// The newest key among the anchors of its block, which the steps before have left in ascending norm, by one warp.
DEVICE void add_anchor(Input keys, int head, int newest, int key_anchors, int* anchors) {
  const int lane = threadIdx.x & 31, known = min(key_anchors, newest % BLOCK_SIZE);
  const int mine = lane < known ? anchors[lane] : -1;
  const float norm = norm_of(keys, head, newest);
  int place = 0;
  for (int i = 0; i < known; ++i) place += norm_of(keys, head, __shfl_sync(0xffffffffu, mine, i)) <= norm;  // the older first on ties
  const int before = __shfl_up_sync(0xffffffffu, mine, 1);
  if (lane < key_anchors) anchors[lane] = lane < place ? mine : lane == place ? newest : before;
}

// The newest key's composite, and its place among the anchors of its block (null: they are another's to write), for composite KV head
// `head`. Composites before it are there.
DEVICE void pool_newest(Input keys, const Shape& shape, int head, uint32_t* kc, int* anchors) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, members = shape.num_kv_heads / shape.num_composite_kv_heads;
  const int newest = shape.k_len - 1, u = newest / shape.k_compress;
  if (warp == 0) {
    float mean[8];
    pool(mean, keys, head * members, members, u * shape.k_compress, shape.k_len, nullptr);
    if (lane < LANES_PER_ROW) write_composite(mean, (int64_t)head * shape.num_k_composites + u, lane, kc, nullptr);
  } else if (anchors && shape.key_anchors) {
    for (int m = head * members + warp - 1; m < (head + 1) * members; m += SCORE_WARPS - 1)
      add_anchor(keys, m, newest, shape.key_anchors, anchors + ((int64_t)m * shape.num_k_blocks + newest / BLOCK_SIZE) * shape.key_anchors);
  }
}

// Grid: (1 + thread blocks that share the closed blocks, Hkc * row groups); thread block 0 pools the newest key and scores its block. Row
// groups of one head write the same composite; its anchors, which are read before they are written, are the first group's.
// kc [Hkc, num_k_composites, d] float16, anchors [Hkv, num_k_blocks, r]: extended by the new key. cells [Hc, pitch]: the maximum of a cell's
// logits and the sum of 2^(logit - maximum); coarse_cells: the same of coarse keys, where COARSE is not 1.
extern "C" __global__ void __launch_bounds__(32 * SCORE_WARPS, HEAD_DIM > 128 || ROW_TILES > 1 ? 2 : 3) decode_scores(
    const uint16_t* queries, const uint16_t* keys, int64_t q_head_stride, int64_t k_head_stride, int64_t k_row_stride,
    const Shape given, const int* position, uint16_t* kc, int* anchors, float2* cells, float2* coarse_cells, int64_t pitch)
{
  DYNAMIC_SHARED(shared);
  let_next_launch_start();
  const Shape shape = at_position(given, *position);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int heads = shape.num_composite_heads / shape.num_composite_kv_heads, groups = ceil_div(heads, ROWS);
  const int kv_head = blockIdx.y / groups, first_row = blockIdx.y % groups * ROWS, rows = min(ROWS, heads - first_row);
  const int first_head = kv_head * heads + first_row;
  const uint32_t q_rows = shared_address(shared);
  const int open_block = (shape.k_len - 1) / BLOCK_SIZE, per_block = BLOCK_SIZE / shape.k_compress;
  const int closed = open_block * per_block, composites = ceil_div(shape.k_len, shape.k_compress);
  const bool opens = blockIdx.x == 0;

  const uint16_t* from = kc + (int64_t)kv_head * shape.num_k_composites * HEAD_DIM;
  const int start = opens ? closed : 0, stop = opens ? composites : closed, tiles = ceil_div(stop - start, TILE);
  const int step = opens ? SCORE_WARPS : SCORE_WARPS * (gridDim.x - 1), first = opens ? warp : (blockIdx.x - 1) * SCORE_WARPS + warp;
  KeyTile k;
  const auto load = [&](int tile) {
    const int low = start + tile * TILE + g, high = low + 8;
    k.load(low < stop ? from + (int64_t)low * HEAD_DIM : nullptr, high < stop ? from + (int64_t)high * HEAD_DIM : nullptr, t);
  };
  const auto stage_queries = [&] {
    wait_for_launch_before();  // no pointer is __restrict__: reads must not move up over this
    for (int e = warp; e < ROW_TILES * KEY_PIECES; e += SCORE_WARPS) {
      const int row = e / KEY_PIECES * 8 + g, column = e % KEY_PIECES * 32 + 8 * t;
      int4 piece = make_int4(0, 0, 0, 0);
      if (row < rows && column < HEAD_DIM) piece = composite_piece(queries, q_head_stride, shape, first_head + row, column);
      store_shared(piece_of_rows(q_rows + e / KEY_PIECES * ROWS_BYTES, e % KEY_PIECES), piece);
    }
  };
  if (opens) {
    stage_queries();
    pool_newest({keys, k_head_stride, k_row_stride}, shape, kv_head, (uint32_t*)kc, first_row == 0 ? anchors : nullptr);
    __syncthreads();
    if (first < tiles) load(first);
  } else {
    if (first < tiles) load(first);  // closed blocks, and the position, are older than the launch before this one
    stage_queries();
    __syncthreads();
  }
  cells += first_head * pitch;
  if (COARSE != 1) coarse_cells += first_head * pitch;
  for (int tile = first; tile < tiles; tile += step) {
    float z[ROW_TILES][4];
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
      k.multiply(z[n], q_rows + n * ROWS_BYTES, [](float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_half(d, a, b0, b1); });
    if (tile + step < tiles) load(tile + step);
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
      const int key = start + tile * TILE;
      const int64_t row = 8 * n * pitch;
      to_logits(z[n], key, stop, shape.scale_log2);
      write_cells(z[n], key, stop, rows - 8 * n, cells + row, pitch);
      if (COARSE == 1) continue;
      to_coarse(z[n], key, shape);
      write_cells(z[n], key, stop, rows - 8 * n, coarse_cells + row, pitch);
    }
  }
}

// Step 2: each block's share of the row, to shares [visible]; maxima [visible] is used meanwhile. Every thread reads what it wrote.
DEVICE void block_shares(float* shares, float* maxima, const float2* cells, int cells_seen, int visible, float* room) {
  constexpr int CELLS_PER_BLOCK = KEYS_PER_BLOCK / CELL;
  float highest = -INFINITY_F, total = 0.f;
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) {
    float most = -INFINITY_F, sum = 0.f;
#pragma unroll
    for (int i = j * CELLS_PER_BLOCK; i < (j + 1) * CELLS_PER_BLOCK; ++i) {
      if (i >= cells_seen) continue;
      const float2 cell = cells[i];
      const float higher = fmaxf(most, cell.x), base = higher == -INFINITY_F ? 0.f : higher;
      sum = sum * exp2_fast(most - base) + cell.y * exp2_fast(cell.x - base);
      most = higher;
    }
    shares[j] = sum;
    maxima[j] = most;
    highest = fmaxf(highest, most);
  }
  highest = over_thread_block(highest, room, [](float a, float b) { return fmaxf(a, b); });
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) {
    shares[j] *= exp2_fast(maxima[j] - highest);
    total += shares[j];
  }
  total = over_thread_block(total, room, [](float a, float b) { return a + b; });
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) shares[j] /= total;
}

// Grid: Hc. cells [Hc, pitch] as decode_scores writes them, coarse_cells null where COARSE is 1 -> words [Hc, words_per_row], counts [Hc].
extern "C" __global__ void __launch_bounds__(32 * SELECT_WARPS) decode_select(
    const float2* cells, const float2* coarse_cells, int64_t pitch, const double* top_p, const float* row_threshold, const Shape given,
    const int* position, uint32_t* words, int* counts)
{
  DYNAMIC_SHARED(shared);
  let_next_launch_start();
  const Shape shape = at_position(given, *position);  // older than the launch before this one, as the rules are
  const int head = blockIdx.x, warp = threadIdx.x >> 5, lane = threadIdx.x & 31, blocks = 32 * shape.words_per_row;
  const double share = top_p ? top_p[head] : 0.0;
  const int visible = ceil_div(shape.k_len, BLOCK_SIZE), cells_seen = ceil_div(ceil_div(shape.k_len, shape.k_compress), CELL);
  float* peak = (float*)shared;  // there is one query: a block's mean and its peak are one and the same, if composites are
  float* mean = COARSE == 1 ? peak : peak + blocks;
  uint32_t* units = (uint32_t*)(mean + blocks);
  uint32_t* ties = units + blocks;
  uint32_t* bins = ties + shape.words_per_row;
  uint32_t* room = bins + BINS;
  wait_for_launch_before();
  block_shares(peak, (float*)units, cells + head * pitch, cells_seen, visible, (float*)room);
  if (COARSE != 1) block_shares(mean, (float*)units, coarse_cells + head * pitch, cells_seen, visible, (float*)room);
  uint32_t total = 0, highest = 0;
  for (int j = threadIdx.x; j < visible; j += 32 * SELECT_WARPS) {
    units[j] = as_handed_out((uint32_t)__float2int_rn(mean[j] * UNIT));
    total += units[j];
    highest = max(highest, units[j]);
  }
  total = __reduce_add_sync(0xffffffffu, total);
  highest = __reduce_max_sync(0xffffffffu, highest);
  if (lane == 0) {
    bins[warp] = total;
    bins[SELECT_WARPS + warp] = highest;
  }
  __syncthreads();
  total = __reduce_add_sync(0xffffffffu, lane < SELECT_WARPS ? bins[lane] : 0);
  highest = __reduce_max_sync(0xffffffffu, lane < SELECT_WARPS ? bins[SELECT_WARPS + lane] : 0);
  __syncthreads();
  const Row row(top_p ? units : nullptr, peak, row_threshold ? row_threshold + head : nullptr, shape, 0);
  Cut cut = {0, 0};
  if (top_p) {
    cut = cut_of_row(share, units, visible, total, highest, bins, room);
    for (int w = warp; w < shape.words_per_row; w += SELECT_WARPS) {
      const uint32_t equal = row.ties(w, cut);
      if (lane == 0) ties[w] = __popc(equal);
    }
    __syncthreads();
  }
  int count = 0;  // in the warps' first lanes
  for (int w = warp; w < shape.words_per_row; w += SELECT_WARPS) {
    uint32_t before = 0;
    for (int i = lane; top_p && i < w; i += 32) before += ties[i];
    before = __reduce_add_sync(0xffffffffu, before);
    const uint32_t word = row.word(w, {cut.threshold, cut.ties - min(cut.ties, before)});
    if (lane > 0) continue;
    words[(int64_t)head * shape.words_per_row + w] = word;
    count += __popc(word);
  }
  const float kept = over_thread_block((float)count, (float*)room, [](float a, float b) { return a + b; });
  if (threadIdx.x == 0) counts[head] = (int)kept;
}
