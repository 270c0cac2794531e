// Steps 4-5 for one row of block scores, by one warp: which key blocks a query block keeps.
#pragma once
#include "shape.cuh"

// A score in units of 2^-30 as it comes back from float32, which is what score_blocks hands out: both ways of calling agree to the bit.
DEVICE uint32_t as_handed_out(uint32_t units) { return (uint32_t)__uint2float_rn(units); }

// The largest t such that the scores of at least t sum to `wanted` or more. scores: from a 16-byte boundary.
DEVICE uint32_t lowest_kept(const uint32_t* scores, int n, uint32_t wanted, uint32_t highest, int lane) {
  const int whole = n & ~127;
  uint32_t t = 0;
  for (int bit = 31 - __clz(highest | 1); bit >= 0; --bit) {
    const uint32_t candidate = t | (1u << bit);
    uint32_t sum = 0;
    for (int i = 4 * lane; i < whole; i += 128) {
      const int4 four = *(const int4*)(scores + i);
      const uint32_t a = four.x, b = four.y, c = four.z, d = four.w;
      sum += ((a >= candidate ? a : 0) + (b >= candidate ? b : 0)) + ((c >= candidate ? c : 0) + (d >= candidate ? d : 0));
    }
    for (int i = whole + lane; i < n; i += 32) sum += scores[i] >= candidate ? scores[i] : 0;
    if (__reduce_add_sync(0xffffffffu, sum) >= wanted) t = candidate;
  }
  return t;
}

struct Cut {  // Top-P keeps what is above the threshold and, in index order, this many of those equal to it
  uint32_t threshold, ties;
};

// Step 4, Top-P: `share` of the sum of the `visible` scores in shared memory.
DEVICE Cut cut_at(double share, const uint32_t* scores, int visible, int lane) {
  if (share >= 1.0) return {0, 0xffffffffu};  // every visible block, those of score 0 too
  uint32_t total = 0, highest = 0, above = 0;
  for (int i = lane; i < visible; i += 32) {
    total += scores[i];
    highest = max(highest, scores[i]);
  }
  total = __reduce_add_sync(0xffffffffu, total);
  highest = __reduce_max_sync(0xffffffffu, highest);
  const uint32_t wanted = max(1u, (uint32_t)ceil(share * (double)total));
  const uint32_t threshold = lowest_kept(scores, visible, wanted, highest, lane);
  for (int i = lane; i < visible; i += 32) above += scores[i] > threshold ? scores[i] : 0;
  above = __reduce_add_sync(0xffffffffu, above);
  return {threshold, threshold ? (wanted - above + threshold - 1) / threshold : 0};
}

// Steps 4-5: writes words [words_per_row] of query block q_block and returns how many blocks it keeps. scores: in shared memory, read if
// top_p; peak [visible]: read if row_threshold. Both rules are pointers to their share, or null where the rule is off.
DEVICE int select_row(const uint32_t* scores, const float* peak, const double* top_p, const float* row_threshold, const Shape& shape, int q_block,
                      uint32_t* words) {
  const int lane = threadIdx.x & 31, visible = visible_blocks(shape, q_block);
  Cut cut = {0, 0};
  if (top_p) cut = cut_at(*top_p, scores, visible, lane);
  const int sink_stop = min(shape.sink_blocks, visible);
  const int local_start = shape.causal ? max(0, (shape.q_offset + q_block * shape.block_size) / shape.block_size - shape.local_blocks) : visible;
  int count = 0;
  for (int w = 0; w < shape.words_per_row; ++w) {
    const int j = 32 * w + lane;
    bool keep = j < sink_stop || j >= local_start;
    if (top_p) {
      const uint32_t score = j < visible ? scores[j] : 0;
      const uint32_t equal = __ballot_sync(0xffffffffu, j < visible && score == cut.threshold);
      const uint32_t before = __popc(equal & ((1u << lane) - 1));
      keep |= score > cut.threshold || (score == cut.threshold && before < cut.ties);
      cut.ties -= min(cut.ties, (uint32_t)__popc(equal));
    }
    if (row_threshold && j < visible) keep |= peak[j] > *row_threshold;
    const uint32_t word = __ballot_sync(0xffffffffu, keep && j < visible);
    if (lane == 0) words[w] = word;
    count += __popc(word);
  }
  return count;
}
