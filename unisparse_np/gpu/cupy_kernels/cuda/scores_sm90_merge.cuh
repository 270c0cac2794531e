// Steps 2-5 on Hopper, after score_tiles (scores_sm90.cu, with the version ladder of both): from its sums of up to 32 keys and the tiles'
// maxima to the rows' log-sum-exp, the exact shares and their sums per block, and on to the selection where the host asks for it.
#pragma once
#include "composites.cuh"
#include "select_row.cuh"

#define COLUMNS 128                                        // composite keys of a tile
#define GROUP (KEYS_PER_BLOCK < 32 ? KEYS_PER_BLOCK : 32)  // keys a stored sum
#define GROUPS (COLUMNS / GROUP)                           // stored sums a tile and query
#define MERGE_THREADS 128
#define GROUPS_PER_BLOCK (KEYS_PER_BLOCK / GROUP)
#define BLOCKS_PER_TILE (COLUMNS / KEYS_PER_BLOCK)
#define QUERIES (QUERIES_PER_BLOCK < 16 ? 16 : QUERIES_PER_BLOCK)  // of a thread block
#define Q_BLOCKS (QUERIES / QUERIES_PER_BLOCK)
#define ROWS_PER_BLOCK (QUERIES_PER_BLOCK < 16 ? QUERIES_PER_BLOCK : 16)  // of 16 queries, those of one block
#if KEYS_PER_BLOCK >= 32
#define PIECE 4  // sums of a query that a thread takes at once: all there are
#else
#define PIECE 8  // or 16 bytes of them
#endif
#define PIECES (GROUPS / PIECE)          // of a tile
#define BLOCKS_PER_PIECE (PIECE / GROUPS_PER_BLOCK)

// Which group of the tile the sum at place p of a query's GROUPS is of.
DEVICE int group_at(int p) { return GROUP >= 8 ? p : 16 * (p >> 3 & 1) + 2 * (p & 7) + (p >> 4); }

struct LaneSums {  // a lane's share of a tile: half a query's sums
  float x[GROUPS / 2];
  DEVICE explicit LaneSums(const uint16_t* sums) {  // those of a tile's first query
    const uint32_t* mine = (const uint32_t*)sums + (threadIdx.x & 31) * (GROUPS / 4);
    uint32_t raw[GROUPS / 4];
    if (GROUPS == 4) {
      raw[0] = *mine;
    } else {
#pragma unroll
      for (int i = 0; i + 1 < GROUPS / 4; i += 2) {
        const uint2 pair = *(const uint2*)(mine + i);
        raw[i] = pair.x;
        raw[i + 1] = pair.y;
      }
    }
#pragma unroll
    for (int i = 0; i < GROUPS / 4; ++i) {
      x[2 * i] = from_half((uint16_t)raw[i]);
      x[2 * i + 1] = from_half((uint16_t)(raw[i] >> 16));
    }
  }
  DEVICE float total() const {
    if (GROUPS == 4) return x[0] + x[1];
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i + 3 < GROUPS / 2; i += 4) sum += (x[i] + x[i + 1]) + (x[i + 2] + x[i + 3]);
    return sum;
  }
};

// One query's PIECE stored sums times `weight`, added to its blocks' mass, and the most of any query.
DEVICE void add_shares(float (&mass)[BLOCKS_PER_PIECE], float (&most)[BLOCKS_PER_PIECE], const uint32_t (&sums)[PIECE / 2], float weight) {
#pragma unroll
  for (int b = 0; b < BLOCKS_PER_PIECE; ++b) {
    float share = 0.f;
#pragma unroll
    for (int g = b * GROUPS_PER_BLOCK; g < (b + 1) * GROUPS_PER_BLOCK; ++g) share += from_half((uint16_t)(sums[g / 2] >> 16 * (g & 1)));
    share = weight > 0.f ? share * weight : 0.f;
    mass[b] += share;
    most[b] = fmaxf(most[b], share);
  }
}

