// Step 6 for a few queries a head (a decode step has one): the keys are split over the whole GPU, dense or over selected blocks and anchors.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  a thread block serves all query heads of a KV head for its share of the keys, so that each key is read once; a warp takes 16
//      keys at a time, keys and values go from global memory straight into the operands of mma.sync (few_rows.cuh); the loads of
//      the next 16 are issued as soon as the registers of these are free
//   2  the last thread block of a group merges with all its threads at once; the first keys are asked for before the queries
//   3  no divisions before the first load; one thread's fences
//   4  the first keys of a dense step are asked for while the launch before this one ends (pointers are not __restrict__: reads must
//      not move up over the wait)
//   5  the merge keeps more loads under way; the position is read before the wait; all warps count tiles and list blocks
//
// Who does what: decode_work.cuh; how parts are merged: decode_merge.cuh. The last thread block of a group of rows to finish merges what
// all of them found, always in the same order: results are the same to the bit in every run. The number of keys may lie in device
// memory, so that a CUDA graph replays at any length.
//
// Only blocks that some row of the group selected are read. A row that did not select one gives its keys a weight of 0, and 0 * NaN is
// NaN: rows that come out not finite are computed again, key by key.
//
// Shared memory: outputs of the warps [WARPS][ROWS][HEAD_DIM], weights of the thread blocks [ROWS][gridDim.x], {max, sum}
// [WARPS][ROWS], the query rows [ROW_TILES][ROWS_BYTES], list of selected blocks [list_room] {block, rows that see it}, tiles of each group [groups].
#include "decode_merge.cuh"
#include "few_rows.cuh"
#include "one_row.cuh"

struct Rows {  // a lane's part of its group: rows 2 t and 2 t + 1 of each row tile
  int last[ROW_TILES][2];  // key position that the row sees last; -1 for a row that does not exist
  float max[ROW_TILES][2], sum[ROW_TILES][2];  // the sum is over this lane's keys
  float out[ROW_TILES][VALUE_PIECES][4][4];    // as ValueTile has it

  DEVICE Rows(const Shape& shape, const Group& group) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * n + 2 * t + e;
        last[n][e] = row < group.count ? last_visible_key(shape, group.query(row)) : -1;
        max[n][e] = -INFINITY_F;
        sum[n][e] = 0.f;
      }
#pragma unroll
      for (int i = 0; i < VALUE_PIECES; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w) out[n][i][w][0] = out[n][i][w][1] = out[n][i][w][2] = out[n][i][w][3] = 0.f;
    }
  }

  // Scores z of 16 keys become their weights; what was summed before is scaled to the new maxima.
  DEVICE void weigh(float (&z)[ROW_TILES][4], Key key, float scale_log2) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    int position[2];
    uint32_t seen_by[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      position[k] = __shfl_sync(0xffffffffu, key.position, g + 8 * k);
      seen_by[k] = __shfl_sync(0xffffffffu, key.rows, g + 8 * k);
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const bool seen = position[k] >= 0 && position[k] <= last[n][e] && (seen_by[k] >> (8 * n + 2 * t + e) & 1);
          z[n][2 * k + e] = seen ? z[n][2 * k + e] * scale_log2 : -INFINITY_F;
        }
        const float highest = fmaxf(max[n][e], max_over_keys(fmaxf(z[n][e], z[n][2 + e])));
        const float base = highest == -INFINITY_F ? 0.f : highest, shrink = exp2_fast(max[n][e] - base);
        z[n][e] = exp2_fast(z[n][e] - base);
        z[n][2 + e] = exp2_fast(z[n][2 + e] - base);
        sum[n][e] = sum[n][e] * shrink + z[n][e] + z[n][2 + e];
        max[n][e] = highest;
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; ++i)
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            out[n][i][w][e] *= shrink;
            out[n][i][w][2 + e] *= shrink;
          }
      }
  }
  DEVICE void add(const float (&weights)[ROW_TILES][4], const ValueTile& values) {
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) {
      const uint32_t pairs[2] = {transpose_pairs(pack(weights[n][0], weights[n][1])), transpose_pairs(pack(weights[n][2], weights[n][3]))};
      values.accumulate(out[n], pairs);
    }
  }
  // This warp's outputs [ROWS][HEAD_DIM] and {max, sum} [ROWS], to shared memory.
  DEVICE void write(float* outputs, float2* statistics) const {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * n + 2 * t + e;
        const float total = sum_over_keys(sum[n][e]);
        if (g == 0) statistics[row] = make_float2(max[n][e], total);
#pragma unroll
        for (int i = 0; i < VALUE_PIECES; ++i)
#pragma unroll
          for (int w = 0; w < 4; ++w) {
            const int dim = 64 * i + 8 * g + 2 * w;
            if (dim < HEAD_DIM) *(float2*)(outputs + row * HEAD_DIM + dim) = make_float2(out[n][i][w][e], out[n][i][w][2 + e]);
          }
      }
  }
};

