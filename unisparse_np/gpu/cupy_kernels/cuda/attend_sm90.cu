// Step 6 on Hopper: exact attention over selected blocks and anchor keys, by TMA and wgmma.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  one producer warp drives TMA, two consumer warpgroups of 64 query rows each multiply; the probabilities stay in
//      registers as the left operand of the second product
//   2  QK of tile j and PV of tile j-1 are in flight together; the softmax of j runs under the PV of j-1
//   3  the two warpgroups take turns at the tensor cores (named barriers), so one's softmax hides under the other's products
//   4  persistent grid, items longest first inside sections whose K and V fit the L2 (schedule.cu)
//   5  the producer walks the block mask itself, a word of 32 blocks a lane: no index lists in memory
//   6  anchor keys are tiles of the same loop, taken from a compact copy, masked by the complement of the block mask
//   dead end: skipping the rescale of the accumulator when no maximum moved (slower: the vote costs more than it saves)
//
// A thread block is one producer warpgroup (one warp of it works) and CONSUMERS consumer warpgroups of 64 query rows.
// Blocks of 64 tokens run one consumer a thread block and two (head_dim 64: three) thread blocks a multiprocessor.
//
// Shared memory, from a 1024-byte boundary (swizzled tiles [HEAD_DIM/64][rows][64]):
//   Q   Q_STAGES x BM x HEAD_DIM      query tile
//   K   KV_STAGES x BN x HEAD_DIM     key tiles, and V the same: separate rings
//   O   BM x HEAD_DIM                 finished output on its way to TMA
//   barriers, one item record a Q stage {head, tile, number of key tiles, -}, one tile word a K stage
#include "hopper.cuh"
#include "mask.cuh"

#define CONSUMERS (BLOCK_SIZE == 64 ? 1 : 2)
#define BM (64 * CONSUMERS)
#define BN BM
#define TILES_PER_BLOCK (BLOCK_SIZE / BN)
#define Q_STAGES (CONSUMERS == 2 ? 2 : 1)
#define KV_STAGES (HEAD_DIM == 64 ? 3 : 2)
#define THREADS (128 * (CONSUMERS + 1))
#define BLOCKS_PER_SM (CONSUMERS == 2 ? 1 : HEAD_DIM == 64 ? 3 : 2)
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS (BLOCKS_PER_SM == 1 ? 240 : BLOCKS_PER_SM == 2 ? 208 : 136)
#define CONSUMER_WARPS (4 * CONSUMERS)

#define Q_BYTES (BM * HEAD_DIM * 2)
#define KV_BYTES (BN * HEAD_DIM * 2)
#define Q_AT 0
#define K_AT (Q_AT + Q_STAGES * Q_BYTES)
#define V_AT (K_AT + KV_STAGES * KV_BYTES)
#define O_AT (V_AT + KV_STAGES * KV_BYTES)
#define BARRIERS_AT (O_AT + Q_BYTES)
#define ITEMS_AT (BARRIERS_AT + 128)
#define TILES_AT (ITEMS_AT + 16 * Q_STAGES)
#define SHARED_BYTES (TILES_AT + 16 + 1024)

#define Q_FULL(i) (barriers + 8 * (i))
#define Q_EMPTY(i) (barriers + 8 * (Q_STAGES + (i)))
#define K_FULL(i) (barriers + 8 * (2 * Q_STAGES + (i)))
#define K_EMPTY(i) (barriers + 8 * (2 * Q_STAGES + KV_STAGES + (i)))
#define V_FULL(i) (barriers + 8 * (2 * Q_STAGES + 2 * KV_STAGES + (i)))
#define V_EMPTY(i) (barriers + 8 * (2 * Q_STAGES + 3 * KV_STAGES + (i)))

// A position in a ring of buffers, with the parity to wait for.
template <int STAGES> struct Ring {
  int stage;
  uint32_t parity;
  DEVICE void advance() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  }
};

// ------------------------------------------------------------------------------------------------ producer
// A tile word names what a key tile holds: the position of its first key, or ~(first row of the compact anchors).
struct Producer {
  const TensorMap *keys, *values, *anchor_keys, *anchor_values;
  uint32_t base, barriers;
  int lane, kv_head, previous, have_previous;
  Ring<KV_STAGES> k, v;

