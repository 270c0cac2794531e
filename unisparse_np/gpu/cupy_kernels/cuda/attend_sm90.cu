// Step 6 on Hopper: exact attention over selected blocks and anchor keys, by TMA and wgmma.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  one producer warp drives TMA, two consumer warpgroups of 64 query rows each multiply; the probabilities stay in
//      registers as the left operand of the second product
//   2  QK of tile j and PV of tile j-1 are in flight together; the softmax of j runs under the PV of j-1
//   3  the two warpgroups take turns at the tensor cores (named barriers), so one's softmax hides under the other's products
//   4  persistent grid, items longest first inside sections whose K and V fit the L2 (prepare.cu)
//   5  the producer walks the block mask itself, a word of 32 blocks a lane: no index lists in memory
//   6  anchor keys are tiles of the same loop, taken from a compact copy, masked by the complement of the block mask
//   7  the next item's mask is read, and the number of the one after drawn, while an item runs
//   8  a tile is three parts of 64 keys from anywhere in the list: 192 keys a tile, a third fewer rounds of barriers, maxima and
//      rescaling, and Q is read from shared memory less often; blocks of 64: three (head_dim 64) or two lists a multiprocessor
//   9  each consumer's Q by itself; O leaves from the registers, 16 bytes a lane
//  10  head_dim 64: items of 64 rows and three lists a multiprocessor for every block size; head_dim 96 and 256; the producer keeps
//      what it needs once an item in shared memory and spills nothing
//  11  Q is freed after an item's last QK, and the next item's Q is in the L2 by then; of an item's last tile only the parts that hold
//      keys are loaded and multiplied by their values; a mask only where some row of the warpgroup needs it
//  12  the next item's first keys and Q are sent before this one's last values are due: the producer waits for neither
// Dead ends: skipping the rescale of the accumulator when no maximum moved; some exponentials by polynomial; Q in registers;
// an item's last product under the next one's first; QK of the next half tile under the softmax of this one; other moments to hand
// on the turn; a tile that says itself that it is an item's last.
//
// A team is one warp of the producer warpgroup and CONSUMERS warpgroups of 64 query rows that share a list of blocks. Blocks of 64
// and head_dim 64 have one consumer a team and several teams a thread block.
//
// Shared memory, from a 1024-byte boundary (swizzled tiles [PANELS][rows][64], columns past HEAD_DIM 0); of each team:
//   Q   CONSUMERS x 64 x HEAD_DIM    query tiles
//   K   STAGES x BN x HEAD_DIM       key tiles, and V the same: separate rings
//   then of each team: barriers; an item's record a consumer {head, first row, number of key tiles, parts of the last}; a tile's record
//   a K stage {PARTS parts, mask bits, words of unselected blocks}; the items under way, and the first words of the mask of one
#include "attend_sm90_producer.cuh"
#include "attend_sm90_tile.cuh"

// A warp is done with a buffer: its reads come before the one arrival that stands for all its lanes.
DEVICE void release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(barrier);
}

// Word j of lane i of a quad becomes word i of lane j.
DEVICE void transpose_quad(uint32_t (&x)[4], int lane) {
#pragma unroll
  for (int step = 1; step <= 2; step *= 2) {
    const bool high = lane & step;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & step) continue;
      const uint32_t got = __shfl_xor_sync(0xffffffffu, high ? x[j] : x[j + step], step);
      (high ? x[j] : x[j + step]) = got;
    }
  }
}

