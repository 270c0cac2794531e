// Steps 2-3 for float32 composites: compressed attention, summed per block, in float32 throughout.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  two passes over the composite keys a thread block and query block: the softmax's maximum and sum first, then the shares,
//      summed per key block in a fixed order
//
// Tiles of keys hold whole key blocks where those are small; a large key block takes several tiles.
//
// Shared memory: queries [TILE_ROWS][STRIDE] float4, keys [KEYS][STRIDE] float4, shares [TILE_ROWS][SHARE_STRIDE],
// block sums [TILE_ROWS][KEYS], maximum and 1 / sum of every composite query of the block.
#include "plain.cuh"

#define KEYS (HEAD_DIM > 128 ? 32 : 64)
#define SHARE_STRIDE (KEYS + 16)
#define OWN_ROWS (TILE_ROWS / SIDE)
#define OWN_KEYS (KEYS / SIDE)
#define UNITS 1073741824.f  // scores are whole numbers of 2^-30

// What one thread block works on: a query block of one composite head.
struct Part {
  const Shape& shape;
  const float *q, *k;             // the head's composites
  int first, rows, stop;          // composite queries first .. first + rows - 1; composite keys before `stop` are visible to the last
  float4 *q_tile, *k_tile;
  int ty, tx;

  // Composite keys 0 .. n-1 are visible to composite query t; returns n.
  DEVICE int visible_to(int t) const {
    if (!shape.causal) return shape.num_k_composites;
    return (shape.q_offset + min(shape.q_len, (t + 1) * shape.q_compress) - 1) / shape.k_compress + 1;
  }
  DEVICE void load_queries(int row) {
    load_tile<TILE_ROWS>(q_tile, q, HEAD_DIM, shape.scale_log2, [&](int n) { return row + n < rows ? first + row + n : -1; });
  }
  // Logits of the loaded queries, `row` the first, and of keys `key` ..; -inf where a query may not see a key.
  DEVICE void logits(float (&s)[OWN_ROWS][OWN_KEYS], int row, int key) {
    __syncthreads();  // the tile before is used up
    load_tile<KEYS>(k_tile, k, HEAD_DIM, 1.f, [&](int n) { return key + n < stop ? key + n : -1; });
    __syncthreads();
    multiply(s, q_tile, k_tile, ty, tx);
#pragma unroll
    for (int m = 0; m < OWN_ROWS; ++m) {
      const int limit = visible_to(first + min(row + ty + SIDE * m, rows - 1));
#pragma unroll
      for (int n = 0; n < OWN_KEYS; ++n)
        if (key + tx + SIDE * n >= limit) s[m][n] = -INFINITY_F;
    }
  }
};