  DEVICE void load_keys(int tile) {
    barrier_wait(K_EMPTY(k.stage), k.parity);
    if (lane == 0) {
      store_shared(base + TILES_AT + 4 * k.stage, (uint32_t)tile);
      barrier_arrive_expecting(K_FULL(k.stage), KV_BYTES);
      tma_load(base + K_AT + k.stage * KV_BYTES, tile < 0 ? anchor_keys : keys, K_FULL(k.stage), tile < 0 ? ~tile : tile, kv_head, L2_EVICT_LAST);
    }
    k.advance();
  }
  DEVICE void load_values(int tile) {
    barrier_wait(V_EMPTY(v.stage), v.parity);
    if (lane == 0) {
      barrier_arrive_expecting(V_FULL(v.stage), KV_BYTES);
      tma_load(base + V_AT + v.stage * KV_BYTES, tile < 0 ? anchor_values : values, V_FULL(v.stage), tile < 0 ? ~tile : tile, kv_head, L2_EVICT_LAST);
    }
    v.advance();
  }
  // The keys of this tile, then the values of the one before: the order in which they are used.
  DEVICE void load(int tile) {
    load_keys(tile);
    if (have_previous) load_values(previous);
    previous = tile;
    have_previous = 1;
  }
};

// Which tiles of the compact anchors a query block needs: one word of unselected blocks a lane -> one bit a tile, at its first word.
DEVICE uint32_t anchor_tiles(uint32_t unselected) {
  uint32_t any = __ballot_sync(0xffffffffu, unselected != 0);
  any |= any >> 1;
  if (BN == 64) return any & 0x55555555u;
  any |= any >> 2;
  return any & 0x11111111u;
}

// ------------------------------------------------------------------------------------------------ consumer
// A warp is done with a buffer: its reads come before the one arrival that stands for all its lanes.
DEVICE void release(uint32_t barrier, int lane) {
  __syncwarp();
  if (lane == 0) barrier_arrive(barrier);
}
// scores[64 x BN] = Q[64 x HEAD_DIM] K[BN x HEAD_DIM]^T
DEVICE void multiply_qk(float (&s)[BN / 2], uint64_t q, uint64_t k) {
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const int panel = step >> 2, column = (step & 3) * 2;
    wgmma_shared(s, q + panel * (BM * 128 / 16) + column, k + panel * (BN * 128 / 16) + column, step > 0);
  }
}
// out[64 x HEAD_DIM] += P[64 x BN] V[BN x HEAD_DIM]
DEVICE void multiply_pv(float (&o)[HEAD_DIM / 2], uint32_t (&p)[BN / 4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < BN / 16; ++step)
    wgmma_registers(o, p[4 * step], p[4 * step + 1], p[4 * step + 2], p[4 * step + 3], v + step * (16 * 128 / 16));
}
DEVICE void to_16_bit(uint32_t (&p)[BN / 4], const float (&s)[BN / 2]) {
#pragma unroll
  for (int i = 0; i < BN / 4; ++i) p[i] = pack(s[2 * i], s[2 * i + 1]);
}

struct Rows {  // the running softmax of a thread's two rows, r and r + 8
  float max0, max1, sum0, sum1, scale0, scale1;