// Takes items until none is left: of each, attention of 64 query rows.
DEVICE void consume(const Shape& shape, const Team& where, int warpgroup, const int* anchors, uint32_t* out, float* lse, int* broken) {
  const uint32_t base = where.base, barriers = where.barriers, items = where.items, tiles = where.tiles;
  const int consumer = CONSUMERS == 2 ? warpgroup - 1 : 0;
  const int wg_thread = threadIdx.x & 127, lane = threadIdx.x & 31;
  const int row = (wg_thread >> 5) * 16 + (lane >> 2);  // this thread's rows of the warpgroup's 64: row and row + 8
  const float c = shape.scale_log2;
  if (CONSUMERS == 2 && consumer == 0) named_arrive(1, 256);  // the first turn
  uint32_t q_parity = 0;
  const uint32_t item_record = items + 16 * consumer;
  Ring k = {0, 0}, v = {0, 0};
  while (true) {
    barrier_wait(Q_FULL(consumer), q_parity);
    q_parity ^= 1;
    const int4 item = load_shared4(item_record);
    const int num_tiles = item.z;
    if (num_tiles < 0) break;
    float o[HEAD_DIM / 2];
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.f;
    Rows rows = {-INFINITY_F, -INFINITY_F, 0.f, 0.f, 1.f, 1.f};

    const uint64_t q_tile = tile_descriptor(base + Q_AT + consumer * Q_BYTES, 16);
    uint32_t p[BN / 4];
    {
      float s[BN / 2];
      barrier_wait(K_FULL(k.stage), k.parity);
      const uint32_t record = tiles + RECORD_BYTES * k.stage;
      const uint32_t masked = load_shared(record + 12);
      pin(s);
      wgmma_fence();
      multiply_qk(s, q_tile, tile_descriptor(base + K_AT + k.stage * KV_BYTES, 16));
      wgmma_commit();
      wgmma_wait<0>();
      pin(s);
      if (masked) hide(s, masked, record, item, row, (lane & 3) * 2, shape, anchors);
      release(K_EMPTY(k.stage), lane);
      if (num_tiles == 1 && lane == 0) barrier_arrive(Q_EMPTY(consumer));
      k.advance();
      rows.absorb(s, c);
      to_16_bit(p, s);
      if (num_tiles > 1) barrier_wait(K_FULL(k.stage), k.parity);
    }
#pragma unroll 1
    for (int j = 1; j < num_tiles; ++j) {
      float s[BN / 2];
      const uint32_t record = tiles + RECORD_BYTES * k.stage;
      const uint32_t masked = load_shared(record + 12);
      if (CONSUMERS == 2) named_sync(1 + consumer, 256);
      pin(s);
      wgmma_fence();
      multiply_qk(s, q_tile, tile_descriptor(base + K_AT + k.stage * KV_BYTES, 16));
      wgmma_commit();
      barrier_wait(V_FULL(v.stage), v.parity);
      pin(o);
      pin(p);
      wgmma_fence();
      multiply_pv<PARTS>(o, p, tile_descriptor(base + V_AT + v.stage * KV_BYTES, BN * 128));
      wgmma_commit();
      if (CONSUMERS == 2) named_arrive(2 - consumer, 256);
      wgmma_wait<1>();
      pin(s);
      if (masked) hide(s, masked, record, item, row, (lane & 3) * 2, shape, anchors);
      release(K_EMPTY(k.stage), lane);
      if (j + 1 == num_tiles && lane == 0) barrier_arrive(Q_EMPTY(consumer));  // Q's last product is done
      k.advance();
      rows.absorb(s, c);
      pin(s);
      // The next keys are waited for here: the branch keeps the compiler from moving the wait for the PV product above
      // the exponentials, which would end their overlap.
      if (j + 1 < num_tiles) barrier_wait(K_FULL(k.stage), k.parity);
      wgmma_wait<0>();
      pin(o);
      pin(p);
      release(V_EMPTY(v.stage), lane);
      v.advance();
      to_16_bit(p, s);
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        o[4 * i] *= rows.scale0;
        o[4 * i + 1] *= rows.scale0;
        o[4 * i + 2] *= rows.scale1;
        o[4 * i + 3] *= rows.scale1;
      }
    }
    barrier_wait(V_FULL(v.stage), v.parity);
    multiply_last_pv(o, p, tile_descriptor(base + V_AT + v.stage * KV_BYTES, BN * 128), item.w);
    rows.sum0 = quad_sum(rows.sum0);
    rows.sum1 = quad_sum(rows.sum1);
    release(V_EMPTY(v.stage), lane);
    v.advance();

    const int head = item.x, first_row = item.y;
    const float scale0 = rows.sum0 == 0.f ? 0.f : 1.f / rows.sum0;
    const float scale1 = rows.sum1 == 0.f ? 0.f : 1.f / rows.sum1;
    float not_finite = 0.f;  // stays 0 unless some output is NaN or infinite
    // The four lanes of a row exchange what they hold, so that each stores 16 bytes at a time.
    int4* const to = (int4*)out + ((int64_t)head * shape.q_len + first_row + row) * (HEAD_DIM / 8) + (lane & 3);
    const int rows_left = shape.q_len - first_row - row;
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 8; i += 4) {
      uint32_t upper[4], lower[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float a = o[4 * (i + j)] * scale0, b = o[4 * (i + j) + 1] * scale0, d = o[4 * (i + j) + 2] * scale1, e = o[4 * (i + j) + 3] * scale1;
        not_finite += a * 0.f + b * 0.f + d * 0.f + e * 0.f;
        upper[j] = pack(a, b);
        lower[j] = pack(d, e);
      }
      transpose_quad(upper, lane);
      transpose_quad(lower, lane);
      if (rows_left > 0) to[i] = make_int4(upper[0], upper[1], upper[2], upper[3]);
      if (rows_left > 8) to[i + 8 * (HEAD_DIM / 8)] = make_int4(lower[0], lower[1], lower[2], lower[3]);
    }
    if (__any_sync(0xffffffffu, not_finite != 0.f) && lane == 0) {
      const int slot = atomicAdd(broken, 1);
      broken[2 + 2 * slot] = head;
      broken[3 + 2 * slot] = first_row + (wg_thread >> 5) * 16;
    }
    if ((lane & 3) == 0) {
      const int at = first_row + row;
      if (at < shape.q_len) lse[(int64_t)head * shape.q_len + at] = (rows.max0 + log2_fast(rows.sum0)) * 0.6931471805599453f;
      if (at + 8 < shape.q_len) lse[(int64_t)head * shape.q_len + at + 8] = (rows.max1 + log2_fast(rows.sum1)) * 0.6931471805599453f;
    }
  }
}

