// Steps 2-3: compressed attention and its sums per block, fused; no score ever leaves the registers.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  two passes over the composite keys: the first finds each composite query's log-sum-exp, the second multiplies again and
//      sums the exact shares per block. mma.sync in float16 with float32 accumulators; 32 composite queries a warp, their
//      fragments in registers, 256 a thread block, so that keys are read from the L2 once for 256 queries
//   2  in the first pass every lane keeps a softmax of its own columns; lanes meet once, at the end
//
// Scores are whole numbers, in units of 2^-30 of a query block's mass: their sums do not depend on the order, so that results
// are the same to the bit in every run and for every chunking.
//
// Shared memory: Q [ROWS][PITCH] (only at the start), then the same room as two stages of K [COLUMNS][PITCH].
// QUERIES_PER_BLOCK = S / c_q composite queries and KEYS_PER_BLOCK = S / c_k composite keys make a block (powers of two).
#include "composites.cuh"

#define WARPS 8
#define ROWS (32 * WARPS)
#define COLUMNS 64
#define STEP 32  // columns between two looks at the accumulators
#define THREADS (32 * WARPS)
#define PITCH (HEAD_DIM + 8)
#define ROW_BYTES (PITCH * 2)
#define TILE_BYTES (COLUMNS * ROW_BYTES)
#define Q_BYTES (ROWS * ROW_BYTES)
#define SHARED_BYTES (Q_BYTES > 2 * TILE_BYTES ? Q_BYTES : 2 * TILE_BYTES)

#define BLOCKS_PER_STEP (KEYS_PER_BLOCK >= STEP ? 1 : STEP / KEYS_PER_BLOCK)
#define STEPS_PER_BLOCK (KEYS_PER_BLOCK <= STEP ? 1 : KEYS_PER_BLOCK / STEP)

template <int COUNT> DEVICE void load_composites(uint32_t to, const uint16_t* from, int first, int length) {  // zeros past the end
  constexpr int CHUNKS = HEAD_DIM / 8;
  for (int e = threadIdx.x; e < COUNT * CHUNKS; e += THREADS) {
    const int r = e / CHUNKS, chunk = e % CHUNKS;
    const bool exists = first + r < length;
    copy_async(to + r * ROW_BYTES + chunk * 16, from + (int64_t)(exists ? first + r : 0) * HEAD_DIM + chunk * 8, exists);
  }
}

struct Queries {  // a warp's 32 composite queries as left operands, two m16 tiles
  uint32_t a[2][HEAD_DIM / 16][4];

  // z [32 x STEP] = queries * keys [first .. first + STEP) of the tile
  DEVICE void multiply(float (&z)[2][STEP / 8][4], uint32_t k_tile, int first) const {
    const int lane = threadIdx.x & 31, matrix = lane >> 3;
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < STEP / 8; ++j) z[m][j][0] = z[m][j][1] = z[m][j][2] = z[m][j][3] = 0.f;
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step) {
#pragma unroll
      for (int n = 0; n < STEP / 16; ++n) {
        uint32_t b[4];
        load_matrix(b, k_tile + (first + n * 16 + (matrix >> 1) * 8 + (lane & 7)) * ROW_BYTES + (2 * step + (matrix & 1)) * 16);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma_half(z[m][2 * n], a[m][step], b[0], b[1]);
          mma_half(z[m][2 * n + 1], a[m][step], b[2], b[3]);
        }
      }
    }
  }
};

DEVICE void hide(float (&z)[2][STEP / 8][4], const int (&last)[2][2], int first, int lane) {
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int j = 0; j < STEP / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (first + 8 * j + (lane & 3) * 2 + (i & 1) > last[m][i >> 1]) z[m][j][i] = -INFINITY_F;
}

// Calls look(z, first column) for every STEP of columns that some query of this warp sees; scores not visible are -inf.
template <class Look> DEVICE void for_each_step(const Queries& queries, const uint16_t* kc, const Shape& shape, uint32_t tiles, int last_of_block,
                                                int last_of_warp, int least_of_warp, const int (&last)[2][2], Look look) {
  const int lane = threadIdx.x & 31, count = last_of_block / COLUMNS + 1;
  load_composites<COLUMNS>(tiles, kc, 0, shape.num_k_composites);
  copy_commit();
  for (int t = 0; t < count; ++t) {
    copy_wait<0>();
    __syncthreads();
    if (t + 1 < count) load_composites<COLUMNS>(tiles + ((t + 1) & 1) * TILE_BYTES, kc, (t + 1) * COLUMNS, shape.num_k_composites);
    copy_commit();
#pragma unroll 1
    for (int first = 0; first < COLUMNS; first += STEP) {
      const int column = t * COLUMNS + first;
      if (column > last_of_warp) break;
      float z[2][STEP / 8][4];
      queries.multiply(z, tiles + (t & 1) * TILE_BYTES, first);
      if (column + STEP - 1 > least_of_warp) hide(z, last, column, lane);
      look(z, column);
    }
  }
  __syncthreads();
}

