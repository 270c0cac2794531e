// The producer of attend_sm90.cu: one warp a team walks the block masks of its items and has TMA fetch what the consumers need.
#pragma once
#include "attend_sm90_layout.cuh"

// A tile's record: a word a part {first key of the part, or ~(first row of the compact anchors), or NO_KEYS}; in the fourth word a bit
// for each part that needs a mask; then, for a part of anchors, two words of unselected blocks.
// Lane p of the producer's warp looks after part p; the last lane keeps the number drawn for the item after the next.
struct Producer {
  uint32_t base, barriers, tiles;
  const Shape& shape;
  int lane;
  int part, previous;  // this lane's part of the tile being filled, and of the tile whose values come next
  int filled, sent;    // parts of the tile being filled, tiles of the item whose keys were sent
  int values_head;     // the KV head of the values that come next; -1: none are due
  Ring k, v;

  // The parts that hold keys come; what else lies in the buffer is hidden, and not multiplied by its values.
  DEVICE void copy(uint32_t to, uint32_t barrier, const TensorMap* blocks, const TensorMap* anchors, int part, int kv_head) {
    const bool holds_keys = (thread_again() & 31) < PARTS && part != NO_KEYS;
    const int parts = __popc(__ballot_sync(0xffffffffu, holds_keys));
    if (lane == 0) barrier_arrive_expecting(barrier, parts * (PART * PANELS * 128));
    if (holds_keys) {
#pragma unroll
      for (int panel = 0; panel < PANELS; ++panel)
        tma_load_columns(to + panel * (BN * 128) + (thread_again() & 31) * (PART * 128), part < 0 ? anchors : blocks, barrier, 64 * panel,
                         part < 0 ? ~part : part, kv_head, L2_EVICT_LAST);
    }
  }
  DEVICE void load_values(const TensorMap* blocks, const TensorMap* anchors) {
    barrier_wait(V_EMPTY(v.stage), v.parity);
    copy(base + V_AT + v.stage * KV_BYTES, V_FULL(v.stage), blocks, anchors, previous, values_head);
    v.advance();
  }
  template <class Unselected> DEVICE void load_keys(const TensorMap* blocks, const TensorMap* anchors, Unselected unselected) {
    const uint32_t item = tiles + RECORD_BYTES * STAGES;  // the record of the one under way
    if (lane >= filled && lane < PARTS) part = NO_KEYS;
    const int first_row_sees = last_visible_key(shape, load_shared(item + 4) * BM);
    const uint32_t masked = __ballot_sync(0xffffffffu, lane < PARTS && (part < 0 || part + PART - 1 > first_row_sees));
    barrier_wait(K_EMPTY(k.stage), k.parity);
    const uint32_t record = tiles + RECORD_BYTES * k.stage;
    if (masked) {  // the lane that announces the tile writes all of its record
      uint32_t words[2] = {0, 0};
      if (lane < PARTS && part < 0) {
        words[0] = unselected(~part, 0);
        words[1] = unselected(~part, 1);
      }
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        const uint32_t of_part = __shfl_sync(0xffffffffu, (uint32_t)part, p);
        const uint32_t word0 = __shfl_sync(0xffffffffu, words[0], p), word1 = __shfl_sync(0xffffffffu, words[1], p);
        if (lane > 0) continue;
        store_shared(record + 4 * p, of_part);
        store_shared(record + 16 + 8 * p, word0);
        store_shared(record + 20 + 8 * p, word1);
      }
    }
    if (lane == 0) store_shared(record + 12, masked);
    copy(base + K_AT + k.stage * KV_BYTES, K_FULL(k.stage), blocks, anchors, part, load_shared(item + 8));
    k.advance();
    filled = 0;
  }
};