  // Takes in one tile of scores and leaves exp2(score * c - max) in their place; scale0/1 shrink what came before.
  DEVICE void absorb(float (&s)[BN / 2], float c) {
    float x0 = max0, x1 = max1, y0 = s[4], y1 = s[6];
#pragma unroll
    for (int j = 0; j < BN / 8; j += 2) {
      x0 = fmaxf(x0, fmaxf(s[4 * j], s[4 * j + 1]));
      x1 = fmaxf(x1, fmaxf(s[4 * j + 2], s[4 * j + 3]));
      y0 = fmaxf(y0, fmaxf(s[4 * j + 4], s[4 * j + 5]));
      y1 = fmaxf(y1, fmaxf(s[4 * j + 6], s[4 * j + 7]));
    }
    x0 = quad_max(fmaxf(x0, y0));
    x1 = quad_max(fmaxf(x1, y1));
    const float n0 = x0 == -INFINITY_F ? 0.f : x0 * c;  // a row that has seen nothing yet
    const float n1 = x1 == -INFINITY_F ? 0.f : x1 * c;
    scale0 = exp2_fast(fmaf(max0, c, -n0));
    scale1 = exp2_fast(fmaf(max1, c, -n1));
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

// Grid: any number of thread blocks up to the multiprocessors' room; items are dealt by an atomic counter.
// work [num_items] {query head, tile of BM rows}; lse [Hq, Lq]; broken: {count, -}, then {head, first of 16 rows} for
// each output that is not finite: repair.cu looks at those. words null: dense attention.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) attend_sm90(
    const __grid_constant__ TensorMap queries, const __grid_constant__ TensorMap keys, const __grid_constant__ TensorMap values,
    const __grid_constant__ TensorMap output, const __grid_constant__ TensorMap anchor_keys, const __grid_constant__ TensorMap anchor_values,
    const Shape shape, const int2* __restrict__ work, int num_items, const uint32_t* __restrict__ words, const int* __restrict__ anchors,
    float* __restrict__ lse, int* __restrict__ counter, int* __restrict__ broken)
{
  DYNAMIC_SHARED(shared);
  const uint32_t base = (shared_address(shared) + 1023u) & ~1023u;
  const uint32_t barriers = base + BARRIERS_AT;
  const int thread = threadIdx.x, lane = thread & 31;
  const int warpgroup = __shfl_sync(0xffffffffu, thread >> 7, 0);  // tells the compiler that it is uniform in a warp

  if (thread == 0) {
    for (int i = 0; i < Q_STAGES; ++i) { barrier_init(Q_FULL(i), 1); barrier_init(Q_EMPTY(i), CONSUMER_WARPS); }
    for (int i = 0; i < KV_STAGES; ++i) {
      barrier_init(K_FULL(i), 1); barrier_init(K_EMPTY(i), CONSUMER_WARPS);
      barrier_init(V_FULL(i), 1); barrier_init(V_EMPTY(i), CONSUMER_WARPS);
    }
    barrier_init_fence();
    tma_prefetch(&queries); tma_prefetch(&keys); tma_prefetch(&values); tma_prefetch(&output);
  }
  __syncthreads();
  const int group = shape.num_q_heads / shape.num_kv_heads;

  if (warpgroup == 0) {
    registers_release<PRODUCER_REGISTERS>();
    if (thread < 32) {
      Producer p = {&keys, &values, &anchor_keys, &anchor_values, base, barriers, lane, 0, 0, 0, {0, 1}, {0, 1}};
      Ring<Q_STAGES> q = {0, 1};
      const int chunks = ceil_div(shape.words_per_row, 32);
      int item = blockIdx.x;
      int2 next = item < num_items ? work[item] : make_int2(0, 0);
      while (item < num_items) {
        const int head = next.x, tile_row = next.y * BM;
        const int q_block = tile_row / shape.block_size, visible = visible_blocks(shape, q_block);
        // tiles of keys no row of this tile sees are left out (the upper half of a block of 256)
        const int stop = shape.causal ? min(shape.k_len, shape.q_offset + min(shape.q_len, tile_row + BM)) : shape.k_len;
        int following = lane == 0 ? atomicAdd(counter, 1) + (int)gridDim.x : 0;
        following = __shfl_sync(0xffffffffu, following, 0);
        if (following < num_items) next = work[following];

        int num_tiles = 0;
        for (int chunk = 0; chunk < chunks; ++chunk) {
          const int w = 32 * chunk + lane;
          const uint32_t selected = selected_word(words, shape, head, q_block, w, visible);
          int n = __popc(selected) * TILES_PER_BLOCK;
          if (TILES_PER_BLOCK == 2) {  // of the last blocks, only the tiles that begin before `stop`
            for (int b = (stop - 1) / BLOCK_SIZE; b < visible; ++b)
              if (b / 32 == w && (selected >> (b & 31) & 1)) n -= (2 * b * BN >= stop) + (2 * b * BN + BN >= stop);
          }
          num_tiles += __reduce_add_sync(0xffffffffu, n);
          if (shape.key_anchors) num_tiles += shape.key_anchors * __popc(anchor_tiles(bits_below(w, visible) & ~selected));
        }

        p.kv_head = head / group;
        p.have_previous = 0;
        int q_loaded = 0;
        const auto load_q = [&] {
          barrier_wait(Q_EMPTY(q.stage), q.parity);
          if (lane == 0) {
            store_shared(base + ITEMS_AT + 16 * q.stage, make_int4(head, next.x, num_tiles, tile_row));
            if (num_tiles) {
              barrier_arrive_expecting(Q_FULL(q.stage), Q_BYTES);
              tma_load(base + Q_AT + q.stage * Q_BYTES, &queries, Q_FULL(q.stage), tile_row, head, L2_EVICT_FIRST);
            } else {
              barrier_arrive(Q_FULL(q.stage));
            }
          }
          q.advance();
          q_loaded = 1;
        };
        const auto load = [&](int tile) {
          p.load(tile);
          if (!q_loaded) load_q();
        };
        for (int chunk = chunks - 1; chunk >= 0; --chunk) {
          const uint32_t mine = selected_word(words, shape, head, q_block, 32 * chunk + lane, visible);
          for (int w = 31; w >= 0; --w) {
            uint32_t bits = __shfl_sync(0xffffffffu, mine, w);
            while (bits) {
              const int bit = 31 - __clz(bits);
              bits &= ~(1u << bit);
              for (int t = TILES_PER_BLOCK - 1; t >= 0; --t) {
                const int key = (32 * (32 * chunk + w) + bit) * BLOCK_SIZE + t * BN;
                if (TILES_PER_BLOCK == 1 || key < stop) load(key);
              }
            }
          }
        }
        for (int chunk = 0; shape.key_anchors && chunk < chunks; ++chunk) {
          const int w = 32 * chunk + lane;
          uint32_t tiles = anchor_tiles(bits_below(w, visible) & ~selected_word(words, shape, head, q_block, w, visible));
          while (tiles) {
            const int first_word = __ffs(tiles) - 1;
            tiles &= tiles - 1;
            for (int rank = 0; rank < shape.key_anchors; ++rank) load(~(rank * shape.anchor_pitch + 32 * (32 * chunk + first_word)));
          }
        }
        if (!q_loaded) load_q();  // nothing to attend to
        if (p.have_previous) p.load_values(p.previous);
        item = following;
      }
      barrier_wait(Q_EMPTY(q.stage), q.parity);
      if (lane == 0) {
        store_shared(base + ITEMS_AT + 16 * q.stage, make_int4(0, 0, -1, 0));  // the end
        barrier_arrive(Q_FULL(q.stage));
      }
    }
  } else {
    registers_acquire<CONSUMER_REGISTERS>();
    const int consumer = warpgroup - 1;
    const int wg_thread = thread & 127;
    const int row = (wg_thread >> 5) * 16 + (lane >> 2);  // this thread's rows of the warpgroup's 64: row and row + 8
    const float c = shape.scale_log2;
    if (CONSUMERS == 2 && consumer == 0) named_arrive(1, 256);  // the first turn
    Ring<Q_STAGES> q = {0, 0};
    Ring<KV_STAGES> k = {0, 0}, v = {0, 0};
    while (true) {
      barrier_wait(Q_FULL(q.stage), q.parity);
      const int4 item = load_shared4(base + ITEMS_AT + 16 * q.stage);
      const int num_tiles = item.z;
      if (num_tiles < 0) break;
      const int first_row = item.w + consumer * 64;
      const int last0 = last_visible_key(shape, first_row + row);
      const int q_block = item.w / shape.block_size;
      const Mask<BN> mask = {words, anchors, item.x, item.x / group, q_block, visible_blocks(shape, q_block), last0,
                         shape.causal ? last0 + 8 : last0, last_visible_key(shape, first_row), (lane & 3) * 2};
      float o[HEAD_DIM / 2];
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) o[i] = 0.f;
      Rows rows = {-INFINITY_F, -INFINITY_F, 0.f, 0.f, 1.f, 1.f};

      if (num_tiles > 0) {
        const uint64_t q_tile = tile_descriptor(base + Q_AT + q.stage * Q_BYTES + consumer * (64 * 128), 16);
        uint32_t p[BN / 4];
        {
          float s[BN / 2];
          barrier_wait(K_FULL(k.stage), k.parity);
          const int tile = load_shared(base + TILES_AT + 4 * k.stage);
          pin(s);
          wgmma_fence();
          multiply_qk(s, q_tile, tile_descriptor(base + K_AT + k.stage * KV_BYTES, 16));
          wgmma_commit();
          wgmma_wait<0>();
          pin(s);
          release(K_EMPTY(k.stage), lane);
          k.advance();
          mask.hide(s, tile, shape);
          rows.absorb(s, c);
          to_16_bit(p, s);
          if (num_tiles > 1) barrier_wait(K_FULL(k.stage), k.parity);
        }
#pragma unroll 1
        for (int j = 1; j < num_tiles; ++j) {
          float s[BN / 2];
          const int tile = load_shared(base + TILES_AT + 4 * k.stage);
          if (CONSUMERS == 2) named_sync(1 + consumer, 256);
          pin(s);
          wgmma_fence();
          multiply_qk(s, q_tile, tile_descriptor(base + K_AT + k.stage * KV_BYTES, 16));
          wgmma_commit();
          barrier_wait(V_FULL(v.stage), v.parity);
          pin(o);
          pin(p);
          wgmma_fence();
          multiply_pv(o, p, tile_descriptor(base + V_AT + v.stage * KV_BYTES, BN * 128));
          wgmma_commit();
          if (CONSUMERS == 2) named_arrive(2 - consumer, 256);
          wgmma_wait<1>();
          pin(s);
          release(K_EMPTY(k.stage), lane);
          k.advance();
          mask.hide(s, tile, shape);
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
        pin(o);
        pin(p);
        wgmma_fence();
        multiply_pv(o, p, tile_descriptor(base + V_AT + v.stage * KV_BYTES, BN * 128));
        wgmma_commit();
        rows.sum0 = quad_sum(rows.sum0);
        rows.sum1 = quad_sum(rows.sum1);
        wgmma_wait<0>();
        pin(o);
        pin(p);
        release(V_EMPTY(v.stage), lane);
        v.advance();
      }
      release(Q_EMPTY(q.stage), lane);  // Q and the item record are free
      q.advance();

      const float scale0 = rows.sum0 == 0.f ? 0.f : 1.f / rows.sum0;
      const float scale1 = rows.sum1 == 0.f ? 0.f : 1.f / rows.sum1;
      if (wg_thread == 0) tma_wait_read();  // the store before has left O
      named_sync(3 + consumer, 128);
      const uint32_t o_tile = base + O_AT + consumer * (64 * HEAD_DIM * 2);
      float not_finite = 0.f;  // stays 0 unless some output is NaN or infinite
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 8; ++i) {
        const uint32_t at = o_tile + (i >> 3) * (64 * 128) + row * 128 + ((((i & 7) ^ (row & 7)) << 4) | ((lane & 3) << 2));
        const float a = o[4 * i] * scale0, b = o[4 * i + 1] * scale0, d = o[4 * i + 2] * scale1, e = o[4 * i + 3] * scale1;
        not_finite += a * 0.f + b * 0.f + d * 0.f + e * 0.f;
        store_shared(at, pack(a, b));
        store_shared(at + 8 * 128, pack(d, e));
      }
      fence_shared_for_tma();
      named_sync(3 + consumer, 128);
      if (wg_thread == 0) tma_store(&output, o_tile, first_row, item.x);
      if (__any_sync(0xffffffffu, not_finite != 0.f) && lane == 0) {
        const int slot = atomicAdd(broken, 1);
        broken[2 + 2 * slot] = item.x;
        broken[3 + 2 * slot] = first_row + (wg_thread >> 5) * 16;
      }
      if ((lane & 3) == 0) {
        const int at = first_row + row;
        if (at < shape.q_len) lse[(int64_t)item.x * shape.q_len + at] = (rows.max0 * c + log2_fast(rows.sum0)) * 0.6931471805599453f;
        if (at + 8 < shape.q_len) lse[(int64_t)item.x * shape.q_len + at + 8] = (rows.max1 * c + log2_fast(rows.sum1)) * 0.6931471805599453f;
      }
    }
    if (wg_thread == 0) tma_wait_all();
  }
}
