// Steps 4-5: which key blocks each query block keeps, straight into the bit mask that the attention kernels walk.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  Top-P without a sort: the smallest score that is kept is found bit by bit (at most 30 sums over the row), then ties at
//      that score are filled in index order; exactly the stable sort's prefix, whatever the order of summation
//
// One warp a row [Nk]; scores are whole numbers in units of 2^-30. Shared memory: WARPS rows of scores.
#include "shape.cuh"

#define WARPS 4

// The largest t such that the scores of at least t sum to `wanted` or more. scores: n of them, zeros up to a multiple of 32.
DEVICE uint32_t lowest_kept(const uint32_t* scores, int n, uint32_t wanted, uint32_t highest, int lane) {
  uint32_t t = 0;
  for (int bit = 31 - __clz(highest | 1); bit >= 0; --bit) {
    const uint32_t candidate = t | (1u << bit);
    uint32_t sum = 0;
    for (int i = lane; i < n; i += 32) sum += scores[i] >= candidate ? scores[i] : 0;
    if (__reduce_add_sync(0xffffffffu, sum) >= wanted) t = candidate;
  }
  return t;
}

// Grid: ceil(Hc * Nq / WARPS). mean [Hc, Nq, Nk] in units of 2^-30, peak [Hc, Nq, Nk] or null; top_p [Hc] and row_threshold [Hc],
// null where the rule is off -> words [Hc, Nq, words_per_row], counts [Hc, Nq] blocks kept.
extern "C" __global__ void __launch_bounds__(32 * WARPS) select_blocks(
    const uint32_t* __restrict__ mean, const float* __restrict__ peak, const double* __restrict__ top_p, const float* __restrict__ row_threshold,
    const Shape shape, uint32_t* __restrict__ words, int* __restrict__ counts)
{
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row = blockIdx.x * WARPS + warp;
  if (row >= shape.num_composite_heads * shape.num_q_blocks) return;
  const int head = row / shape.num_q_blocks, q_block = row % shape.num_q_blocks;
  const int visible = visible_blocks(shape, q_block);
  uint32_t* scores = (uint32_t*)shared + warp * 32 * shape.words_per_row;

  uint32_t threshold = 0, ties = 0;  // Top-P keeps what is above the threshold and this many of those equal to it
  const bool by_mass = top_p != nullptr;
  if (by_mass) {
    uint32_t total = 0, highest = 0;
    for (int j = lane; j < 32 * shape.words_per_row; j += 32) {
      // as a float32, which is what score_blocks hands out: both ways of calling agree to the bit
      const uint32_t units = j < visible ? (uint32_t)__uint2float_rn(mean[(int64_t)row * shape.num_k_blocks + j]) : 0;
      scores[j] = units;
      total += units;
      highest = max(highest, units);
    }
    total = __reduce_add_sync(0xffffffffu, total);
    highest = __reduce_max_sync(0xffffffffu, highest);
    __syncwarp();
    const double share = top_p[head];
    if (share >= 1.0) {
      ties = 0xffffffffu;  // every visible block, those of score 0 too
    } else {
      const uint32_t wanted = max(1u, (uint32_t)ceil(share * (double)total));
      threshold = lowest_kept(scores, visible, wanted, highest, lane);
      uint32_t above = 0;
      for (int i = lane; i < visible; i += 32) above += scores[i] > threshold ? scores[i] : 0;
      above = __reduce_add_sync(0xffffffffu, above);
      ties = threshold ? (wanted - above + threshold - 1) / threshold : 0;
    }
  }

  // Step 5
  const int sink_stop = min(shape.sink_blocks, visible);
  const int local_start = shape.causal ? max(0, (shape.q_offset + q_block * shape.block_size) / shape.block_size - shape.local_blocks) : visible;
  int count = 0;
  for (int w = 0; w < shape.words_per_row; ++w) {
    const int j = 32 * w + lane;
    bool keep = false;
    if (by_mass) {
      const uint32_t score = scores[j];
      const uint32_t equal = __ballot_sync(0xffffffffu, j < visible && score == threshold);
      const uint32_t before = __popc(equal & ((1u << lane) - 1));
      keep = score > threshold || (score == threshold && before < ties);
      ties -= min(ties, (uint32_t)__popc(equal));
    }
    if (row_threshold != nullptr && j < visible) keep |= peak[(int64_t)row * shape.num_k_blocks + j] > row_threshold[head];
    keep |= j < sink_stop || j >= local_start;
    const uint32_t word = __ballot_sync(0xffffffffu, keep && j < visible);
    if (lane == 0) words[(int64_t)row * shape.words_per_row + w] = word;
    count += __popc(word);
  }
  if (lane == 0) counts[row] = count;
}
