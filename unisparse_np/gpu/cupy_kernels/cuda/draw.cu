// Drawing a token from the weights of the whole vocabulary without sorting it: steps 3 to 6 of model/sampling.py.
//
// Weights are whole numbers, the largest 2^43: sums of them are exact in 64 bits and do not depend on the order of the threads. The
// same question is asked three times: walking down from the largest weight, tokens of equal weight by their ids, where does a sum
// reach a number? Of tokens for top-k, of weights for top-p and for the draw itself. It is answered 11 bits of the weight at a time, by a
// histogram. Most tokens weigh next to nothing and would all meet in bin 0: that one is what the sum of all leaves.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  CuPy's sort of the vocabulary and a dozen of its functions
//   2  this kernel, one thread block
//
// Shared memory: a histogram [BINS], then WARPS numbers and 3 results, 8 bytes each.
#include "ptx.cuh"

#define THREADS 1024
#define WARPS (THREADS / 32)
#define BITS 11
#define BINS (1 << BITS)
#define LEVELS 4  // of BITS: a weight has 44 bits
#define A_THREAD (BINS / THREADS)

struct Place {  // in a walk down: among the tokens of this weight, and the sum over all heavier ones
  uint64_t weight, above;
};

DEVICE uint64_t joined(uint32_t high, uint32_t low) { return (uint64_t)high << 32 | low; }
DEVICE uint64_t of_partner(uint64_t x, int step) {  // lane ^ step
  return joined(__shfl_xor_sync(0xffffffffu, (uint32_t)(x >> 32), step), __shfl_xor_sync(0xffffffffu, (uint32_t)x, step));
}
DEVICE uint64_t of_lane_before(uint64_t x, int step) {  // lane - step, or this lane where there is none
  return joined(__shfl_up_sync(0xffffffffu, (uint32_t)(x >> 32), step), __shfl_up_sync(0xffffffffu, (uint32_t)x, step));
}

struct Walker {
  const uint64_t* weights;
  int vocab;
  uint64_t *bins, *of_warps, *results;

  DEVICE uint64_t warp_sum(uint64_t x) const {
#pragma unroll
    for (int step = 16; step; step >>= 1) x += of_partner(x, step);
    return x;
  }
  DEVICE uint64_t sum(uint64_t x) const {  // over the thread block
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = x;
    __syncthreads();
    return warp_sum(of_warps[threadIdx.x & 31]);
  }
  // What lies before this thread's x, thread after thread.
  DEVICE uint64_t sum_before(uint64_t x) const {
    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
    uint64_t upto = x;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint64_t other = of_lane_before(upto, step);
      if (lane >= step) upto += other;
    }
    __syncthreads();
    if (lane == 31) of_warps[warp] = upto;
    __syncthreads();
    return warp_sum(lane < warp ? of_warps[lane] : 0) + upto - x;
  }
  template <class Amount> DEVICE uint64_t total(Amount amount) const {
    uint64_t all = 0;
#pragma unroll 8
    for (int i = threadIdx.x; i < vocab; i += THREADS) all += amount(weights[i]);
    return sum(all);
  }
  // The largest weight from which on the amounts sum to `wanted`; weight 0, with all above it, if they never do.
  template <class Amount> DEVICE Place walk_down(uint64_t wanted, Amount amount) const {
    uint64_t prefix = 0, above = 0, inside = total(amount);  // `inside`: of all weights that begin with prefix
    if (inside < wanted) return {0, inside};
    for (int level = LEVELS - 1; level >= 0; --level) {
      const int shift = level * BITS;
      for (int b = threadIdx.x; b < BINS; b += THREADS) bins[b] = 0;
      __syncthreads();
#pragma unroll 8
      for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const uint64_t weight = weights[i], bin = weight >> shift & (BINS - 1);
        if (weight >> shift >> BITS == prefix && bin) atomicAdd(bins + bin, amount(weight));
      }
      __syncthreads();
      // Bins are dealt out from the highest down, A_THREAD neighbours a thread; the last thread has bin 0 last
      uint64_t here[A_THREAD], mine = 0;
#pragma unroll
      for (int n = 0; n < A_THREAD; ++n) mine += here[n] = bins[BINS - 1 - (A_THREAD * threadIdx.x + n)];
      uint64_t before = above + sum_before(mine);
      if (threadIdx.x == THREADS - 1) {
        here[A_THREAD - 1] = above + inside - before - mine;  // bin 0
        mine += here[A_THREAD - 1];
      }
      if (before < wanted && before + mine >= wanted) {
#pragma unroll
        for (int n = 0; n < A_THREAD; ++n) {
          if (before < wanted && before + here[n] >= wanted) {
            results[0] = prefix << BITS | (BINS - 1 - (A_THREAD * threadIdx.x + n));
            results[1] = before;
            results[2] = here[n];  // not in of_warps: other warps may still be reading there
          }
          before += here[n];
        }
      }
      __syncthreads();
      prefix = results[0];
      above = results[1];
      inside = results[2];
      __syncthreads();
    }
    return {prefix, above};
  }
  // The first id up to which the amounts sum to `wanted`, which they do: each thread walks a run of neighbours.
  template <class Amount> DEVICE int walk_ids(uint64_t wanted, Amount amount) const {
    const int first = (int)((int64_t)vocab * threadIdx.x / THREADS), last = (int)((int64_t)vocab * (threadIdx.x + 1) / THREADS);
    uint64_t mine = 0;
    for (int i = first; i < last; ++i) mine += amount(weights[i]);
    uint64_t before = sum_before(mine);
    if (before < wanted && before + mine >= wanted) {
      int i = first;
      while ((before += amount(weights[i])) < wanted) ++i;
      results[0] = i;
    }
    __syncthreads();
    return (int)results[0];
  }
};

