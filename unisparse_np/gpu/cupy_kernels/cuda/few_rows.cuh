// A few query rows against 16 keys at a time on the tensor cores, every operand loaded from global memory straight into the
// registers where mma.sync wants it: keys and values are read once and never pass through shared memory.
//
// Lane (g, t) = (lane / 4, lane % 4). Keys are the left operand, rows of queries the right one: z [16 keys x 8 rows]. A dot product
// does not mind the order of its terms, so the lane takes 8 neighbouring dims of keys g and g + 8, and of row g, in loads of
// 16 bytes. Values are the left operand too, transposed: o [dims x 8 rows] += v^T p^T. The lane takes dims 64 i + 8 g .. + 7 of keys 2 t, 2 t + 1,
// 2 t + 8, 2 t + 9, pairs up neighbouring keys by byte permutation, and ends with those same 8 dims of rows 2 t and 2 t + 1.
#pragma once
#include "shape.cuh"

#define KEY_PIECES ((HEAD_DIM + 31) / 32)    // 16-byte pieces of a key that a lane holds
#define VALUE_PIECES ((HEAD_DIM + 63) / 64)  // and of a value

#define ROWS_BYTES (KEY_PIECES * 512)  // of 8 rows in shared memory

// Eight rows of queries in shared memory, as the right operand wants them: piece i of each lane's row g, lane by lane. Read anew
// for each tile: registers are what keeps loads in flight.
DEVICE uint32_t piece_of_rows(uint32_t rows, int i) { return rows + (32 * i + (threadIdx.x & 31)) * 16; }

DEVICE int word_of(const int4& x, int i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }

struct KeyTile {
  int4 low[KEY_PIECES], high[KEY_PIECES];  // of keys g and g + 8

  // Rows of keys g and g + 8; null for a key that nobody sees, which is zero then.
  DEVICE void load(const uint16_t* key_low, const uint16_t* key_high, int t) {
#pragma unroll
    for (int i = 0; i < KEY_PIECES; ++i) {
      low[i] = high[i] = make_int4(0, 0, 0, 0);
      if (32 * i + 8 * t >= HEAD_DIM) continue;
      if (key_low) low[i] = load_past_l1(key_low + 32 * i + 8 * t);
      if (key_high) high[i] = load_past_l1(key_high + 32 * i + 8 * t);
    }
  }
  // z[e]: key g, row 2 t + e; z[2 + e]: key g + 8. `product` is mma or mma_half; the 8 rows lie in shared memory.
  template <class Product> DEVICE void multiply(float (&z)[4], uint32_t rows, Product product) const {
    z[0] = z[1] = z[2] = z[3] = 0.f;
#pragma unroll
    for (int i = 0; i < KEY_PIECES; ++i) {
      const int4 row = load_shared4(piece_of_rows(rows, i));
      const uint32_t first[4] = {(uint32_t)low[i].x, (uint32_t)high[i].x, (uint32_t)low[i].y, (uint32_t)high[i].y};
      const uint32_t second[4] = {(uint32_t)low[i].z, (uint32_t)high[i].z, (uint32_t)low[i].w, (uint32_t)high[i].w};
      product(z, first, (uint32_t)row.x, (uint32_t)row.y);
      product(z, second, (uint32_t)row.z, (uint32_t)row.w);
    }
  }
};

struct ValueTile {
  int4 rows[4][VALUE_PIECES];  // of keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9

  DEVICE void load(const uint16_t* const (&values)[4], int g) {  // null: zeros
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int i = 0; i < VALUE_PIECES; ++i) {
        rows[k][i] = make_int4(0, 0, 0, 0);
        if (values[k] && 64 * i + 8 * g < HEAD_DIM) rows[k][i] = load_past_l1(values[k] + 64 * i + 8 * g);
      }
  }
  // o[i][w][0 and 2]: dims 64 i + 8 g + 2 w and the next of row 2 t; [1 and 3]: of row 2 t + 1. weights: keys 2 t .., 2 t + 8 .. of row g.
  DEVICE void accumulate(float (&o)[VALUE_PIECES][4][4], const uint32_t (&weights)[2]) const {
#pragma unroll
    for (int i = 0; i < VALUE_PIECES; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const uint32_t r0 = word_of(rows[0][i], w), r1 = word_of(rows[1][i], w), r2 = word_of(rows[2][i], w), r3 = word_of(rows[3][i], w);
        const uint32_t a[4] = {low_halves(r0, r1), high_halves(r0, r1), low_halves(r2, r3), high_halves(r2, r3)};
        mma(o[i][w], a, weights[0], weights[1]);
      }
  }
};

// Reductions over the eight lanes that hold the same two rows.
DEVICE float max_over_keys(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
DEVICE float sum_over_keys(float x) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
