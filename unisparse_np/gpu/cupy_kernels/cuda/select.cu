// Steps 4-5: which key blocks each query block keeps, straight into the bit mask that the attention kernels walk.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  Top-P without a sort: the smallest score that is kept is found bit by bit (at most 30 sums over the row), then ties at
//      that score are filled in index order; exactly the stable sort's prefix, whatever the order of summation
//   2  four scores a load; the search ends where one score is left between its bounds, after about half of the bits
//   3  on Hopper, for few or small blocks, no kernel of its own: merge_scores (scores_sm90.cu) ends with steps 4-5
//   4  peaks of four words at a time under way, where each word had waited for its own
//
// One warp a row [Nk]; scores are whole numbers in units of 2^-30. Shared memory: a row of scores for each warp.
#include "select_row.cuh"

#define MAX_WARPS 4

// Grid: ceil(Hc * Nq / warps of a thread block). mean [Hc, Nq, Nk] in units of 2^-30, peak [Hc, Nq, Nk] or null; top_p [Hc] and
// row_threshold [Hc], null where the rule is off -> words [Hc, Nq, words_per_row], counts [Hc, Nq] blocks kept.
extern "C" __global__ void __launch_bounds__(32 * MAX_WARPS) select_blocks(
    const uint32_t* __restrict__ mean, const float* __restrict__ peak, const double* __restrict__ top_p, const float* __restrict__ row_threshold,
    const Shape shape, uint32_t* __restrict__ words, int* __restrict__ counts)
{
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + warp;
  if (row >= shape.num_composite_heads * shape.num_q_blocks) return;
  const int head = row / shape.num_q_blocks, q_block = row % shape.num_q_blocks;
  const int64_t first = (int64_t)row * shape.num_k_blocks;
  uint32_t* scores = top_p ? (uint32_t*)shared + warp * 32 * shape.words_per_row : nullptr;
  Cut cut = {0, 0};
  if (scores) {
    WarpTeam team;
    const int visible = visible_blocks(shape, q_block);
#pragma unroll 8
    for (int j = lane; j < visible; j += 32) scores[j] = as_handed_out(mean[first + j]);
    __syncwarp();
    cut = cut_at(top_p[head], scores, visible, team);
  }
  const int count = select_row(scores, cut, peak ? peak + first : nullptr, row_threshold ? row_threshold + head : nullptr, shape, q_block,
                               words + (int64_t)row * shape.words_per_row);
  if (lane == 0) counts[row] = count;
}