// Serves items until none is left: of each, Q for every consumer, and its tiles of keys and values.
DEVICE void produce(const Inputs& in, const Shape& shape, const Team& where, int team, int lane, int* counter) {
  const uint32_t base = where.base, barriers = where.barriers, items = where.items, tiles = where.tiles;
  Producer p = {base, barriers, tiles, shape, lane, NO_KEYS, NO_KEYS, 0, 0, -1, {0, 1}, {0, 1}};
  uint32_t q_parity = 1;
  const int chunks = ceil_div(shape.words_per_row, 32);
  // Three items are under way: this one, the next (its mask is being read) and the one after (its number is being drawn).
  // {head, tile or -1: none, KV head, row of the block mask} of this item and of the next, and this one's words of the mask: there are
  // 24 registers
  const uint32_t under_way = tiles + RECORD_BYTES * STAGES, next_item = under_way + 16, first_words = under_way + 32;
  const auto word_of = [&](uint32_t at, int w) {  // word w of the blocks whose keys the item wants
    const uint32_t bits = bits_below(w, visible_blocks(shape, load_shared(at + 4) * BM / BLOCK_SIZE));
    if (in.words == nullptr || bits == 0) return bits;
    return in.words[(int64_t)load_shared(at + 12) * shape.words_per_row + w] & bits;
  };
  const auto put = [&](uint32_t at, int number) {
    const int2 x = number < in.num_items ? in.work[number] : make_int2(0, -1);
    const int kv_head = x.x * shape.num_kv_heads / shape.num_q_heads;
    const int mask_row = x.x / shape.heads_per_mask * shape.num_q_blocks + max(x.y, 0) * BM / BLOCK_SIZE;
    if (lane == 0) store_shared(at, make_int4(x.x, x.y, kv_head, mask_row));
    __syncwarp();
  };
  put(under_way, team * gridDim.x + blockIdx.x);
  store_shared(first_words + 4 * lane, word_of(under_way, lane));  // of this item
  uint32_t next_word = 0;
  if (lane == 31) p.part = atomicAdd(counter, 1);
  put(next_item, __shfl_sync(0xffffffffu, p.part, 31) + grid_again() * TEAMS);
  while (load_shared(under_way + 4) >= 0) {
    const auto stop_again = [&] {  // parts from here on no row of this item sees: they are left out (of the last block of 128 or 256)
      return shape.causal ? min(shape.k_len, shape.q_offset + min(shape.q_len, load_shared(under_way + 4) * BM + BM)) : shape.k_len;
    };
    const auto word_at = [&](int w) { return w < 32 ? (uint32_t)load_shared(first_words + 4 * w) : word_of(under_way, w); };
    const auto mask_word = [&](int chunk, int rank) {  // blocks whose keys are wanted, or (rank >= 0) whose anchors are
      const uint32_t selected = word_at(32 * chunk + lane);
      if (rank < 0) return selected;
      return bits_below(32 * chunk + lane, visible_blocks(shape, load_shared(under_way + 4) * BM / BLOCK_SIZE)) & ~selected;
    };
    int num_parts = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const uint32_t selected = mask_word(chunk, -1);
      int n = __popc(selected) * PARTS_PER_BLOCK;
      if (PARTS_PER_BLOCK > 1) {
        const int stop = stop_again();
        for (int b = stop / BLOCK_SIZE; b < stop / BLOCK_SIZE + 2; ++b)
          if (b / 32 == 32 * chunk + lane && (selected >> (b & 31) & 1)) n -= PARTS_PER_BLOCK - ceil_div(max(stop - b * BLOCK_SIZE, 0), PART);
      }
      num_parts += __reduce_add_sync(0xffffffffu, n);
      if (shape.key_anchors) {
        const uint32_t any = __ballot_sync(0xffffffffu, mask_word(chunk, 0) != 0);
        num_parts += shape.key_anchors * __popc((any | any >> 1) & 0x55555555u);
      }
    }
    p.sent = 0;
    const auto load_q = [&] {
      const int head = load_shared(under_way);
      for (int i = 0; i < CONSUMERS; ++i) {
        const int row = load_shared(under_way + 4) * BM + 64 * i;
        barrier_wait(Q_EMPTY(i), q_parity);
        if (lane == 0) {
          const int of_last = num_parts ? (num_parts + PARTS - 1) % PARTS + 1 : 0;
          store_shared(items + 16 * i, make_int4(head, row, max(ceil_div(num_parts, PARTS), 1), of_last));
          barrier_arrive_expecting(Q_FULL(i), Q_BYTES);
#pragma unroll
          for (int panel = 0; panel < PANELS; ++panel)
            tma_load_columns(base + Q_AT + i * Q_BYTES + panel * (64 * 128), in.queries, Q_FULL(i), 64 * panel, row, head, L2_EVICT_FIRST);
        }
      }
      q_parity ^= 1;
      const int copy = thread_again() & 31;  // of the next item's Q into the L2, while this one runs
      if (copy < CONSUMERS * PANELS && load_shared(next_item + 4) >= 0)
        tma_prefetch_columns(in.queries, 64 * (copy % PANELS), load_shared(next_item + 4) * BM + 64 * (copy / PANELS), load_shared(next_item));
      next_word = word_of(next_item, lane);
      if (lane == 31) p.part = atomicAdd(counter, 1);
    };
    // The keys of a tile, then the values of the one before, which may be another item's: the order in which they are used.
    const auto send = [&] {
      p.load_keys(in.keys, in.anchor_keys, [&](int anchor, int i) {
        const int w = anchor % shape.anchor_pitch / 32 + i;
        return bits_below(w, visible_blocks(shape, load_shared(under_way + 4) * BM / BLOCK_SIZE)) & ~word_of(under_way, w);
      });
      if (p.values_head >= 0) p.load_values(in.values, in.anchor_values);
      if (p.sent++ == 0) load_q();
      p.previous = p.part;
      p.values_head = load_shared(under_way + 8);
    };
#pragma unroll 1
    for (int rank = -1; rank < shape.key_anchors; ++rank) {
#pragma unroll 1
      for (int chunk = chunks - 1; chunk >= 0; --chunk) {
        const uint32_t mine = mask_word(chunk, rank);
        uint32_t todo = __ballot_sync(0xffffffffu, mine != 0);
        if (rank >= 0) todo = (todo | todo >> 1) & 0x55555555u;
#pragma unroll 1
        while (todo) {
          const int w = 31 - __clz(todo);
          todo &= ~(1u << w);
          uint32_t bits = rank < 0 ? word_at(32 * chunk + w) : 1u;
#pragma unroll 1
          while (bits) {
            const int bit = 31 - __clz(bits);
            bits &= ~(1u << bit);
            const int block = 32 * (32 * chunk + w) + bit;
#pragma unroll 1
            for (int i = rank < 0 ? PARTS_PER_BLOCK - 1 : 0; i >= 0; --i) {
              const int key = block * BLOCK_SIZE + i * PART;
              if (PARTS_PER_BLOCK > 1 && rank < 0 && key >= stop_again()) continue;
              if (lane == p.filled) p.part = rank < 0 ? key : ~(rank * shape.anchor_pitch + block);
              if (++p.filled == PARTS) send();
            }
          }
        }
      }
    }
    if (p.filled || p.sent == 0) send();  // an item with nothing to attend to has a tile of nothing
    __syncwarp();  // all have read what is overwritten now
    store_shared(first_words + 4 * lane, next_word);
    if (lane == 0) store_shared(under_way, load_shared4(next_item));
    __syncwarp();
    put(next_item, __shfl_sync(0xffffffffu, p.part, 31) + grid_again() * TEAMS);
  }
  if (p.values_head >= 0) p.load_values(in.values, in.anchor_values);
  for (int i = 0; i < CONSUMERS; ++i) {
    barrier_wait(Q_EMPTY(i), q_parity);
    if (lane == 0) {
      store_shared(items + 16 * i, make_int4(0, 0, -1, 0));  // the end
      barrier_arrive(Q_FULL(i));
    }
  }
}