DEVICE uint64_t ceil_div64(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

// weights [vocab] as `weigh` of sample.cu leaves them; positive: how many tokens may be drawn at all. top_k 0, top_p 1 and least 0 are off;
// least: the smallest weight that min-p leaves. random: from [0, 1). Grid: one thread block.
extern "C" __global__ void __launch_bounds__(THREADS) draw(
    const uint64_t* weights, int vocab, const int64_t* positive, int top_k, double top_p, int64_t least, double random, int64_t* token)
{
  if (*positive == 0) return;  // the host says so
  DYNAMIC_SHARED(shared);
  uint64_t* bins = (uint64_t*)shared;
  const Walker walker = {weights, vocab, bins, bins + BINS, bins + BINS + WARPS};
  const auto one = [](uint64_t weight) { return (uint64_t)(weight > 0); };
  const auto own = [](uint64_t weight) { return weight; };

  // What is kept: all tokens heavier than kept.weight, and so many of that weight; kept.above: the mass of the former
  Place kept = {0, 0};
  uint64_t equals = 0;
  const bool trims = top_k > 0 && *positive > top_k;
  if (trims) {
    const Place by_count = walker.walk_down(top_k, one);
    kept = {by_count.weight, 0};
    equals = by_count.weight ? top_k - by_count.above : 0;
  }
  kept.above = walker.total([&](uint64_t weight) { return weight > kept.weight ? weight : 0; });
  if (top_p < 1.) {
    const uint64_t wanted = max((uint64_t)1, (uint64_t)ceil(top_p * (double)(kept.above + equals * kept.weight)));
    kept = walker.walk_down(wanted, own);
    equals = ceil_div64(wanted - kept.above, kept.weight);
  }
  if (least > kept.weight) {
    kept = {(uint64_t)least - 1, walker.total([&](uint64_t weight) { return weight >= least ? weight : 0; })};
    equals = 0;
  }
  const uint64_t mass = kept.above + equals * kept.weight, wanted = min(mass, (uint64_t)(random * (double)mass) + 1);
  int drawn;
  if (trims || top_p < 1.) {  // by falling weight, as the reference has ordered them by now
    const Place place = walker.walk_down(wanted, own);
    const uint64_t nth = ceil_div64(wanted - place.above, place.weight);
    drawn = walker.walk_ids(nth, [&](uint64_t weight) { return (uint64_t)(weight == place.weight); });
  } else {
    drawn = walker.walk_ids(wanted, [&](uint64_t weight) { return weight > kept.weight ? weight : 0; });
  }
  if (threadIdx.x == 0) *token = drawn;
}
