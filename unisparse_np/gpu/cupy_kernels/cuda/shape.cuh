// The shapes of one call, as Problem computes them; every kernel takes this struct by value.
#pragma once
#include "ptx.cuh"

struct Shape {
  int q_len, k_len, q_offset, causal;
  int num_q_heads, num_kv_heads, num_composite_heads, num_composite_kv_heads;
  int head_compress, block_size, q_compress, k_compress;
  int heads_per_mask;  // query heads that share a row of the block mask: head_compress, or 1 for a mask that was given
  int num_q_blocks, num_k_blocks, num_q_composites, num_k_composites;
  int sink_blocks, local_blocks, key_anchors, words_per_row;  // 32-bit words of a row of the block mask
  int anchor_pitch;    // compact anchor keys of one rank: blocks rounded up to a whole tile of 128
  float scale_log2;   // scale * log2(e): softmax runs in powers of two
};

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Last key position that query row may see (without causality: the last key).
DEVICE int last_visible_key(const Shape& shape, int row) { return shape.causal ? shape.q_offset + row : shape.k_len - 1; }

// Key blocks 0 .. n-1 are visible to query block i; returns n.
DEVICE int visible_blocks(const Shape& shape, int i) {
  if (!shape.causal) return shape.num_k_blocks;
  return (shape.q_offset + min(shape.q_len, (i + 1) * shape.block_size) - 1) / shape.block_size + 1;
}

// Bits of word w of the block mask that lie below `blocks`.
DEVICE uint32_t bits_below(int w, int blocks) {
  const int n = blocks - 32 * w;
  return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1u;
}

// Word w of the selected blocks of (query head, query block), visible ones only. No mask means dense attention.
DEVICE uint32_t selected_word(const uint32_t* mask, const Shape& shape, int head, int q_block, int w, int visible) {
  if (w >= shape.words_per_row) return 0;
  const uint32_t bits = bits_below(w, visible);
  if (mask == nullptr) return bits;
  const int64_t row = (int64_t)(head / shape.heads_per_mask) * shape.num_q_blocks + q_block;
  return mask[row * shape.words_per_row + w] & bits;
}
