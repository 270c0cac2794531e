// Steps 2-3 on Hopper, in one pass: compressed attention by wgmma, kept as sums of up to 32 keys, and their merger into block scores.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  scores.cu: two passes of mma.sync; the products and the exponentials are done twice
//   2  this: one pass. A tile of 64 queries x 128 keys is exponentiated against its own row maximum, so that tiles depend on
//      nothing; what leaves is, for each query, 8 sums of 16 keys (float16) and the maximum: 1/13 of the scores' bytes.
//      merge_scores then knows every maximum, forms the log-sum-exp and the exact shares, and adds them up per block.
//      Four warpgroups a thread block overlap each other's products and exponentials: both units are busy about as long.
//   3  blocks of 4 and 8 composites too: a stored sum is then a block, and a thread block merges several query blocks
//   4  merge_scores goes on to steps 4-5 where the host asks for it (few blocks, or blocks of 4): no score reaches global memory
//   5  sums of 32 keys where a block has as many, and only those of mean and peak that a rule reads
//   6  in its second look at the sums merge_scores has a thread go through the queries of a tile, instead of lanes that meet by shuffles
//   7  score_tiles takes the longest rows of all heads first, so that the last thread blocks are short ones
//
// For QUERIES_PER_BLOCK >= 4 and KEYS_PER_BLOCK 4 to 64; scores.cu does the rest.
// A stored sum lies between 2^-24 and GROUP of its tile's largest term: float16 keeps 11 bits of it, and what it flushes to 0 is
// under 1e-7 of the row. Rows are normalised by the stored sums, so that they still sum to 1.
//
// Shared memory of score_tiles, from a 1024-byte boundary (swizzled tiles [HEAD_DIM/64][rows][64]):
//   Q [ROWS], K_STAGES x K [COLUMNS], barriers.
// Of merge_scores: log-sum-exp [16], warps' maxima and sums, mean and peak [Q_BLOCKS][Nk in whole tiles], each where it is wanted.
#include "composites.cuh"
#include "hopper.cuh"
#include "select_row.cuh"

#define CONSUMERS 4
#define ROWS (64 * CONSUMERS)
#define COLUMNS 128
#define GROUP (KEYS_PER_BLOCK < 32 ? KEYS_PER_BLOCK : 32)  // keys a stored sum
#define GROUPS (COLUMNS / GROUP)                           // stored sums a tile and query
#define GROUPS_PER_LANE (GROUPS / 4)                       // of those, each lane of a quad stores its own
#define K_STAGES 4
#define THREADS (128 * (CONSUMERS + 1))
#define Q_BYTES (ROWS * HEAD_DIM * 2)
#define K_BYTES (COLUMNS * HEAD_DIM * 2)
#define K_AT Q_BYTES
#define BARRIERS_AT (K_AT + K_STAGES * K_BYTES)
#define SHARED_BYTES (BARRIERS_AT + 128 + 1024)
#define Q_FULL (barriers)
#define K_FULL(i) (barriers + 8 + 8 * (i))
#define K_EMPTY(i) (barriers + 8 + 8 * (K_STAGES + (i)))

// N values a lane, summed over the two lanes whose index differs in `bit`: the upper one ends with the upper half of the sums.
template <int N> DEVICE void sum_pair(float (&half)[N / 2], const float (&x)[N], int bit, bool upper) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) {
    const float keep = upper ? x[i + N / 2] : x[i], give = upper ? x[i] : x[i + N / 2];
    half[i] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
  }
}