struct LaneSoftmax {  // of one query, over the columns of one lane
  float max, sum;
  DEVICE void merge(float other_max, float other_sum) {
    const float highest = fmaxf(max, other_max);
    const float base = highest == -INFINITY_F ? 0.f : highest;
    sum = sum * exp2_fast(max - base) + other_sum * exp2_fast(other_max - base);
    max = highest;
  }
};

// Sums (or maxima) that end in single lanes. fold() adds over the lanes whose index differs in `bit`.
DEVICE float fold_sum(float x, int bit) { return x + __shfl_xor_sync(0xffffffffu, x, bit); }
DEVICE float fold_max(float x, int bit) { return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, bit)); }

// Where a warp's block sums go.
struct Sums {
  uint32_t* mean;  // [Nq, Nk] of this head, or null
  float* peak;     // likewise
  int first_query, lane;
  const Shape& shape;

  // share[m][half][g]: mass that this lane's columns of key block g give row (16 m + 8 half + lane / 4); first_block: g = 0.
  template <int G> DEVICE void add(const float (&share)[2][2][G], int first_block) const {
    constexpr int SUMMED_LANES = KEYS_PER_BLOCK >= 8 ? 4 : KEYS_PER_BLOCK >= 4 ? 2 : 1;  // of the quad, that share a key block
    constexpr int ROW_LANES = QUERIES_PER_BLOCK >= 8 ? 8 : QUERIES_PER_BLOCK;            // of the eight, that share a query block
    constexpr int HALVES = QUERIES_PER_BLOCK >= 16 ? 1 : 2, TILES = QUERIES_PER_BLOCK >= 32 ? 1 : 2;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        const int query = first_query + 16 * tile + 8 * half + (lane >> 2), q_block = query / QUERIES_PER_BLOCK;
        const int exist = min(QUERIES_PER_BLOCK, shape.num_q_composites - q_block * QUERIES_PER_BLOCK);
#pragma unroll
        for (int g = 0; g < G; ++g) {
          float sum = share[tile][half][g], most = 0.f;
          if (HALVES == 1) sum += share[tile][1][g];
          if (TILES == 1) sum += share[1][0][g] + share[1][1][g];
#pragma unroll
          for (int bit = 1; bit < SUMMED_LANES; bit *= 2) sum = fold_sum(sum, bit);
#pragma unroll
          for (int bit = 1; bit < ROW_LANES; bit *= 2) sum = fold_sum(sum, 4 * bit);
          if (peak) {
#pragma unroll
            for (int m = tile; m < (TILES == 1 ? 2 : tile + 1); ++m)
#pragma unroll
              for (int h = half; h < (HALVES == 1 ? 2 : half + 1); ++h) {
                float row = share[m][h][g];
#pragma unroll
                for (int bit = 1; bit < SUMMED_LANES; bit *= 2) row = fold_sum(row, bit);
                most = fmaxf(most, row);
              }
#pragma unroll
            for (int bit = 1; bit < ROW_LANES; bit *= 2) most = fold_max(most, 4 * bit);
          }
          const int k_block = first_block + g_offset<G>(g);
          const bool writes = (lane & 3) % SUMMED_LANES == 0 && (lane >> 2) % ROW_LANES == 0;
          if (!writes || exist <= 0 || k_block >= shape.num_k_blocks) continue;
          const int64_t at = (int64_t)q_block * shape.num_k_blocks + k_block;
          const uint32_t units = (uint32_t)__float2int_rn(sum * (UNIT / exist));
          if (QUERIES_PER_BLOCK > 32) {
            if (mean) atomicAdd(mean + at, units);
            if (peak) atomicMax((int*)peak + at, __float_as_int(most));  // not negative: floats order as integers
          } else {
            if (mean) mean[at] = units;
            if (peak) peak[at] = most;
          }
        }
      }
  }
  // Key blocks of one column group: with fewer than 8 keys a block, the lanes of a quad hold different blocks.
  template <int G> DEVICE int g_offset(int g) const {
    if (KEYS_PER_BLOCK >= 8) return g;
    if (KEYS_PER_BLOCK == 4) return 2 * g + ((lane & 3) >> 1);
    if (KEYS_PER_BLOCK == 2) return 4 * g + (lane & 3);
    return 8 * (g >> 1) + 2 * (lane & 3) + (g & 1);
  }
};

