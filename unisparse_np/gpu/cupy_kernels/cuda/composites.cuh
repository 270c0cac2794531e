// Step 2's rule of visibility, and what else the two score kernels share.
#pragma once
#include "shape.cuh"

#define UNIT 1073741824.f  // 2^30: scores are whole numbers of 1 / UNIT of a query block's mass

// Composite key u is visible to composite query t up to the one that holds t's last position; -1 for a query that does not exist.
DEVICE int last_visible_composite(const Shape& shape, int t) {
  if (t >= shape.num_q_composites) return -1;
  if (!shape.causal) return shape.num_k_composites - 1;
  return (shape.q_offset + min(shape.q_len, (t + 1) * shape.q_compress) - 1) / shape.k_compress;
}