// The sums that lane t of a quad stores at places GROUPS_PER_LANE * t .. of its query's: parts[j] is the lane's share of the tile's
// columns 8 j .. 8 j + 7, of which it holds two.
DEVICE void sum_groups(float (&sums)[GROUPS_PER_LANE], const float (&parts)[16], int t) {
#if GROUP == 32
  float fours[4], half[2];
#pragma unroll
  for (int g = 0; g < 4; ++g) fours[g] = (parts[4 * g] + parts[4 * g + 1]) + (parts[4 * g + 2] + parts[4 * g + 3]);
  sum_pair(half, fours, 2, t & 2);
  sum_pair(sums, half, 1, t & 1);
#elif GROUP == 16
  float pairs[8], half[4];
#pragma unroll
  for (int g = 0; g < 8; ++g) pairs[g] = parts[2 * g] + parts[2 * g + 1];
  sum_pair(half, pairs, 2, t & 2);
  sum_pair(sums, half, 1, t & 1);
#elif GROUP == 8
  float half[8];
  sum_pair(half, parts, 2, t & 2);
  sum_pair(sums, half, 1, t & 1);
#else
  sum_pair(sums, parts, 1, t & 1);
#endif
}
// Which group of the tile the sum at place p of a query's GROUPS is of.
DEVICE int group_at(int p) { return GROUP >= 8 ? p : 16 * (p >> 3 & 1) + 2 * (p & 7) + (p >> 4); }

// One tile of scores: the lane's sums for the thread's two rows, and the rows' maxima in units of log2.
DEVICE void exponentiate(const float (&s)[COLUMNS / 2], float c, int t, float (&sums)[2][GROUPS_PER_LANE], float (&highest)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float x = fmaxf(s[2 * half], s[2 * half + 1]), y = fmaxf(s[4 + 2 * half], s[5 + 2 * half]);
#pragma unroll
    for (int j = 2; j < COLUMNS / 8; j += 2) {
      x = fmaxf(x, fmaxf(s[4 * j + 2 * half], s[4 * j + 1 + 2 * half]));
      y = fmaxf(y, fmaxf(s[4 * j + 4 + 2 * half], s[4 * j + 5 + 2 * half]));
    }
    highest[half] = quad_max(fmaxf(x, y)) * c;
    const float base = highest[half] == -INFINITY_F ? 0.f : highest[half];  // a row that sees nothing of this tile
    float parts[COLUMNS / 8];
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; ++j)
      parts[j] = exp2_fast(fmaf(s[4 * j + 2 * half], c, -base)) + exp2_fast(fmaf(s[4 * j + 1 + 2 * half], c, -base));
    sum_groups(sums[half], parts, t);
  }
}

// A lane's sums of one query as float16, in one store.
DEVICE void store_sums(uint16_t* to, const float (&sums)[GROUPS_PER_LANE]) {
#if GROUP == 32
  *to = (uint16_t)pack_half(sums[0], 0.f);
#elif GROUP == 16
  *(uint32_t*)to = pack_half(sums[0], sums[1]);
#elif GROUP == 8
  *(int2*)to = make_int2(pack_half(sums[0], sums[1]), pack_half(sums[2], sums[3]));
#else
  *(int4*)to = make_int4(pack_half(sums[0], sums[1]), pack_half(sums[2], sums[3]), pack_half(sums[4], sums[5]), pack_half(sums[6], sums[7]));
#endif
}