// Grid: (ceil(Tq / ROWS), Hc). qc [Hc, Tq, d], kc [Hkc, Tk, d] (heads any stride apart) float16 -> mean [Hc, Nq, Nk] in units of 2^-30, peak [Hc, Nq, Nk]
// float32, either null. With QUERIES_PER_BLOCK > 32 both must hold 0 before. Blocks that are not visible are left as they are or 0.
extern "C" __global__ void __launch_bounds__(THREADS, 1) score_blocks(
    const uint16_t* __restrict__ qc, const uint16_t* __restrict__ kc, int64_t kc_head_stride, const Shape shape, uint32_t* __restrict__ mean,
    float* __restrict__ peak)
{
  DYNAMIC_SHARED(shared);
  const uint32_t tiles = shared_address(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, head = blockIdx.y;
  const int row_tile = gridDim.x - 1 - blockIdx.x;  // the longest first
  const int first_row = row_tile * ROWS, first_query = first_row + warp * 32;
  const int kc_head = head / (shape.num_composite_heads / shape.num_composite_kv_heads);
  kc += kc_head * kc_head_stride;

  load_composites<ROWS>(tiles, qc + (int64_t)head * shape.num_q_composites * HEAD_DIM, first_row, shape.num_q_composites);
  copy_commit();
  copy_wait<0>();
  __syncthreads();
  Queries queries;
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int step = 0; step < HEAD_DIM / 16; ++step)
      load_matrix(queries.a[m][step], tiles + (warp * 32 + 16 * m + (lane & 15)) * ROW_BYTES + (2 * step + (lane >> 4)) * 16);
  __syncthreads();

  int last[2][2];  // composite key that each of this lane's four queries sees last
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) last[m][half] = last_visible_composite(shape, first_query + 16 * m + 8 * half + (lane >> 2));
  const int last_of_block = last_visible_composite(shape, min(first_row + ROWS, shape.num_q_composites) - 1);
  const int last_of_warp = last_visible_composite(shape, min(first_query + 32, shape.num_q_composites) - 1);
  const int least_of_warp = first_query + 32 <= shape.num_q_composites ? last_visible_composite(shape, first_query) : -1;
  const int warp_stop = first_query < shape.num_q_composites ? last_of_warp : -1;
  const float c = shape.scale_log2;

  LaneSoftmax soft[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m) soft[m][0] = soft[m][1] = {-INFINITY_F, 0.f};
  for_each_step(queries, kc, shape, tiles, last_of_block, warp_stop, least_of_warp, last, [&](float (&z)[2][STEP / 8][4], int) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float highest = z[m][0][2 * half];
#pragma unroll
        for (int j = 0; j < STEP / 8; ++j) highest = fmaxf(highest, fmaxf(z[m][j][2 * half], z[m][j][2 * half + 1]));
        highest = fmaxf(soft[m][half].max, highest * c);
        const float base = highest == -INFINITY_F ? 0.f : highest;
        float sum = soft[m][half].sum * exp2_fast(soft[m][half].max - base), sum2 = 0.f;
#pragma unroll
        for (int j = 0; j < STEP / 8; ++j) {
          sum += exp2_fast(fmaf(z[m][j][2 * half], c, -base));
          sum2 += exp2_fast(fmaf(z[m][j][2 * half + 1], c, -base));
        }
        soft[m][half] = {highest, sum + sum2};
      }
  });
  float log_sum[2][2];
#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      LaneSoftmax& s = soft[m][half];
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2) s.merge(__shfl_xor_sync(0xffffffffu, s.max, bit), __shfl_xor_sync(0xffffffffu, s.sum, bit));
      log_sum[m][half] = s.sum > 0.f ? s.max + log2_fast(s.sum) : INFINITY_F;  // a query that does not exist gives 0 to all
    }

  const int64_t head_at = (int64_t)head * shape.num_q_blocks * shape.num_k_blocks;
  const Sums sums = {mean ? mean + head_at : nullptr, peak ? peak + head_at : nullptr, first_query, lane, shape};
  constexpr int GROUPS = KEYS_PER_BLOCK >= 8 ? BLOCKS_PER_STEP : KEYS_PER_BLOCK >= 2 ? STEP / 8 : STEP / 4;
  float share[2][2][GROUPS];
  const auto clear = [&] {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int g = 0; g < GROUPS; ++g) share[m][0][g] = share[m][1][g] = 0.f;
  };
  clear();
  for_each_step(queries, kc, shape, tiles, last_of_block, warp_stop, least_of_warp, last, [&](float (&z)[2][STEP / 8][4], int column) {
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int j = 0; j < STEP / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int g = KEYS_PER_BLOCK >= 8 ? j * GROUPS / (STEP / 8) : KEYS_PER_BLOCK >= 2 ? j : 2 * j + (i & 1);
          share[m][i >> 1][g] += exp2_fast(fmaf(z[m][j][i], c, -log_sum[m][i >> 1]));
        }
    const bool complete = STEPS_PER_BLOCK == 1 || (column / STEP + 1) % STEPS_PER_BLOCK == 0 || column + STEP > warp_stop;
    if (complete) {
      sums.add(share, column / KEYS_PER_BLOCK);
      clear();
    }
  });
}
