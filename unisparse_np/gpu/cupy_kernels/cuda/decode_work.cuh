// Who does what in decode_attention.cu: groups of query rows, the thread blocks dealt out to them, and the tiles of 16 keys that a
// thread block walks.
//
// A group is the ROWS query rows (query head, query) that one thread block can hold; most often all rows of a KV head. Tiles are dealt
// out evenly: each group gets thread blocks in proportion to its tiles, each of them an even share of the group's selected tiles
// and of its anchors. Every thread block works the deal out by itself, from the mask alone.
#pragma once
#include "shape.cuh"

#define WARPS 6  // a thread block
#define THREADS (32 * WARPS)
#define ROWS (8 * ROW_TILES)
#define TILE 16  // keys

struct Group {  // some query rows of one KV head: n = 0 .. count - 1 are rows first_row + n of its G * q_len, query heads first
  int kv_head, first_row, count, first_head, q_len;

  DEVICE Group(const Shape& shape, int index) : q_len(shape.q_len) {
    const int heads = shape.num_q_heads / shape.num_kv_heads, rows = heads * q_len, parts = ceil_div(rows, ROWS);
    kv_head = parts == 1 ? index : index / parts;
    first_row = (index - kv_head * parts) * ROWS;
    count = min(ROWS, rows - first_row);
    first_head = kv_head * heads;
  }
  // Divisions are slow, and a decode step has one query: none are needed for it.
  DEVICE int head(int n) const { return first_head + (q_len == 1 ? first_row + n : (first_row + n) / q_len); }
  DEVICE int query(int n) const { return q_len == 1 ? 0 : (first_row + n) % q_len; }
};

struct BlockMask {  // words [mask rows, pitch], a row for heads_per_row query heads; null: dense attention
  const uint32_t* words;
  int pitch, heads_per_row, visible;  // blocks

  DEVICE int row(int head) const { return heads_per_row == 1 ? head : head / heads_per_row; }
  DEVICE uint32_t word(int row, int w) const { return w < pitch ? words[(int64_t)row * pitch + w] & bits_below(w, visible) : 0; }

  // Which rows of the group selected key block `block`: bit n for row n.
  DEVICE uint32_t rows_that_selected(const Group& group, int block) const {
    uint32_t rows = 0;
#pragma unroll 4
    for (int n = 0; n < group.count; ++n) rows |= (word(row(group.head(n)), block >> 5) >> (block & 31) & 1) << n;
    return rows;
  }
  // Word w of the blocks that some row of the group selected.
  DEVICE uint32_t of_group(const Group& group, int w) const {
    const int first = row(group.head(0)), last = row(group.head(group.count - 1));
    uint32_t any = 0;
#pragma unroll 4
    for (int r = first; r <= last; ++r) any |= word(r, w);
    return any;
  }
};

// Counts the tiles of every group, [groups] in shared memory, a warp a group. fixed: tiles that a group has anyway.
DEVICE void count_tiles(int* tiles, int groups, int fixed, const BlockMask& mask, const Shape& shape) {
  const int lane = threadIdx.x & 31, words_seen = mask.words ? ceil_div(mask.visible, 32) : 0;
  for (int g = threadIdx.x >> 5; g < groups; g += WARPS) {
    int blocks = 0;
    for (int w = lane; w < words_seen; w += 32) blocks += __popc(mask.of_group(Group(shape, g), w));
    blocks = __reduce_add_sync(0xffffffffu, blocks);
    if (lane == 0) tiles[g] = fixed + blocks * (shape.block_size / TILE);
  }
  __syncthreads();
}

struct Share {  // thread block `index` of the `count` that work on a group, the first of which is thread block `first`
  int group, index, count, first;
};