// Grid: (Nq, Hc). qc [Hc, Tq, d], kc [Hkc, Tk, d] float32 -> mean [Hc, Nq, Nk] in units, peak [Hc, Nq, Nk] unless null; 0 in
// blocks that are not visible.
extern "C" __global__ void __launch_bounds__(THREADS, 2) score_plain(
    const float* __restrict__ qc, const float* __restrict__ kc, const Shape shape, uint32_t* __restrict__ mean, float* __restrict__ peak)
{
  DYNAMIC_SHARED(shared);
  float4* q_tile = (float4*)shared;
  float4* k_tile = q_tile + TILE_ROWS * STRIDE;
  float* shares = (float*)(k_tile + KEYS * STRIDE);
  float* block_sums = shares + TILE_ROWS * SHARE_STRIDE;
  const int per_query_block = shape.block_size / shape.q_compress, per_key_block = shape.block_size / shape.k_compress;
  float* maxima = block_sums + TILE_ROWS * KEYS;  // [per_query_block]
  float* inverses = maxima + per_query_block;
  const int thread = threadIdx.x, q_block = blockIdx.x, head = blockIdx.y;
  const int first = q_block * per_query_block, rows = min(per_query_block, shape.num_q_composites - first);
  const int kv_head = head / (shape.num_composite_heads / shape.num_composite_kv_heads);
  Part part{shape, qc + (int64_t)head * shape.num_q_composites * HEAD_DIM, kc + (int64_t)kv_head * shape.num_k_composites * HEAD_DIM,
            first, rows, 0, q_tile, k_tile, thread / SIDE, thread % SIDE};
  part.stop = part.visible_to(first + rows - 1);
  const int ty = part.ty, tx = part.tx;

  // ---- step 2, first pass: each row's maximum and sum
  for (int row = 0; row < rows; row += TILE_ROWS) {
    __syncthreads();
    part.load_queries(row);
    float highest[OWN_ROWS], total[OWN_ROWS];  // over this thread's own keys
#pragma unroll
    for (int m = 0; m < OWN_ROWS; ++m) highest[m] = -INFINITY_F, total[m] = 0.f;
    for (int key = 0; key < part.stop; key += KEYS) {
      float s[OWN_ROWS][OWN_KEYS];
      part.logits(s, row, key);
#pragma unroll
      for (int m = 0; m < OWN_ROWS; ++m) {
        float best = highest[m];
#pragma unroll
        for (int n = 0; n < OWN_KEYS; ++n) best = fmaxf(best, s[m][n]);
        const float base = best == -INFINITY_F ? 0.f : best;
        total[m] *= exp2_fast(highest[m] - base);
#pragma unroll
        for (int n = 0; n < OWN_KEYS; ++n) total[m] += exp2_fast(s[m][n] - base);
        highest[m] = best;
      }
    }
#pragma unroll
    for (int m = 0; m < OWN_ROWS; ++m) {
      const float best = side_max(highest[m]);
      const float whole = side_sum(total[m] * (highest[m] == -INFINITY_F ? 0.f : exp2_fast(highest[m] - best)));
      const int n = row + ty + SIDE * m;
      if (tx == 0 && n < rows) maxima[n] = best, inverses[n] = 1.f / whole;
    }
  }

  // ---- second pass and step 3: shares, summed per key block; thread b owns block b of the group
  const int visible = visible_blocks(shape, q_block), group = max(1, KEYS / per_key_block);  // key blocks worked on at a time
  const int64_t out = ((int64_t)head * shape.num_q_blocks + q_block) * shape.num_k_blocks;
  for (int block = 0; block < visible; block += group) {
    float mass = 0.f, greatest = 0.f;
    const int group_stop = min(part.stop, (block + group) * per_key_block);
    for (int row = 0; row < rows; row += TILE_ROWS) {
      if (rows > TILE_ROWS || block == 0) {
        __syncthreads();
        part.load_queries(row);
      }
      for (int key = block * per_key_block; key < group_stop; key += KEYS) {
        float s[OWN_ROWS][OWN_KEYS];
        part.logits(s, row, key);
#pragma unroll
        for (int m = 0; m < OWN_ROWS; ++m) {
          const int n = min(row + ty + SIDE * m, rows - 1);
#pragma unroll
          for (int i = 0; i < OWN_KEYS; ++i) shares[(ty + SIDE * m) * SHARE_STRIDE + tx + SIDE * i] = exp2_fast(s[m][i] - maxima[n]) * inverses[n];
        }
        __syncthreads();
        for (int pair = thread; pair < TILE_ROWS * group; pair += THREADS) {
          const int n = pair / group, b = pair % group, begin = (block + b) * per_key_block;
          float sum = key > begin ? block_sums[pair] : 0.f;
          for (int u = max(key, begin); u < min(min(key + KEYS, begin + per_key_block), group_stop); ++u) sum += shares[n * SHARE_STRIDE + u - key];
          block_sums[pair] = sum;
        }
      }
      __syncthreads();
      if (thread < group) {
        for (int n = 0; n < min(TILE_ROWS, rows - row); ++n) {
          mass += block_sums[n * group + thread];
          greatest = fmaxf(greatest, block_sums[n * group + thread]);
        }
      }
      __syncthreads();
    }
    if (thread < group && block + thread < visible) {
      mean[out + block + thread] = (uint32_t)(mass / rows * UNITS + 0.5f);
      if (peak) peak[out + block + thread] = greatest;
    }
  }
  for (int block = visible + thread; block < shape.num_k_blocks; block += THREADS) {
    mean[out + block] = 0;
    if (peak) peak[out + block] = 0.f;
  }
}
