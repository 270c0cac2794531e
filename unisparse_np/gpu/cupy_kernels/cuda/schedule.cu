// The order in which the attention kernel takes its items: longest first inside sections whose keys and values fit the L2.
//
// Version ladder: 1 a sort on the host (a synchronisation); 2 this: one thread block a section, a counting sort by length.
// The order changes only the speed, never a result: every item is computed alone.
//
// Shared memory: BUCKETS counters.
#include "shape.cuh"

#define BUCKETS 1024

DEVICE int item_length(const Shape& shape, const int* counts, int head, int q_block) {  // in blocks, anchors included
  const int visible = visible_blocks(shape, q_block);
  if (counts == nullptr) return visible;
  return counts[(head / shape.heads_per_mask) * shape.num_q_blocks + q_block] + shape.key_anchors * ceil_div(visible, 128);
}

// Grid: one thread block a section of heads_per_section query heads. counts [mask rows, Nq] selected blocks (null: dense).
// work [Hq * tiles] {query head, tile of tile_rows rows}. Also zeroes the attention kernel's counter and broken count.
extern "C" __global__ void schedule(const Shape shape, const int* __restrict__ counts, int2* __restrict__ work, int tile_rows,
                                    int heads_per_section, int* __restrict__ counter, int* __restrict__ broken)
{
  DYNAMIC_SHARED(shared);
  int* buckets = (int*)shared;
  const int tiles = ceil_div(shape.q_len, tile_rows);
  const int first_head = blockIdx.x * heads_per_section, heads = min(heads_per_section, shape.num_q_heads - first_head);
  const int items = heads * tiles;
  const int longest = shape.num_k_blocks * (1 + shape.key_anchors) + 1;
  if (blockIdx.x == 0 && threadIdx.x == 0) counter[0] = broken[0] = 0;

  for (int b = threadIdx.x; b < BUCKETS; b += blockDim.x) buckets[b] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const int length = item_length(shape, counts, first_head + i / tiles, (i % tiles) * tile_rows / shape.block_size);
    atomicAdd(&buckets[BUCKETS - 1 - (int)((int64_t)length * BUCKETS / (longest + 1))], 1);
  }
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
  for (int i = threadIdx.x; i < items; i += blockDim.x) {
    const int head = first_head + i / tiles, tile = i % tiles;
    const int length = item_length(shape, counts, head, tile * tile_rows / shape.block_size);
    const int slot = atomicAdd(&buckets[BUCKETS - 1 - (int)((int64_t)length * BUCKETS / (longest + 1))], 1);
    work[first_head * tiles + slot] = make_int2(head, tile);
  }
}
