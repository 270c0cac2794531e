// Before step 6: what the attention kernels need when they start, in one launch: the order in which they take their items, longest first
// inside sections whose keys and values fit the L2, and the anchor keys and values side by side.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  a sort on the host (a synchronisation)
//   2  one thread block a section, a counting sort by length; the anchors in a launch of their own
//   3  both in one launch: they do not depend on each other, and the host pays for each launch
//   4  lengths are read BATCH at a time, and no 64-bit division for each item
//
// The order changes only the speed, never a result: every item is computed alone.
//
// Shared memory: BUCKETS counters.
#include "shape.cuh"

#define BUCKET_BITS 10
#define BUCKETS (1 << BUCKET_BITS)
#define BATCH 4
#define THREADS 1024

DEVICE int item_length(const Shape& shape, const int* counts, int head, int q_block) {  // in blocks, anchors included
  if (counts == nullptr) return visible_blocks(shape, q_block);
  const int selected = counts[(head / shape.heads_per_mask) * shape.num_q_blocks + q_block];
  return shape.key_anchors ? selected + shape.key_anchors * ceil_div(visible_blocks(shape, q_block), 128) : selected;
}

// Calls visit(bucket, head, tile) for the items of heads first .. last - 1, each by one thread. The lengths of BATCH items are read
// together, and nothing is divided that can be counted: a thread block has thousands of items.
template <class Visit>
DEVICE void for_each_item(const Shape& shape, const int* counts, int tile_rows, int first, int last, Visit visit) {
  const int tiles = ceil_div(shape.q_len, tile_rows), tiles_per_block = shape.block_size / tile_rows;
  const int longest = shape.num_k_blocks * (1 + shape.key_anchors) + 1;
  const int coarser = max(0, 32 - __clz(longest) - BUCKET_BITS);
  const int more_heads = THREADS / tiles, more_tiles = THREADS % tiles;
  int head = first + (int)threadIdx.x / tiles, tile = (int)threadIdx.x % tiles;
  while (head < last) {
    int heads_of[BATCH], tiles_of[BATCH], lengths[BATCH];
#pragma unroll
    for (int n = 0; n < BATCH; ++n) {
      heads_of[n] = head;
      tiles_of[n] = tile;
      lengths[n] = item_length(shape, counts, min(head, last - 1), tile / tiles_per_block);
      head += more_heads;
      tile += more_tiles;
      if (tile >= tiles) { tile -= tiles; ++head; }
    }
#pragma unroll
    for (int n = 0; n < BATCH; ++n)
      if (heads_of[n] < last) visit(BUCKETS - 1 - (lengths[n] >> coarser), heads_of[n], tiles_of[n]);
  }
}

// Work of one section of heads_per_section query heads: counts [mask rows, Nq] selected blocks (null: dense) -> work [Hq * tiles]
// {query head, tile of tile_rows rows}.
DEVICE void schedule(const Shape& shape, int section, const int* counts, int2* work, int tile_rows, int heads_per_section) {
  DYNAMIC_SHARED(shared);
  int* buckets = (int*)shared;
  const int first = section * heads_per_section, last = min(first + heads_per_section, shape.num_q_heads);
  work += first * ceil_div(shape.q_len, tile_rows);

  for (int b = threadIdx.x; b < BUCKETS; b += THREADS) buckets[b] = 0;
  __syncthreads();
  for_each_item(shape, counts, tile_rows, first, last, [&](int bucket, int, int) { atomicAdd(&buckets[bucket], 1); });
  __syncthreads();
  if (threadIdx.x < 32) {  // running sum, 32 buckets a lane
    int sum = 0;
    for (int b = 0; b < BUCKETS / 32; ++b) sum += buckets[threadIdx.x * (BUCKETS / 32) + b];
    int before = sum;
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, before, step);
      if ((int)threadIdx.x >= step) before += other;
    }
    before -= sum;
    for (int b = 0; b < BUCKETS / 32; ++b) {
      const int n = buckets[threadIdx.x * (BUCKETS / 32) + b];
      buckets[threadIdx.x * (BUCKETS / 32) + b] = before;
      before += n;
    }
  }
  __syncthreads();
  for_each_item(shape, counts, tile_rows, first, last,
                [&](int bucket, int head, int tile) { work[atomicAdd(&buckets[bucket], 1)] = make_int2(head, tile); });
}

// Step 6: element `i` (of 8 numbers) of the anchor keys and values side by side, [Hkv, r, anchor_pitch, d], so that 128 of them make a
// tile. Places without a key are zero. anchors [Hkv, Nk, r]: positions.
DEVICE void gather_anchor(const Shape& shape, int64_t i, const uint16_t* k, const uint16_t* v, int64_t k_head_stride, int64_t k_row_stride,
                          int64_t v_head_stride, int64_t v_row_stride, const int* anchors, int4* anchor_keys, int4* anchor_values) {
  constexpr int CHUNKS = HEAD_DIM / 8;
  const int rows = shape.key_anchors * shape.anchor_pitch;
  const int row = (int)(i / CHUNKS), chunk = (int)(i % CHUNKS), head = row / rows;
  if (head >= shape.num_kv_heads) return;
  const int rank = row % rows / shape.anchor_pitch, block = row % shape.anchor_pitch;
  int4 key = make_int4(0, 0, 0, 0), value = key;
  const int position = block < shape.num_k_blocks ? anchors[((int64_t)head * shape.num_k_blocks + block) * shape.key_anchors + rank] : -1;
  if (position >= 0) {
    key = *(const int4*)(k + head * k_head_stride + position * k_row_stride + chunk * 8);
    value = *(const int4*)(v + head * v_head_stride + position * v_row_stride + chunk * 8);
  }
  anchor_keys[i] = key;
  anchor_values[i] = value;
}

// Grid: `sections` thread blocks for the order, then enough threads for the anchors (null: none). Also zeroes the attention kernel's
// counter and broken count.
extern "C" __global__ void __launch_bounds__(THREADS) prepare(
    const Shape shape, int sections, const int* __restrict__ counts, int2* __restrict__ work, int tile_rows, int heads_per_section,
    int* __restrict__ counter, int* __restrict__ broken, const uint16_t* __restrict__ k, const uint16_t* __restrict__ v,
    int64_t k_head_stride, int64_t k_row_stride, int64_t v_head_stride, int64_t v_row_stride, const int* __restrict__ anchors,
    int4* __restrict__ anchor_keys, int4* __restrict__ anchor_values)
{
  if (blockIdx.x == 0 && threadIdx.x == 0) counter[0] = broken[0] = 0;
  if (blockIdx.x < sections)
    schedule(shape, blockIdx.x, counts, work, tile_rows, heads_per_section);
  else
    gather_anchor(shape, (int64_t)(blockIdx.x - sections) * THREADS + threadIdx.x, k, v, k_head_stride, k_row_stride, v_head_stride,
                  v_row_stride, anchors, anchor_keys, anchor_values);
}