// Grid: (composite heads of this launch, ceil(Tq / ROWS)): the longest rows of all heads come first. queries, keys: maps over qc [Hc, Tq, d], kc [Hkc, Tk, d] float16.
// sums [heads, ceil(Tq / 16), tiles, 16, GROUPS] float16, maxima [heads, ceil(Tq / 16), tiles, 16]; only visible tiles are written.
extern "C" __global__ void __launch_bounds__(THREADS, 1) score_tiles(
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, const Shape shape, int first_head,
    uint16_t* __restrict__ sums, float* __restrict__ maxima)
{
  DYNAMIC_SHARED(shared);
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  const uint32_t barriers = base + BARRIERS_AT;
  const int thread = threadIdx.x, lane = thread & 31;
  const int warpgroup = __shfl_sync(0xffffffffu, thread >> 7, 0);
  const int first_row = (gridDim.y - 1 - blockIdx.y) * ROWS;
  const int head = first_head + blockIdx.x;
  const int last_of_block = last_visible_composite(shape, min(first_row + ROWS, shape.num_q_composites) - 1);
  const int tiles = last_of_block / COLUMNS + 1;

  if (thread == 0) {
    barrier_init(Q_FULL, 1);
    for (int i = 0; i < K_STAGES; ++i) { barrier_init(K_FULL(i), 1); barrier_init(K_EMPTY(i), 4 * CONSUMERS); }
    barrier_init_fence();
  }
  __syncthreads();
  int stage = 0;
  uint32_t parity = 0;
  const auto advance = [&] { if (++stage == K_STAGES) { stage = 0; parity ^= 1; } };

  if (warpgroup == 0) {
    registers_release<32>();
    if (thread == 0) {
      const int kc_head = head / (shape.num_composite_heads / shape.num_composite_kv_heads);
      barrier_arrive_expecting(Q_FULL, Q_BYTES);
      tma_load(base, &queries, Q_FULL, first_row, head, L2_EVICT_FIRST);
      for (int n = 0; n < tiles; ++n) {
        barrier_wait(K_EMPTY(stage), parity ^ 1);
        barrier_arrive_expecting(K_FULL(stage), K_BYTES);
        tma_load(base + K_AT + stage * K_BYTES, &keys, K_FULL(stage), n * COLUMNS, kc_head, L2_EVICT_LAST);
        advance();
      }
    }
  } else {
    registers_acquire<112>();
    const int wg_row = first_row + 64 * (warpgroup - 1);
    const int row16 = lane >> 2, t = lane & 3;
    const int group16 = wg_row / 16 + ((thread & 127) >> 5);  // the warp's 16 queries
    const int last0 = last_visible_composite(shape, 16 * group16 + row16), last1 = last_visible_composite(shape, 16 * group16 + row16 + 8);
    const int least = wg_row + 64 <= shape.num_q_composites ? last_visible_composite(shape, wg_row) : -1;
    const int stop = wg_row < shape.num_q_composites ? last_visible_composite(shape, min(wg_row + 64, shape.num_q_composites) - 1) : -1;
    const bool exists = 16 * group16 < shape.num_q_composites;
    const int pitch = ceil_div(shape.num_k_composites, COLUMNS);
    const int64_t at = ((int64_t)blockIdx.x * ceil_div(shape.num_q_composites, 16) + group16) * pitch;
    const uint64_t q_tile = tile_descriptor(base + (warpgroup - 1) * (64 * 128), 16);
    const float c = shape.scale_log2;
    barrier_wait(Q_FULL, 0);
#pragma unroll 1
    for (int n = 0; n < tiles; ++n) {
      barrier_wait(K_FULL(stage), parity);
      if (n * COLUMNS <= stop) {
        float s[COLUMNS / 2];
        const uint64_t k_tile = tile_descriptor(base + K_AT + stage * K_BYTES, 16);
        pin(s);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < HEAD_DIM / 16; ++step) {
          const int panel = step >> 2, column = (step & 3) * 2;
          wgmma_shared_half(s, q_tile + panel * (ROWS * 128 / 16) + column, k_tile + panel * (COLUMNS * 128 / 16) + column, step > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(s);
        if (lane == 0) barrier_arrive(K_EMPTY(stage));
        if (n * COLUMNS + COLUMNS - 1 > least) {
          const int d0 = last0 - n * COLUMNS - 2 * t, d1 = last1 - n * COLUMNS - 2 * t;
#pragma unroll
          for (int j = 0; j < COLUMNS / 8; ++j) {
            if (8 * j > d0) s[4 * j] = -INFINITY_F;
            if (8 * j + 1 > d0) s[4 * j + 1] = -INFINITY_F;
            if (8 * j > d1) s[4 * j + 2] = -INFINITY_F;
            if (8 * j + 1 > d1) s[4 * j + 3] = -INFINITY_F;
          }
        }
        float sum[2][GROUPS_PER_LANE];
        float highest[2];
        exponentiate(s, c, t, sum, highest);
        if (exists) {
          uint16_t* tile_sums = sums + (at + n) * (16 * GROUPS);
          store_sums(tile_sums + row16 * GROUPS + t * GROUPS_PER_LANE, sum[0]);
          store_sums(tile_sums + (row16 + 8) * GROUPS + t * GROUPS_PER_LANE, sum[1]);
          if (t < 2) maxima[(at + n) * 16 + row16 + 8 * t] = t ? highest[1] : highest[0];
        }
      } else if (lane == 0) {
        barrier_arrive(K_EMPTY(stage));
      }
      advance();
    }
  }
}

// ------------------------------------------------------------------------------------------------ merger
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
