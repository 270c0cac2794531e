// What an item of attend_sm80.cu visits, and how its tiles come into shared memory.
#pragma once
#include "shape.cuh"

#define BM (BLOCK_SIZE == 64 ? 64 : 128)
#define BN 64
#define WARPS (HEAD_DIM > 128 && BM == 128 ? 8 : 4)
#define THREADS (32 * WARPS)
#define PITCH (HEAD_DIM + 8)
#define ROW_BYTES (PITCH * 2)
#define TILES_PER_BLOCK (BLOCK_SIZE / BN)
#define NO_TILE 0x7fffffff

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

struct Item {  // one tile of BM query rows of one head; in shared memory, because registers are short
  const uint16_t *keys, *values, *anchor_keys, *anchor_values;  // of its KV head
  int head, kv_head, first_row, q_block, visible, num_blocks, num_entries, unused;
};

// Lists what an item visits: selected blocks, last first, then the first word of each group of BN anchors with an unselected block.
// By one warp, which also writes how many blocks and entries there are.
DEVICE void list_visits(volatile Item& item, uint16_t* list, const uint32_t* words, const Shape& shape) {
  const int lane = threadIdx.x & 31, head = item.head, q_block = item.q_block, visible = item.visible, chunks = ceil_div(visible, 1024);
  int entries = 0;
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    const int w = 32 * chunk + 31 - lane;  // the first lane has the last word
    uint32_t bits = selected_word(words, shape, head, q_block, w, visible);
    int upto = __popc(bits);
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, upto, step);
      if (lane >= step) upto += other;
    }
    for (int at = entries + upto - __popc(bits); bits; ++at) {
      const int bit = 31 - __clz(bits);
      bits &= ~(1u << bit);
      list[at] = (uint16_t)(32 * w + bit);
    }
    entries += __shfl_sync(0xffffffffu, upto, 31);
  }
  if (lane == 0) item.num_blocks = entries;
  for (int chunk = 0; shape.key_anchors && chunk < chunks; ++chunk) {
    const int w = 32 * chunk + lane;
    uint32_t any = __ballot_sync(0xffffffffu, unselected_word(words, shape, head, q_block, w, visible) != 0);
    any = (any | any >> 1) & 0x55555555u;
    if (any >> lane & 1) list[entries + __popc(any & ((1u << lane) - 1u))] = (uint16_t)w;
    entries += __popc(any);
  }
  if (lane == 0) item.num_entries = entries;
}

// Where an item is in its list. An entry is a block, of TILES_PER_BLOCK tiles, last first, or a group of anchors, of a tile for each rank.
// A tile is the position of its first key, or ~(first row of the compact anchors).
struct Walk {
  int entry, part;

  DEVICE int tile(const volatile Item& item, const uint16_t* list, const Shape& shape) const {
    if (entry >= item.num_entries) return NO_TILE;
    if (entry < item.num_blocks) return list[entry] * BLOCK_SIZE + (TILES_PER_BLOCK - 1 - part) * BN;
    return ~(part * shape.anchor_pitch + 32 * list[entry]);
  }
  DEVICE void go_on(const volatile Item& item, const Shape& shape) {
    if (++part < (entry < item.num_blocks ? TILES_PER_BLOCK : shape.key_anchors)) return;
    part = 0;
    ++entry;
  }
};
