// Does a run of numbers hold NaN or infinity? Asked once for every piece of a checkpoint, where it lies on the device. No step of
// ALGORITHM.md.
//
// Version ladder
//   1  a number a thread and round: a checkpoint comes over the bus 50 times slower than this reads it again
//
// Shared memory: none.
#include "elements.cuh"

// *found = 1 where a number is not finite; the caller cleared it. Grid: any.
extern "C" __global__ void find_not_finite(const Element* __restrict__ numbers, int64_t count, int* __restrict__ found) {
  const int64_t step = (int64_t)gridDim.x * blockDim.x;
  for (int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += step)
    if (read(numbers + i) * 0.f != 0.f) *found = 1;  // NaN times 0 and infinity times 0 are NaN
}
