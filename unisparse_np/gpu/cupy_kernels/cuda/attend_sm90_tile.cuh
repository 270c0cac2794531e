// What a consumer of attend_sm90.cu does to one tile: products, masks, the running softmax.
#pragma once
#include "attend_sm90_layout.cuh"

// scores[64 x BN] = Q[64 x HEAD_DIM] K[BN x HEAD_DIM]^T
DEVICE void multiply_qk(float (&s)[BN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int panel = step >> 2, column = (step & 3) * 2;
    wgmma_shared(s, q + panel * (64 * 128 / 16) + column, k + panel * (BN * 128 / 16) + column, step > 0);
  }
}
// out[64 x HEAD_DIM] += P V over the first N parts of a tile
template <int N> DEVICE void multiply_pv(float (&o)[HEAD_DIM / 2], uint32_t (&p)[BN / 4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < N * (PART / 16); ++step)
    wgmma_registers(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], v + step * (16 * 128 / 16));
}
template <int N> DEVICE void multiply_pv_and_wait(float (&o)[HEAD_DIM / 2], uint32_t (&p)[BN / 4], uint64_t v) {
  pin(o);
  pin(p);
  wgmma_fence();
  multiply_pv<N>(o, p, v);
  wgmma_commit();
  wgmma_wait<0>();
  pin(o);
  pin(p);
}
// The same for an item's last tile, of which only so many parts hold keys. The cases are apart: ptxas serialises products that
// branches join.
DEVICE void multiply_last_pv(float (&o)[HEAD_DIM / 2], uint32_t (&p)[BN / 4], uint64_t v, int parts) {
  if (parts == PARTS) multiply_pv_and_wait<PARTS>(o, p, v);
  else if (PARTS > 2 && parts == 2) multiply_pv_and_wait<(PARTS > 2 ? 2 : 1)>(o, p, v);
  else if (parts == 1) multiply_pv_and_wait<1>(o, p, v);
}

DEVICE void to_16_bit(uint32_t (&p)[BN / 4], const float (&s)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

// Hides what the rows of this thread may not see in a tile; `masked` has a bit for each part of which some row of the item sees less
// than all.
DEVICE void hide(float (&s)[BN / 2], uint32_t masked, uint32_t record, int4 item, int row, int column, const Shape& shape, const int* anchors) {
  const int all_see = last_visible_key(shape, item.y);  // this key and all before it
  const int last0 = last_visible_key(shape, item.y + row), last1 = shape.causal ? last0 + 8 : last0;
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    if (!(masked >> p & 1)) continue;
    const int part = load_shared(record + 4 * p);
    float* const scores = s + p * (PART / 2);
    if (part < 0) {
      const Mask<PART> mask = {anchors, item.x / (shape.num_q_heads / shape.num_kv_heads), visible_blocks(shape, item.y / BLOCK_SIZE), last0,
                               last1, all_see, column};
      const uint32_t unselected[2] = {(uint32_t)load_shared(record + 16 + 8 * p), (uint32_t)load_shared(record + 20 + 8 * p)};
      mask.hide_anchors(scores, ~part, unselected, shape);
    } else if (part + (PART - 1) > all_see) {
      const Mask<PART> mask = {nullptr, 0, 0, last0, last1, 0, column};
      mask.hide_keys(scores, part);
    }
  }
}

struct Rows {  // the running softmax of a thread's two rows, r and r + 8, in powers of two: max0/1 are largest scores times c
  float max0, max1, sum0, sum1, scale0, scale1;

  // Takes in one tile of scores and leaves exp2(score * c - max) in their place; scale0/1 shrink what came before.
  DEVICE void absorb(float (&s)[BN / 2], float c) {
    float x0 = s[0], x1 = s[2], y0 = s[4], y1 = s[6];
#pragma unroll
    for (int j = 0; j < BN / 8; j += 2) {
      x0 = fmaxf(x0, fmaxf(s[4 * j], s[4 * j + 1]));
      x1 = fmaxf(x1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
      y0 = fmaxf(y0, fmaxf(s[4 * j + 4], s[4 * j + 5]));
      y1 = fmaxf(y1, fmaxf(s[4 * j + 6], s[4 * j + 7]));
    }
    x0 = fmaxf(max0, quad_max(fmaxf(x0, y0)) * c);
    x1 = fmaxf(max1, quad_max(fmaxf(x1, y1)) * c);
    const float n0 = x0 == -INFINITY_F ? 0.f : x0;  // a row that has seen nothing yet
    const float n1 = x1 == -INFINITY_F ? 0.f : x1;
    scale0 = exp2_fast(max0 - n0);  // exactly 1 where the maximum stays
    scale1 = exp2_fast(max1 - n1);
    max0 = x0;
    max1 = x1;
    sum0 *= scale0;
    sum1 *= scale1;
    float e0 = 0.f, e1 = 0.f;
#pragma unroll
    for (int j = 0; j < BN / 8; ++j) {
      s[4 * j] = exp2_fast(fmaf(s[4 * j], c, -n0));
      s[4 * j + 1] = exp2_fast(fmaf(s[4 * j + 1], c, -n0));
      s[4 * j + 2] = exp2_fast(fmaf(s[4 * j + 2], c, -n1));
      s[4 * j + 3] = exp2_fast(fmaf(s[4 * j + 3], c, -n1));
      sum0 += s[4 * j];
      e0 += s[4 * j + 1];
      sum1 += s[4 * j + 2];
      e1 += s[4 * j + 3];
    }
    sum0 += e0;
    sum1 += e1;
  }
};