struct Product {
  DEVICE void operator()(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const { mma(d, a, b0, b1); }
};

struct Cache {  // keys or values of one KV head
  const uint16_t* data;
  int64_t row_stride;
  DEVICE const uint16_t* row(int position) const { return position < 0 ? nullptr : data + position * row_stride; }
};

DEVICE void load_keys(KeyTile& tile, const Cache& keys, Key key) {
  const int lane = threadIdx.x & 31;
  const int low = __shfl_sync(0xffffffffu, key.position, lane >> 2), high = __shfl_sync(0xffffffffu, key.position, 8 + (lane >> 2));
  tile.load(keys.row(low), keys.row(high), lane & 3);
}

DEVICE void load_values(ValueTile& tile, const Cache& values, Key key) {
  const int lane = threadIdx.x & 31;
  const uint16_t* rows[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) rows[k] = values.row(__shfl_sync(0xffffffffu, key.position, 2 * (lane & 3) + (k & 1) + 8 * (k >> 1)));
  tile.load(rows, lane >> 2);
}

// The group's query rows to shared memory, as piece_of_rows has them; those that do not exist are zero.
DEVICE void stage_rows(uint32_t to, const uint16_t* queries, int64_t head_stride, int64_t row_stride, const Group& group) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  for (int e = warp; e < ROW_TILES * KEY_PIECES; e += WARPS) {
    const int row = e / KEY_PIECES * 8 + (lane >> 2), column = e % KEY_PIECES * 32 + 8 * (lane & 3);
    int4 piece = make_int4(0, 0, 0, 0);
    if (row < group.count && column < HEAD_DIM)
      piece = load_past_l1(queries + group.head(row) * head_stride + group.query(row) * row_stride + column);
    store_shared(piece_of_rows(to + e / KEY_PIECES * ROWS_BYTES, e % KEY_PIECES), piece);
  }
}