// Deals out the thread blocks, a lane a group; group is -1 where nothing is left to do. Products stay below 2^32 up to 200 million keys.
DEVICE Share deal(const int* tiles, int groups) {
  const int lane = threadIdx.x & 31, place = blockIdx.x;
  uint32_t total = 0;
  for (int g = lane; g < groups; g += 32) total += tiles[g];
  total = max(1u, __reduce_add_sync(0xffffffffu, total));
  int before = 0;
  for (int g0 = 0; g0 < groups; g0 += 32) {
    const uint32_t mine = g0 + lane < groups ? tiles[g0 + lane] : 0;
    const int fair = 1 + (gridDim.x - groups) * mine / total, most = ((int)mine + WARPS - 1) / WARPS;
    const int count = g0 + lane < groups ? max(1, min(fair, most)) : 0;
    int stop = count;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, stop, step);
      if (lane >= step) stop += other;
    }
    stop += before;
    const uint32_t reached = __ballot_sync(0xffffffffu, g0 + lane < groups && place < stop);
    if (reached) {
      const int found = __ffs(reached) - 1, size = __shfl_sync(0xffffffffu, count, found), first = __shfl_sync(0xffffffffu, stop, found) - size;
      return {g0 + found, place - first, size, first};
    }
    before = __shfl_sync(0xffffffffu, stop, 31);
  }
  return {-1, 0, 0, 0};
}

struct Part {  // [start, stop) of `count` things for this share
  int start, stop;
  DEVICE Part(uint32_t count, const Share& share) : start(count * share.index / share.count), stop(count * (share.index + 1) / share.count) {}
};

// The selected blocks number first .. last (counted from 0), and which rows selected each, to list: a warp takes a word of the mask.
DEVICE void list_blocks(int2* list, int first, int last, const BlockMask& mask, const Group& group) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  int before = 0;
  for (int w0 = 0; 32 * w0 < mask.visible && before <= last; w0 += 32) {
    const uint32_t bits = mask.of_group(group, w0 + lane);
    int upto = __popc(bits);
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    for (int i = warp; i < 32; i += WARPS) {
      const uint32_t word = __shfl_sync(0xffffffffu, bits, i);
      const int stop = before + __shfl_sync(0xffffffffu, upto, i), rank = stop - __popc(word >> lane);
      const int block = 32 * (w0 + i) + lane;
      if ((word >> lane & 1) && rank >= first && rank <= last) list[rank - first] = make_int2(block, (int)mask.rows_that_selected(group, block));
    }
    before += __shfl_sync(0xffffffffu, upto, 31);
  }
}

struct Key { int position; uint32_t rows; };  // lanes l and l + 16: key l of a tile, -1 where there is none, and the rows that see it

// The tiles of one share: selected ones first, then anchors.
struct KeyWalk {
  const BlockMask& mask;
  const Group& group;
  const int* anchors;  // [Nk, r] of this KV head
  const int2* list;    // {block, rows that see it}
  Part selected, of_anchors;
  int visible_keys, key_anchors;
  int tile_bits;  // a block has 1 << tile_bits tiles

  DEVICE int count() const { return selected.stop - selected.start + of_anchors.stop - of_anchors.start; }

  DEVICE Key at(int i) const {
    const int lane = threadIdx.x & 15, tile = selected.start + i;
    if (tile >= selected.stop) return anchor((tile - selected.stop + of_anchors.start) * TILE + lane);
    Key key = {tile * TILE + lane, 0xffffffffu};
    if (mask.words) {
      const int2 entry = list[(tile >> tile_bits) - (selected.start >> tile_bits)];
      key = {((entry.x << tile_bits) + (tile & ((1 << tile_bits) - 1))) * TILE + lane, (uint32_t)entry.y};
    }
    if (key.position >= visible_keys) key.position = -1;
    return key;
  }
  DEVICE Key anchor(int n) const {  // the n-th of this KV head: seen by the rows that did not select its block
    const int block = key_anchors == 1 ? n : n / key_anchors;
    Key key = {-1, 0};
    if (block >= mask.visible) return key;
    const int position = anchors[n];
    key.rows = ~mask.rows_that_selected(group, block) & ((1u << group.count) - 1);
    if (key.rows && position < visible_keys) key.position = position;
    return key;
  }
};
