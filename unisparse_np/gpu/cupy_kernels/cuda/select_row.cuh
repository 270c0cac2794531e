// Steps 4-5 for one row of block scores: which key blocks a query block keeps.
#pragma once
#include "shape.cuh"

// A score in units of 2^-30 as it comes back from float32, which is what score_blocks hands out: both ways of calling agree to the bit.
DEVICE uint32_t as_handed_out(uint32_t units) { return (uint32_t)__uint2float_rn(units); }

// Who works on a row: threads that each take every `step`-th score from `first` on and share their sums and maxima.
struct WarpTeam {
  int first, step;
  DEVICE WarpTeam() : first(threadIdx.x & 31), step(32) {}
  DEVICE uint32_t sum(uint32_t x) { return __reduce_add_sync(0xffffffffu, x); }
  DEVICE uint32_t max(uint32_t x) { return __reduce_max_sync(0xffffffffu, x); }
};

// The sum of the scores of at least `least`: n of them, in shared memory from a 16-byte boundary.
template <class Team> DEVICE uint32_t sum_from(const uint32_t* scores, int n, uint32_t least, Team& team) {
  uint32_t sum = 0;
  for (int i = 4 * team.first; i + 3 < n; i += 4 * team.step) {
    const int4 four = *(const int4*)(scores + i);
    const uint32_t a = four.x, b = four.y, c = four.z, d = four.w;
    sum += ((a >= least ? a : 0) + (b >= least ? b : 0)) + ((c >= least ? c : 0) + (d >= least ? d : 0));
  }
  for (int i = (n & ~3) + team.first; i < n; i += team.step) sum += scores[i] >= least ? scores[i] : 0;
  return team.sum(sum);
}

// The largest t such that the scores of at least t sum to `wanted` or more; total: the sum of all. t is found bit by bit, until what
// lies between it and the last value that was too large can only be one score: that is the answer.
template <class Team> DEVICE uint32_t lowest_kept(const uint32_t* scores, int n, uint32_t wanted, uint32_t total, uint32_t highest, Team& team) {
  uint32_t t = 0, from_t = total, too_large = 0;  // sums from t on, and from the smallest candidate that was too large
  for (int bit = 31 - __clz(highest | 1); bit >= 0; --bit) {
    const uint32_t candidate = t | (1u << bit), sum = sum_from(scores, n, candidate, team);
    if (sum >= wanted) {
      t = candidate;
      from_t = sum;
    } else {
      too_large = sum;
    }
    if (t && from_t - too_large < 2 * t) return from_t - too_large;
  }
  return t;
}

struct Cut {  // Top-P keeps what is above the threshold and, in index order, this many of those equal to it
  uint32_t threshold, ties;
};

// Step 4, Top-P: `share` of the sum of the `visible` scores in shared memory.
template <class Team> DEVICE Cut cut_at(double share, const uint32_t* scores, int visible, Team& team) {
  if (share >= 1.0) return {0, 0xffffffffu};  // every visible block, those of score 0 too
  uint32_t total = 0, highest = 0;
  for (int i = team.first; i < visible; i += team.step) {
    total += scores[i];
    highest = max(highest, scores[i]);
  }
  total = team.sum(total);
  highest = team.max(highest);
  const uint32_t wanted = max(1u, (uint32_t)ceil(share * (double)total));
  const uint32_t threshold = lowest_kept(scores, visible, wanted, total, highest, team);
  const uint32_t above = sum_from(scores, visible, threshold + 1, team);
  return {threshold, threshold ? (wanted - above + threshold - 1) / threshold : 0};
}

struct Row {  // one query block's part of steps 4-5
  const uint32_t* scores;      // [visible] in shared memory, null where Top-P is off
  const float* peak;           // [visible]
  const float* row_threshold;  // null where that rule is off
  int visible, sink_stop, local_start;

  DEVICE Row(const uint32_t* scores, const float* peak, const float* row_threshold, const Shape& shape, int q_block)
      : scores(scores), peak(peak), row_threshold(row_threshold), visible(visible_blocks(shape, q_block)) {
    sink_stop = min(shape.sink_blocks, visible);
    local_start = shape.causal ? max(0, (shape.q_offset + q_block * shape.block_size) / shape.block_size - shape.local_blocks) : visible;
  }
  // Which of the blocks 32 w .. 32 w + 31 have the threshold's score, a bit each.
  DEVICE uint32_t ties(int w, Cut cut) const {
    const int j = 32 * w + (threadIdx.x & 31);
    return __ballot_sync(0xffffffffu, j < visible && scores[j] == cut.threshold);
  }
  // Whether the row threshold keeps the lane's block of them.
  DEVICE bool above_threshold(int w) const {
    const int j = 32 * w + (threadIdx.x & 31);
    return row_threshold && j < visible && peak[j] > *row_threshold;
  }
  // Which of them are kept, by one warp; ties: how many of those with the threshold's score; above: see above_threshold.
  DEVICE uint32_t word(int w, Cut cut, bool above) const {
    const int lane = threadIdx.x & 31, j = 32 * w + lane;
    bool keep = above || j < sink_stop || j >= local_start;
    if (scores) {
      const uint32_t score = j < visible ? scores[j] : 0, before = __popc(ties(w, cut) & ((1u << lane) - 1));
      keep |= score > cut.threshold || (score == cut.threshold && before < cut.ties);
    }
    return __ballot_sync(0xffffffffu, keep && j < visible);
  }
  DEVICE uint32_t word(int w, Cut cut) const { return word(w, cut, above_threshold(w)); }
};

// Steps 4-5, by one warp: writes words [words_per_row] of query block q_block and returns how many blocks it keeps. scores: in shared
// memory, null where Top-P is off; peak [visible] and row_threshold: null where that rule is off.
DEVICE int select_row(const uint32_t* scores, Cut cut, const float* peak, const float* row_threshold, const Shape& shape, int q_block,
                      uint32_t* words) {
  const Row row(scores, peak, row_threshold, shape, q_block);
  int count = 0;
  constexpr int AT_ONCE = 4;  // words whose peaks are under way together
  for (int first = 0; first < shape.words_per_row; first += AT_ONCE) {
    bool above[AT_ONCE];
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) above[n] = row.above_threshold(first + n);
#pragma unroll
    for (int n = 0; n < AT_ONCE; ++n) {
      const int w = first + n;
      if (w >= shape.words_per_row) break;
      const uint32_t word = row.word(w, cut, above[n]);
      if (scores) cut.ties -= min(cut.ties, (uint32_t)__popc(row.ties(w, cut)));
      if ((threadIdx.x & 31) == 0) words[w] = word;
      count += __popc(word);
    }
  }
  return count;
}
