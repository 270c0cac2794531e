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
  int kv_head, first_row, count;

  DEVICE Group(const Shape& shape, int index) {
    const int rows = shape.num_q_heads / shape.num_kv_heads * shape.q_len, parts = ceil_div(rows, ROWS);
    kv_head = index / parts;
    first_row = index % parts * ROWS;
    count = min(ROWS, rows - first_row);
  }
  DEVICE int head(const Shape& shape, int n) const { return kv_head * (shape.num_q_heads / shape.num_kv_heads) + (first_row + n) / shape.q_len; }
  DEVICE int query(const Shape& shape, int n) const { return (first_row + n) % shape.q_len; }
};

// Which rows of the group selected key block `block`: bit n for row n.
DEVICE uint32_t rows_that_selected(const uint32_t* words, const Shape& shape, const Group& group, int block, int visible) {
  uint32_t rows = 0;
#pragma unroll 4
  for (int n = 0; n < group.count; ++n) rows |= (selected_word(words, shape, group.head(shape, n), 0, block >> 5, visible) >> (block & 31) & 1) << n;
  return rows;
}

// Word w of the blocks that some row of the group selected.
DEVICE uint32_t word_of_group(const uint32_t* words, const Shape& shape, const Group& group, int w, int visible) {
  const int first = group.head(shape, 0), last = group.head(shape, group.count - 1);
  uint32_t any = 0;
#pragma unroll 4
  for (int head = first; head <= last; ++head) any |= selected_word(words, shape, head, 0, w, visible);
  return any;
}

// Counts the tiles of every group, [groups] in shared memory, by the whole thread block. fixed: tiles that a group has anyway.
DEVICE void count_tiles(int* tiles, int groups, int fixed, const uint32_t* words, const Shape& shape, int visible) {
  for (int g = threadIdx.x; g < groups; g += THREADS) tiles[g] = fixed;
  __syncthreads();
  if (words == nullptr) return;
  const int words_seen = ceil_div(visible, 32);
  for (int i = threadIdx.x; i < groups * words_seen; i += THREADS) {
    const int blocks = __popc(word_of_group(words, shape, Group(shape, i / words_seen), i % words_seen, visible));
    atomicAdd(tiles + i / words_seen, blocks * (shape.block_size / TILE));
  }
  __syncthreads();
}

struct Share {  // thread block `index` of the `count` that work on a group, the first of which is thread block `first`
  int group, index, count, first;
};

// Deals out the thread blocks; group is -1 where nothing is left to do. The products stay below 2^32 up to 200 million keys.
DEVICE Share deal(const int* tiles, int groups) {
  uint32_t total = 0;
  for (int g = 0; g < groups; ++g) total += tiles[g];
  int first = 0;
  for (int g = 0; g < groups; ++g) {
    const int fair = total ? 1 + (gridDim.x - groups) * (uint32_t)tiles[g] / total : 1;
    const int count = max(1, min(fair, ceil_div(tiles[g], WARPS)));
    if ((int)blockIdx.x < first + count) return {g, (int)blockIdx.x - first, count, first};
    first += count;
  }
  return {-1, 0, 0, 0};
}

struct Part {  // [start, stop) of `count` things for this share
  int start, stop;
  DEVICE Part(uint32_t count, const Share& share) : start(count * share.index / share.count), stop(count * (share.index + 1) / share.count) {}
};

// One warp writes the selected blocks number first .. last (counted from 0) to list.
DEVICE void list_blocks(int2* list, int first, int last, const uint32_t* words, const Shape& shape, const Group& group, int visible) {
  const int lane = threadIdx.x & 31;
  int before = 0;
  for (int w0 = 0; 32 * w0 < visible && before <= last; w0 += 32) {
    uint32_t bits = word_of_group(words, shape, group, w0 + lane, visible);
    const int here = __popc(bits);
    int rank = here;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, rank, step);
      if (lane >= step) rank += other;
    }
    const int sum = __shfl_sync(0xffffffffu, rank, 31);
    rank += before - here;
    for (; bits; bits &= bits - 1, ++rank)
      if (rank >= first && rank <= last) list[rank - first].x = 32 * (w0 + lane) + __ffs(bits) - 1;
    before += sum;
  }
}

struct Key { int position; uint32_t rows; };  // lanes l and l + 16: key l of a tile, -1 where there is none, and the rows that see it

// The tiles of one share: selected ones first, then anchors.
struct KeyWalk {
  const Shape& shape;
  const Group& group;
  const uint32_t* words;
  const int* anchors;  // [Nk, r] of this KV head
  const int2* list;  // {block, rows that see it}
  Part selected, of_anchors;
  int visible_keys, visible;

  DEVICE int count() const { return selected.stop - selected.start + of_anchors.stop - of_anchors.start; }

  DEVICE Key at(int i) const {
    const int lane = threadIdx.x & 15, tile = selected.start + i;
    if (tile >= selected.stop) return anchor((tile - selected.stop + of_anchors.start) * TILE + lane);
    Key key = {tile * TILE + lane, 0xffffffffu};
    if (words) {
      const int per_block = shape.block_size / TILE;
      const int2 entry = list[tile / per_block - selected.start / per_block];
      key = {entry.x * shape.block_size + tile % per_block * TILE + lane, (uint32_t)entry.y};
    }
    if (key.position >= visible_keys) key.position = -1;
    return key;
  }
  DEVICE Key anchor(int n) const {  // the n-th of this KV head: seen by the rows that did not select its block
    const int block = n / shape.key_anchors;
    Key key = {-1, 0};
    if (block >= visible) return key;
    key.rows = ~rows_that_selected(words, shape, group, block, visible) & ((1u << group.count) - 1);
    const int position = anchors[n];
    if (key.rows && position < visible_keys) key.position = position;
    return key;
  }
};