// The PIECE stored sums of two neighbouring queries, in loads of 16 bytes.
DEVICE void load_two(uint32_t (&first)[PIECE / 2], uint32_t (&second)[PIECE / 2], const uint16_t* from) {
  const int4 x = *(const int4*)from;
  first[0] = x.x; first[1] = x.y;
#if PIECE == 4
  second[0] = x.z; second[1] = x.w;
#else
  const int4 y = *(const int4*)(from + GROUPS);
  first[2] = x.z; first[3] = x.w;
  second[0] = y.x; second[1] = y.y; second[2] = y.z; second[3] = y.w;
#endif
}

// Grid: (query blocks, or sixteens of composite queries where blocks are smaller; composite heads of this launch). Reads what
// score_tiles wrote; mean [Hc, Nq, Nk] in units or null, peak [Hc, Nq, Nk] or null. with_mean, with_peak: which of the two is
// handed out or selected by.
// top_p, row_threshold, words, counts: as in select.cu, for steps 4-5 right away; words null to leave them out.
extern "C" __global__ void __launch_bounds__(MERGE_THREADS) merge_scores(
    const uint16_t* __restrict__ sums, const float* __restrict__ maxima, const Shape shape, int first_head, int with_mean, int with_peak,
    uint32_t* __restrict__ mean, float* __restrict__ peak, const double* __restrict__ top_p, const float* __restrict__ row_threshold,
    uint32_t* __restrict__ words, int* __restrict__ counts)
{
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row16 = lane >> 1, side = lane & 1;
  const int first_query = (gridDim.x - 1 - blockIdx.x) * QUERIES, exist = min(QUERIES, shape.num_q_composites - first_query);
  const int pitch = ceil_div(shape.num_k_composites, COLUMNS), blocks = (pitch * BLOCKS_PER_TILE + 3) & ~3;  // rows from 16-byte boundaries
  const int64_t head_at = (int64_t)blockIdx.y * ceil_div(shape.num_q_composites, 16);
  float* log_sums = (float*)shared;             // [16]
  float* warp_max = log_sums + 16;              // [4][16]
  float* warp_sum = warp_max + 4 * 16;          // [4][16]
  float* mean_here = warp_sum + 4 * 16;         // [Q_BLOCKS][blocks], where mean is wanted
  float* peak_here = mean_here + (with_mean ? Q_BLOCKS * blocks : 0);  // likewise

  for (int j = threadIdx.x; j < (with_mean + with_peak) * Q_BLOCKS * blocks; j += MERGE_THREADS) mean_here[j] = 0.f;
  __syncthreads();
  for (int rows = 0; rows < exist; rows += 16) {
    // these queries' own tiles: score_tiles writes no tile that none of them sees
    const int tiles = last_visible_composite(shape, first_query + min(exist, rows + 16) - 1) / COLUMNS + 1;
    const int64_t at = (head_at + (first_query + rows) / 16) * pitch;
    float highest = -INFINITY_F, sum = 0.f;
#pragma unroll 4
    for (int n = warp; n < tiles; n += MERGE_THREADS / 32) {
      const LaneSums s(sums + (at + n) * (16 * GROUPS));
      const float here = maxima[(at + n) * 16 + row16];
      const float next = fmaxf(fmaxf(highest, here), -1e30f);  // finite also where a query has seen nothing yet
      sum = sum * exp2_fast(highest - next) + s.total() * exp2_fast(here - next);
      highest = next;
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);  // both sides of a query have the same maximum
    if (side == 0) {
      warp_max[warp * 16 + row16] = highest;
      warp_sum[warp * 16 + row16] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 16) {
      float all = -INFINITY_F, total = 0.f;
      for (int w = 0; w < 4; ++w) all = fmaxf(all, warp_max[w * 16 + threadIdx.x]);
      for (int w = 0; w < 4; ++w)
        if (warp_sum[w * 16 + threadIdx.x] > 0.f) total += warp_sum[w * 16 + threadIdx.x] * exp2_fast(warp_max[w * 16 + threadIdx.x] - all);
      log_sums[threadIdx.x] = total > 0.f ? all + log2_fast(total) : INFINITY_F;  // a query that does not exist gives 0 to all
    }
    __syncthreads();
    // a thread takes PIECE neighbouring sums of a tile, query after query, and is always the same for a block: sums keep their order
    for (int i = threadIdx.x; i < tiles * PIECES; i += MERGE_THREADS) {
      const int n = i / PIECES, piece = i % PIECES;
      const uint16_t* from = sums + (at + n) * (16 * GROUPS) + piece * PIECE;
#pragma unroll
      for (int first = 0; first < 16; first += ROWS_PER_BLOCK) {
        float mass[BLOCKS_PER_PIECE] = {}, most[BLOCKS_PER_PIECE] = {};
#pragma unroll
        for (int row = first; row < first + ROWS_PER_BLOCK; row += 4) {
          const float4 highest = *(const float4*)(maxima + (at + n) * 16 + row), log_sum = *(const float4*)(log_sums + row);
          uint32_t four[4][PIECE / 2];
          load_two(four[0], four[1], from + row * GROUPS);
          load_two(four[2], four[3], from + (row + 2) * GROUPS);
          add_shares(mass, most, four[0], exp2_fast(highest.x - log_sum.x));
          add_shares(mass, most, four[1], exp2_fast(highest.y - log_sum.y));
          add_shares(mass, most, four[2], exp2_fast(highest.z - log_sum.z));
          add_shares(mass, most, four[3], exp2_fast(highest.w - log_sum.w));
        }
#pragma unroll
        for (int b = 0; b < BLOCKS_PER_PIECE; ++b) {
          const int place = piece * BLOCKS_PER_PIECE + b;
          const int block = n * BLOCKS_PER_TILE + (GROUPS_PER_BLOCK == 1 ? group_at(place) : place) + first / ROWS_PER_BLOCK * blocks;
          if (with_mean) mean_here[block] += mass[b];
          if (with_peak) peak_here[block] = fmaxf(most[b], peak_here[block]);
        }
      }
    }
    __syncthreads();
  }
  const int first_block = first_query / QUERIES_PER_BLOCK, head = first_head + blockIdx.y;
  uint32_t* scores = (uint32_t*)mean_here;  // in the same place, from now on
  for (int i = 0; i < Q_BLOCKS && first_block + i < shape.num_q_blocks; ++i) {
    const int q_block = first_block + i;
    const int queries = min(QUERIES_PER_BLOCK, shape.num_q_composites - q_block * QUERIES_PER_BLOCK);
    const int64_t out_at = ((int64_t)head * shape.num_q_blocks + q_block) * shape.num_k_blocks;
    const int visible = visible_blocks(shape, q_block);
    for (int j = threadIdx.x; j < visible; j += MERGE_THREADS) {
      if (peak) peak[out_at + j] = peak_here[i * blocks + j];
      if (!with_mean) continue;
      const uint32_t units = (uint32_t)__float2int_rn(mean_here[i * blocks + j] * (UNIT / queries));
      if (mean) mean[out_at + j] = units;
      scores[i * blocks + j] = as_handed_out(units);
    }
  }
  if (words == nullptr) return;
  __syncthreads();
  for (int i = warp; i < Q_BLOCKS && first_block + i < shape.num_q_blocks; i += MERGE_THREADS / 32) {
    WarpTeam team;
    const int q_block = first_block + i;
    const int64_t row = (int64_t)head * shape.num_q_blocks + q_block;
    Cut cut = {0, 0};
    if (top_p) cut = cut_at(top_p[head], scores + i * blocks, visible_blocks(shape, q_block), team);
    const int count = select_row(top_p ? scores + i * blocks : nullptr, cut, row_threshold ? peak_here + i * blocks : nullptr,
                                 row_threshold ? row_threshold + head : nullptr, shape, q_block, words + row * shape.words_per_row);
    if (lane == 0) counts[row] = count;
  }
}
