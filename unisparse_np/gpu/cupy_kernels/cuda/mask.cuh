// Step 6's rule of who sees whom, applied to one tile of scores in tensor-core layout: a thread holds s[4 j + e] of its first
// row and s[4 j + 2 + e] of its second, at column 8 j + column + e of the tile.
// A tile is named by the position of its first key, or by ~(first row of the compact anchors).
#pragma once
#include "shape.cuh"

// Word w of the visible blocks that were not selected: those whose anchors are seen.
DEVICE uint32_t unselected_word(const uint32_t* words, const Shape& shape, int head, int q_block, int w, int visible) {
  return bits_below(w, visible) & ~selected_word(words, shape, head, q_block, w, visible);
}

template <int TILE> struct Mask {  // what a thread's two rows may see
  const int* anchors;  // [Hkv, Nk, r] positions
  int kv_head, visible, last0, last1, tile_last, column;

  DEVICE void hide_keys(float* s, int tile) const {
    const int d0 = last0 - tile - column, d1 = last1 - tile - column;
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
      if (8 * j > d0) s[4 * j] = -INFINITY_F;
      if (8 * j + 1 > d0) s[4 * j + 1] = -INFINITY_F;
      if (8 * j > d1) s[4 * j + 2] = -INFINITY_F;
      if (8 * j + 1 > d1) s[4 * j + 3] = -INFINITY_F;
    }
  }
  // An anchor is seen where its block is visible and not selected; in the last blocks its own position counts too.
  DEVICE void hide_anchors(float* s, int first, const uint32_t (&unselected)[TILE / 32], const Shape& shape) const {
    int rank = 0, block = first;
    for (; block >= shape.anchor_pitch; block -= shape.anchor_pitch) ++rank;
    const int checked_from = min(tile_last / BLOCK_SIZE, shape.num_k_blocks - 1);
#pragma unroll
    for (int w = 0; w < TILE / 32; ++w) {
      const uint32_t hidden = ~unselected[w] >> column;
#pragma unroll
      for (int j = 4 * w; j < 4 * w + 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (hidden >> (8 * (j & 3) + e) & 1) s[4 * j + e] = s[4 * j + 2 + e] = -INFINITY_F;
        }
      }
    }
    if (block + TILE <= checked_from) return;
#pragma unroll
    for (int j = 0; j < TILE / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int b = block + 8 * j + column + e;
        if (b < checked_from || b >= visible) continue;
        const int position = anchors[((int64_t)kv_head * shape.num_k_blocks + b) * shape.key_anchors + rank];
        if (position < 0 || position > last0) s[4 * j + e] = -INFINITY_F;
        if (position < 0 || position > last1) s[4 * j + 2 + e] = -INFINITY_F;
      }
    }
  }
};
