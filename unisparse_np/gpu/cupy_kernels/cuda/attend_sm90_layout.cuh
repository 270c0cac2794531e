// What attend_sm90.cu and its producer share: shapes, the shared-memory map (drawn in attend_sm90.cu), barriers.
#pragma once
#include "hopper.cuh"
#include "mask.cuh"

#define CONSUMERS (BLOCK_SIZE == 64 || HEAD_DIM == 64 ? 1 : 2)
#define TEAMS (CONSUMERS == 2 ? 1 : HEAD_DIM == 64 ? 3 : 2)
#define BM (64 * CONSUMERS)
#define BN (HEAD_DIM == 256 ? 64 : CONSUMERS == 2 ? 192 : HEAD_DIM == 64 ? 128 : 64)
#define PART 64  // keys of one block in a tile
#define PARTS (BN / PART)
#define PARTS_PER_BLOCK (BLOCK_SIZE / PART)
#define STAGES 2
#define THREADS (128 * (CONSUMERS * TEAMS + 1))
#define PRODUCER_REGISTERS (TEAMS == 3 ? 32 : CONSUMERS == 2 ? 24 : 40)
#define CONSUMER_REGISTERS (TEAMS == 3 ? 160 : CONSUMERS == 2 ? 240 : 232)
#define CONSUMER_WARPS (4 * CONSUMERS)
#define NO_KEYS 0x7fff0000  // a part of a tile that holds nothing
#define PANELS ((HEAD_DIM + 63) / 64)  // of 64 columns; head_dim 96 leaves half of its second one empty
#define RECORD_BYTES 48
#define UNDER_WAY_BYTES (2 * 16 + 128)  // two items, and the first words of the one being walked
#define TEAM_RECORDS (RECORD_BYTES * STAGES + UNDER_WAY_BYTES)

#define Q_BYTES (64 * PANELS * 128)
#define KV_BYTES (BN * PANELS * 128)
#define Q_AT 0
#define K_AT (Q_AT + CONSUMERS * Q_BYTES)
#define V_AT (K_AT + STAGES * KV_BYTES)
#define TEAM_BYTES (V_AT + STAGES * KV_BYTES)
#define BARRIERS_AT (TEAMS * TEAM_BYTES)  // and after a team's barriers its records
#define BARRIER_BYTES 128
#define ITEMS_AT BARRIER_BYTES
#define TILES_AT (ITEMS_AT + 16 * CONSUMERS)
#define CONTROL_BYTES (TILES_AT + TEAM_RECORDS)
#define SHARED_BYTES (BARRIERS_AT + TEAMS * CONTROL_BYTES + 1024)

#define Q_FULL(i) (barriers + 8 * (i))  // of consumer i
#define Q_EMPTY(i) (barriers + 8 * (CONSUMERS + (i)))
#define K_FULL(i) (barriers + 8 * (2 * CONSUMERS + (i)))
#define K_EMPTY(i) (barriers + 8 * (2 * CONSUMERS + STAGES + (i)))
#define V_FULL(i) (barriers + 8 * (2 * CONSUMERS + 2 * STAGES + (i)))
#define V_EMPTY(i) (barriers + 8 * (2 * CONSUMERS + 2 * STAGES + STAGES + (i)))

// A position in a ring of buffers, with the parity to wait for.
struct Ring {
  int stage;
  uint32_t parity;
  DEVICE void advance() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

// Where a team's buffers, barriers and records begin in shared memory.
struct Team {
  uint32_t base, barriers, items, tiles;
};

// What the producer reads: tensor maps, items {query head, tile of BM rows}, the block mask or null.
struct Inputs {
  const TensorMap *queries, *keys, *values, *anchor_keys, *anchor_values;
  const int2* work;
  int num_items;
  const uint32_t* words;
};
