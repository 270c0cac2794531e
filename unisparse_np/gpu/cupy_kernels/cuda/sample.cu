// From logits to the next token: steps 1 and 2 of model/sampling.py, the passes over the whole vocabulary.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  CuPy's functions, one after the other
//   2  these kernels. find_largest is one thread block: 128K logits are half a megabyte, which a single multiprocessor reads in microseconds
//
// Comparisons are made in float64, as the reference makes them once a penalty has touched a logit.
//
// Shared memory of find_largest: largest value, its id, and counts [WARPS] each.
#include "ptx.cuh"

#define THREADS 1024
#define WARPS (THREADS / 32)

struct Found {
  double largest;    // logit after the penalty
  int64_t token;     // its id, the smallest of a tie
  int64_t broken;    // logits that are NaN or +inf
  int64_t possible;  // logits above -inf
  int64_t positive;  // weights above 0, which `weigh` counts
};

// Step 1: a token seen before loses, once.
DEVICE double penalised(float logit, bool seen, double penalty) {
  const double x = logit;
  return !seen ? x : x > 0. ? x / penalty : x * penalty;
}

DEVICE bool beats(double x, int i, double best, int place) { return x > best || (x == best && i < place); }

// seen [vocab] or null. Grid: one thread block.
extern "C" __global__ void __launch_bounds__(THREADS) find_largest(
    const float* __restrict__ logits, const unsigned char* __restrict__ seen, double penalty, int vocab, Found* __restrict__ found)
{
  DYNAMIC_SHARED(shared);
  double* values = (double*)shared;
  int* places = (int*)(values + WARPS);
  int* broken_counts = places + WARPS;
  int* possible_counts = broken_counts + WARPS;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  double best = -(double)INFINITY_F;
  int place = vocab, broken = 0, possible = 0;
  for (int i = threadIdx.x; i < vocab; i += THREADS) {
    const float logit = logits[i];
    broken += !(logit < INFINITY_F);
    possible += logit > -INFINITY_F;
    const double x = penalised(logit, seen && seen[i], penalty);
    if (beats(x, i, best, place)) { best = x; place = i; }
  }
  broken = __reduce_add_sync(0xffffffffu, broken);
  possible = __reduce_add_sync(0xffffffffu, possible);
  for (int step = 16; step; step >>= 1) {
    const int high = __shfl_xor_sync(0xffffffffu, __double2hiint(best), step), low = __shfl_xor_sync(0xffffffffu, __double2loint(best), step);
    const double x = __hiloint2double(high, low);
    const int i = __shfl_xor_sync(0xffffffffu, place, step);
    if (beats(x, i, best, place)) { best = x; place = i; }
  }
  if (lane == 0) {
    values[warp] = best;
    places[warp] = place;
    broken_counts[warp] = broken;
    possible_counts[warp] = possible;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < WARPS; ++w) {
    if (beats(values[w], places[w], best, place)) { best = values[w]; place = places[w]; }
    broken += broken_counts[w];
    possible += possible_counts[w];
  }
  *found = Found{best, place, broken, possible, 0};
}

// Step 2: weights exp((logit - largest) / temperature), [vocab], as whole numbers: 2^43 is 1. Grid: enough threads.
extern "C" __global__ void weigh(
    const float* __restrict__ logits, const unsigned char* __restrict__ seen, double penalty, double temperature, int vocab, Found* found,
    uint64_t* __restrict__ weights)
{
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  double weight = 0.;
  if (i < vocab) {
    weight = exp((penalised(logits[i], seen && seen[i], penalty) - found->largest) / temperature);
    weights[i] = weight > 0. ? (uint64_t)(weight * 8796093022208. + .5) : 0;  // NaN becomes 0
  }
  const int positive = __popc(__ballot_sync(0xffffffffu, weight > 0.));
  if ((threadIdx.x & 31) == 0 && positive) atomicAdd((unsigned long long*)&found->positive, (unsigned long long)positive);
}

// Notes token ids that were seen. Grid: enough threads.
extern "C" __global__ void note_seen(const int64_t* __restrict__ token_ids, int count, unsigned char* __restrict__ seen) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) seen[token_ids[i]] = 1;
}
