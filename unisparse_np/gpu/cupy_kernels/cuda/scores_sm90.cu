// Steps 2-3 on Hopper, in one pass: compressed attention by wgmma, kept as sums of up to 32 keys, and their merger into block scores;
// steps 4-5 too where the host asks for it.
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
// Of merge_scores (scores_sm90_merge.cuh): log-sum-exp [16], warps' maxima and sums, mean and peak [Q_BLOCKS][Nk in whole tiles], each
// where it is wanted.
#include "hopper.cuh"
#include "scores_sm90_merge.cuh"

#define CONSUMERS 4
#define ROWS (64 * CONSUMERS)
#define GROUPS_PER_LANE (GROUPS / 4)  // of a tile and query's stored sums, each lane of a quad stores its own
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