// Grid: any number of thread blocks up to the multiprocessors' room; items are dealt by an atomic counter.
// work [num_items] {query head, tile of BM rows}; lse [Hq, Lq]; broken: {count, -}, then {head, first of 16 rows} for
// each output that is not finite: repair.cu looks at those. words null: dense attention.
extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_sm90(
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
    const __grid_constant__ TensorMap anchor_keys, const __grid_constant__ TensorMap anchor_values, uint32_t* __restrict__ out,
    const Shape shape, const int2* __restrict__ work, int num_items, const uint32_t* __restrict__ words, const int* __restrict__ anchors,
    float* __restrict__ lse, int* __restrict__ counter, int* __restrict__ broken)
{
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x & 31;
  const int warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);  // tells the compiler that it is uniform in a warp
  const int warpgroup = warp >> 2, team = TEAMS == 1 ? 0 : warpgroup == 0 ? warp : warpgroup - 1;
  const uint32_t start = (shared_address(shared) + 1023u) & ~1023u, barriers = start + BARRIERS_AT + team * CONTROL_BYTES;
  const Team where = {start + team * TEAM_BYTES, barriers, barriers + ITEMS_AT, barriers + TILES_AT};
  if (warpgroup == 0 && warp < TEAMS && lane == 0) {
    for (int i = 0; i < CONSUMERS; ++i) { barrier_init(Q_FULL(i), 1); barrier_init(Q_EMPTY(i), 4); }
    for (int i = 0; i < STAGES; ++i) {
      barrier_init(K_FULL(i), 1); barrier_init(K_EMPTY(i), CONSUMER_WARPS);
      barrier_init(V_FULL(i), 1); barrier_init(V_EMPTY(i), CONSUMER_WARPS);
    }
    barrier_init_fence();
    tma_prefetch(&queries); tma_prefetch(&keys); tma_prefetch(&values);
  }
  __syncthreads();
  if (warpgroup == 0) {
    registers_release<PRODUCER_REGISTERS>();
    const Inputs in = {&queries, &keys, &values, &anchor_keys, &anchor_values, work, num_items, words};
    if (warp < TEAMS) produce(in, shape, where, team, lane, counter);
  } else {
    registers_acquire<CONSUMER_REGISTERS>();
    consume(shape, where, warpgroup, anchors, out, lse, broken);
  }
}