// Grid: as many thread blocks as the GPU holds at once. Strides in elements, last axis contiguous; output [Hq, q_len, d], lse [Hq, q_len] or null.
// position: of the first query, in device memory, the last query's key being the last (null: the shape says both). words
// [mask rows, words_per_row], null for dense attention; anchors [Hkv, num_k_blocks, r], null with key_anchors 0.
// Workspace: found [gridDim.x][ROWS][HEAD_DIM], statistics [gridDim.x][ROWS], arrived [groups], which is 0 before and after.
extern "C" __global__ void __launch_bounds__(THREADS, ROW_TILES == 1 && HEAD_DIM <= 128 ? 2 : 1) decode_attention(
    const uint16_t* queries, const uint16_t* keys, const uint16_t* values, uint16_t* output, float* lse,
    int64_t q_head_stride, int64_t q_row_stride, int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride, int64_t v_row_stride,
    const Shape given, const int* position, const uint32_t* words, const int* anchors, int list_room,
    float* found, float2* statistics, int* arrived)
{
  DYNAMIC_SHARED(shared);
  float* outputs = (float*)shared;
  const int rows_total = given.num_q_heads / given.num_kv_heads * given.q_len, groups = given.num_kv_heads * ceil_div(rows_total, ROWS);
  float* weights = outputs + WARPS * ROWS * HEAD_DIM;
  float2* warp_statistics = (float2*)(weights + ROWS * gridDim.x);
  char* row_pieces = (char*)(warp_statistics + WARPS * ROWS);
  const uint32_t q_rows = shared_address(row_pieces);
  int2* list = (int2*)(row_pieces + ROW_TILES * ROWS_BYTES);
  int* tiles_of_group = (int*)(list + list_room);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;

  let_next_launch_start();
  Shape shape = given;
  if (position) {  // older than the launch before this one
    shape.q_offset = *position;
    shape.k_len = shape.q_offset + shape.q_len;
  }
  if (words) wait_for_launch_before();
  const int visible_keys = shape.causal ? shape.q_offset + shape.q_len : shape.k_len;
  const BlockMask mask = {words, shape.words_per_row, shape.heads_per_mask, ceil_div(visible_keys, shape.block_size)};
  const int anchor_tiles = words ? ceil_div(mask.visible * shape.key_anchors, TILE) : 0, tile_bits = 31 - __clz(shape.block_size / TILE);
  count_tiles(tiles_of_group, groups, words ? anchor_tiles : ceil_div(visible_keys, TILE), mask, shape);
  const Share share = deal(tiles_of_group, groups);
  if (share.group < 0) return;
  const Group group(shape, share.group);
  const Part selected(tiles_of_group[share.group] - anchor_tiles, share);
  const int first_block = selected.start >> tile_bits, last_block = (selected.stop - 1) >> tile_bits;
  const int listed = words && selected.start < selected.stop ? last_block - first_block + 1 : 0;
  if (listed) list_blocks(list, first_block, last_block, mask, group);
  __syncthreads();

  const int* anchors_here = anchors + (int64_t)group.kv_head * shape.num_k_blocks * shape.key_anchors;
  const KeyWalk tiles = {mask, group, anchors_here, list, selected, Part(anchor_tiles, share), visible_keys, shape.key_anchors, tile_bits};
  const Cache k_cache = {keys + group.kv_head * k_head_stride, k_row_stride}, v_cache = {values + group.kv_head * v_head_stride, v_row_stride};
  const int count = tiles.count();
  KeyTile k;
  ValueTile v;
  Key next = {-1, 0};
  if (warp < count) {
    next = tiles.at(warp);
    // The launch before this one writes the newest key: older ones need not wait for it
    if (__any_sync(0xffffffffu, next.position == visible_keys - 1)) wait_for_launch_before();
    load_keys(k, k_cache, next);
    load_values(v, v_cache, next);
  }
  wait_for_launch_before();
  stage_rows(q_rows, queries, q_head_stride, q_row_stride, group);
  Rows rows(shape, group);
  __syncthreads();
  for (int i = warp; i < count; i += WARPS) {
    const Key key = next;
    const bool more = i + WARPS < count;
    float z[ROW_TILES][4];
#pragma unroll
    for (int n = 0; n < ROW_TILES; ++n) k.multiply(z[n], q_rows + n * ROWS_BYTES, Product());
    if (more) {
      next = tiles.at(i + WARPS);
      load_keys(k, k_cache, next);
    }
    rows.weigh(z, key, shape.scale_log2);
    rows.add(z, v);
    if (more) load_values(v, v_cache, next);
  }
  rows.write(outputs + warp * ROWS * HEAD_DIM, warp_statistics + warp * ROWS);
  __syncthreads();
  merge_warps(found + (int64_t)blockIdx.x * ROWS * HEAD_DIM, statistics + blockIdx.x * ROWS, outputs, warp_statistics, group.count);

  // The last of the group's thread blocks merges them all. One thread's fences speak for the thread block, which met before and meets after.
  __syncthreads();
  int* is_last = (int*)warp_statistics;
  if (threadIdx.x == 0) {
    __threadfence();
    *is_last = atomicAdd(arrived + share.group, 1) == share.count - 1;
    __threadfence();
  }
  __syncthreads();
  if (!*is_last) return;
  if (threadIdx.x == 0) arrived[share.group] = 0;
  statistics += share.first * ROWS;
  for (int row = warp; row < group.count; row += WARPS) {
    const float log_sum = weights_of_row(weights + row * gridDim.x, statistics, row, share.count);
    if (lse && lane == 0) lse[group.head(row) * shape.q_len + group.query(row)] = log_sum;
  }
  __syncthreads();
  merge_thread_blocks(outputs, found + (int64_t)share.first * ROWS * HEAD_DIM, weights, group.count, share.count);
  __syncthreads();
  for (int row = warp; row < group.count; row += WARPS) {
    const int head = group.head(row), query = group.query(row);
    uint16_t* out = output + ((int64_t)head * shape.q_len + query) * HEAD_DIM;
    if (write_row(out, outputs + row * HEAD_DIM)) continue;
    attend_one_row(queries + head * q_head_stride + query * q_row_stride, k_cache.data, v_cache.data, out, k_row_stride, v_row_stride, shape,
                   words, anchors, head, query);
  }
}
