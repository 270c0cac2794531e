// A CUDA thread block on the CPU, for the kernels' own source: every thread is a fibre, and what the GPU does asynchronously
// (TMA, cp.async, wgmma) happens here as late, as early or in as odd an order as the rules allow, chosen by a seed.
//
// It defines the names that ptx.cuh and hopper.cuh define for the GPU. Modelled: mbarriers with transaction bytes, named
// barriers, 128-byte swizzle, wgmma descriptors, commit groups, warp votes and shuffles. A destination of a copy in flight
// holds NaN until it lands; a deadlock, an arrival too many or an access outside shared memory stops the run with a message.
// Not modelled: the memory order of plain loads and stores, and speed.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__
#define DEVICE inline
#define INFINITY_F HUGE_VALF
#define DYNAMIC_SHARED(name) char* name = fibre->block->shared.data() + 1024

struct int2 { int x, y; };
struct int4 { int x, y, z, w; };
struct uint2 { uint32_t x, y; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
template <class T> inline T min(T a, T b) { return b < a ? b : a; }
template <class T> inline T max(T a, T b) { return a < b ? b : a; }

// ------------------------------------------------------------------------------------------------ fibres
[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  abort();
}

struct MBarrier { int expected = 0, pending = 0; long bytes = 0; uint32_t phase = 0; };
struct Meeting { int count = 0; uint64_t generation = 0; };
struct Warp { uint32_t in[32], a[32][4], b[32][2]; Meeting meeting; };
using Action = std::function<void()>;
struct Block;
struct Fibre {
  ucontext_t context;
  char* stack = nullptr;
  int thread = 0;
  bool done = false;
  Block* block = nullptr;
  std::function<bool()> ready;                       // empty: may run
  std::deque<std::vector<Action>> wgmma_groups;      // committed, not all done
  std::vector<Action> wgmma_open;
  std::vector<Action> copies;                        // cp.async
  uint32_t commits = 0;                              // of wgmma groups, and products issued: the same in all lanes of a warp
  long products = 0;
};
struct Dim { int x, y, z; };
struct Block {
  Dim index;
  int threads;
  std::vector<char> shared;
  std::map<uint32_t, MBarrier> barriers;
  std::map<int, Meeting> named;
  Meeting all;
  std::vector<Warp> warps;
  std::vector<Fibre*> fibres;
  std::vector<Action> tma;                           // loads in flight
};
inline Fibre* fibre;
inline ucontext_t scheduler;
inline Dim grid_size, block_size_;
inline uint32_t random_state = 1;
inline bool lazy_engine;  // asynchronous work happens only when nothing else can
inline uint32_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 17;
  return random_state ^= random_state << 5;
}
#define threadIdx (Dim{fibre->thread, 0, 0})
#define blockIdx (fibre->block->index)
#define gridDim grid_size
#define blockDim block_size_

inline void pause_fibre() { swapcontext(&fibre->context, &scheduler); }
template <class Ready> inline void wait_until(Ready ready) {
  if (ready()) return;
  fibre->ready = ready;
  pause_fibre();
  fibre->ready = nullptr;
}
inline void arrive(Meeting& m, int threads) {
  if (++m.count == threads) { m.count = 0; ++m.generation; }
  if (m.count > threads) fail("too many arrivals at a barrier");
}
inline void meet(Meeting& m, int threads) {
  const uint64_t generation = m.generation;
  arrive(m, threads);
  Meeting* p = &m;
  wait_until([=] { return p->generation != generation; });
}
inline void __syncthreads() { meet(fibre->block->all, fibre->block->threads); }
inline Warp& warp_of() { return fibre->block->warps[fibre->thread >> 5]; }
inline void __syncwarp(unsigned = 0) { meet(warp_of().meeting, 32); }

// ------------------------------------------------------------------------------------------------ warps
template <class T, class Read> inline auto exchange(T mine, Read read) {  // read(values of the 32 lanes)
  static_assert(sizeof(T) == 4, "32-bit values only");
  Warp& w = warp_of();
  memcpy(&w.in[fibre->thread & 31], &mine, 4);
  __syncwarp();
  T values[32];
  memcpy(values, w.in, sizeof values);
  auto result = read(values);
  __syncwarp();
  return result;
}
template <class T> inline T __shfl_xor_sync(unsigned, T x, int bit) { int l = fibre->thread & 31; return exchange(x, [=](T* v) { return v[l ^ bit]; }); }
template <class T> inline T __shfl_sync(unsigned, T x, int lane) { return exchange(x, [=](T* v) { return v[lane]; }); }
template <class T> inline T __shfl_up_sync(unsigned, T x, int n) { int l = fibre->thread & 31; return exchange(x, [=](T* v) { return v[l >= n ? l - n : l]; }); }
template <class T> inline T __reduce_add_sync(unsigned, T x) { return exchange(x, [](T* v) { T s = 0; for (int i = 0; i < 32; ++i) s += v[i]; return s; }); }
template <class T> inline T __reduce_max_sync(unsigned, T x) { return exchange(x, [](T* v) { T s = v[0]; for (int i = 1; i < 32; ++i) s = v[i] > s ? v[i] : s; return s; }); }
inline uint32_t transpose_pairs(uint32_t x) {
  const int g = (fibre->thread & 31) >> 2, t = fibre->thread & 3;
  const auto at = [=](const uint32_t* v, int row) { return v[4 * row + (g >> 1)] >> (16 * (g & 1)) & 0xffffu; };
  return exchange(x, [=](uint32_t* v) { return at(v, 2 * t) | at(v, 2 * t + 1) << 16; });
}
inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffffu) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000u); }
inline uint32_t __ballot_sync(unsigned, int x) { return exchange(x, [](int* v) { uint32_t s = 0; for (int i = 0; i < 32; ++i) s |= uint32_t(v[i] != 0) << i; return s; }); }
inline int __any_sync(unsigned, int x) { return __ballot_sync(0, x) != 0; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline int __ffs(uint32_t x) { return __builtin_ffs(x); }
template <class T> inline T atomicAdd(T* p, T v) { T old = *p; *p += v; return old; }
inline void __threadfence() {}
inline int atomicMax(int* p, int v) { int old = *p; *p = max(old, v); return old; }

// ------------------------------------------------------------------------------------------------ numbers
inline float __int_as_float(int x) { float f; memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float x) { int i; memcpy(&i, &x, 4); return i; }
inline int __float2int_rn(float x) { return x == x ? (int)nearbyintf(x) : 0; }
inline float __uint2float_rn(uint32_t x) { return (float)x; }
inline void use_after_here(int4&) {}
inline void wait_for_launch_before() {}
inline void let_next_launch_start() {}
inline int __double2hiint(double x) { int64_t i; memcpy(&i, &x, 8); return (int)(i >> 32); }
inline int __double2loint(double x) { int64_t i; memcpy(&i, &x, 8); return (int)i; }
inline double __hiloint2double(int high, int low) { const int64_t i = (int64_t)high << 32 | (uint32_t)low; double x; memcpy(&x, &i, 8); return x; }
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float exp2_fast(float x) { return exp2f(x); }
inline float log2_fast(float x) { return log2f(x); }
inline float half_to_float(uint16_t bits) { _Float16 h; memcpy(&h, &bits, 2); return (float)h; }
inline uint16_t float_to_half(float x) { _Float16 h = (_Float16)x; uint16_t bits; memcpy(&bits, &h, 2); return bits; }
inline float to_float(uint16_t bits) {
#if IS_FLOAT16
  return half_to_float(bits);
#else
  return __int_as_float((int)((uint32_t)bits << 16));
#endif
}
inline uint16_t from_float(float x) {
#if IS_FLOAT16
  return float_to_half(x);
#else
  uint32_t u = (uint32_t)__float_as_int(x);
  if (x != x) return 0x7fff;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
#endif
}
inline uint32_t pack(float low, float high) { return from_float(low) | ((uint32_t)from_float(high) << 16); }
inline float2 unpack(uint32_t pair) { return {to_float((uint16_t)pair), to_float((uint16_t)(pair >> 16))}; }
inline float from_half(uint16_t bits) { return half_to_float(bits); }
inline uint32_t pack_half(float low, float high) { return float_to_half(low) | ((uint32_t)float_to_half(high) << 16); }

// ------------------------------------------------------------------------------------------------ shared memory
inline char* at(Block* block, uint32_t address, int bytes) {
  if (address + bytes > block->shared.size()) fail("access outside shared memory");
  return block->shared.data() + address;
}
inline int thread_again() { return threadIdx.x; }
inline int grid_again() { return gridDim.x; }
inline uint32_t shared_address(const void* p) { return (uint32_t)((const char*)p - fibre->block->shared.data()); }
inline int4 load_past_l1(const void* p) { if ((uintptr_t)p & 15) fail("misaligned load"); int4 v; memcpy(&v, p, 16); return v; }
inline void load_first(int4& v, const void* p, bool wanted) { if (wanted) v = load_past_l1(p); }
inline void store_shared(uint32_t address, uint32_t v) { memcpy(at(fibre->block, address, 4), &v, 4); }
inline void store_shared(uint32_t address, int4 v) { if (address & 15) fail("misaligned"); memcpy(at(fibre->block, address, 16), &v, 16); }
inline int load_shared(uint32_t address) { int v; memcpy(&v, at(fibre->block, address, 4), 4); return v; }
inline int4 load_shared4(uint32_t address) { int4 v; memcpy(&v, at(fibre->block, address, 16), 16); return v; }
inline uint16_t element_at(Block* block, uint32_t address) { uint16_t v; memcpy(&v, at(block, address, 2), 2); return v; }

// ------------------------------------------------------------------------------------------------ sm_80
inline void copy_async(uint32_t to, const void* from, bool exists) {
  if (to & 15 || (uintptr_t)from & 15) fail("misaligned cp.async");
  Block* block = fibre->block;
  memset(at(block, to, 16), 0xff, 16);
  fibre->copies.push_back([=] { exists ? (void)memcpy(at(block, to, 16), from, 16) : (void)memset(at(block, to, 16), 0, 16); });
}
inline void copy_commit() {}
template <int PENDING> inline void copy_wait() {
  static_assert(PENDING == 0, "the kernels wait for all");
  for (auto& copy : fibre->copies) copy();
  fibre->copies.clear();
}
inline void load_matrix_any(uint32_t (&r)[4], uint32_t address, bool transposed) {
  const int lane = fibre->thread & 31;
  if (address & 15) fail("misaligned ldmatrix");
  Block* block = fibre->block;
  exchange(address, [&](uint32_t* rows) {
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = rows[8 * i + (lane >> 2)];
      const int g = lane >> 2, t = lane & 3;
      const uint16_t low = transposed ? element_at(block, rows[8 * i + 2 * t] + 2 * g) : element_at(block, row + 4 * t);
      const uint16_t high = transposed ? element_at(block, rows[8 * i + 2 * t + 1] + 2 * g) : element_at(block, row + 4 * t + 2);
      r[i] = low | ((uint32_t)high << 16);
    }
    return 0;
  });
}
inline void load_matrix(uint32_t (&r)[4], uint32_t address) { load_matrix_any(r, address, false); }
inline void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) { load_matrix_any(r, address, true); }
template <class Convert> inline void mma_any(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Convert convert) {
  Warp& w = warp_of();
  const int lane = fibre->thread & 31;
  memcpy(w.a[lane], a, 16);
  w.b[lane][0] = b0;
  w.b[lane][1] = b1;
  __syncwarp();
  const auto half_of = [](uint32_t pair, int k) { return (uint16_t)(pair >> (16 * (k & 1))); };
  for (int h = 0; h < 2; ++h)
    for (int e = 0; e < 2; ++e) {
      const int row = lane >> 2, column = (lane & 3) * 2 + e;
      float sum = d[2 * h + e];
      for (int k = 0; k < 16; ++k)
        sum += convert(half_of(w.a[row * 4 + ((k & 7) >> 1)][h + 2 * (k >> 3)], k)) * convert(half_of(w.b[column * 4 + ((k & 7) >> 1)][k >> 3], k));
      d[2 * h + e] = sum;
    }
  __syncwarp();
}
inline void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_any(d, a, b0, b1, to_float); }
inline void mma_half(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) { mma_any(d, a, b0, b1, half_to_float); }

// ------------------------------------------------------------------------------------------------ sm_90a
struct Tiles { char* base; long size[4], stride[4]; int box[4]; };
struct alignas(64) TensorMap { union { Tiles tiles; char opaque[128]; }; };
#define L2_EVICT_FIRST 0ull
#define L2_EVICT_LAST 0ull

inline void settle(MBarrier& m) {
  if (m.pending < 0) fail("too many arrivals at an mbarrier");
  if (m.pending == 0 && m.bytes == 0) { m.phase ^= 1; m.pending = m.expected; }
}
inline MBarrier& barrier_at(Block* block, uint32_t b) { auto found = block->barriers.find(b); if (found == block->barriers.end()) fail("mbarrier without init"); return found->second; }
inline void barrier_init(uint32_t b, int arrivals) { if (b & 7) fail("misaligned mbarrier"); MBarrier m; m.expected = m.pending = arrivals; fibre->block->barriers[b] = m; }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t b) { auto& m = barrier_at(fibre->block, b); --m.pending; settle(m); }
inline void barrier_arrive_expecting(uint32_t b, uint32_t bytes) { auto& m = barrier_at(fibre->block, b); m.bytes += bytes; --m.pending; settle(m); }
inline void barrier_wait(uint32_t b, uint32_t parity) { Block* block = fibre->block; wait_until([=] { return barrier_at(block, b).phase != parity; }); }
inline void named_sync(int id, int threads) { meet(fibre->block->named[id], threads); }
inline void named_arrive(int id, int threads) { arrive(fibre->block->named[id], threads); }

inline uint32_t swizzle(uint32_t a) { return a ^ (((a >> 7) & 7) << 4); }
template <class Each> inline void for_each_element(const Tiles& t, uint32_t shared, int column, int row, int head, Each each) {
  long n = 0;
  for (int panel = 0; panel < t.box[2]; ++panel)
    for (int r = 0; r < t.box[1]; ++r)
      for (int c = 0; c < t.box[0]; ++c, ++n) {
        const bool inside = row + r >= 0 && row + r < t.size[1] && head < t.size[3] && column + c < t.size[0];
        each(swizzle(shared + 2 * n), inside ? t.base + (column + c) * t.stride[0] + (row + r) * t.stride[1] + panel * t.stride[2] + head * t.stride[3] : nullptr);
      }
}
inline void tma_prefetch(const TensorMap*) {}
inline void tma_prefetch_columns(const TensorMap*, int, int, int) {}
inline void tma_load_columns(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int head, uint64_t) {
  if (to & 1023) fail("misaligned TMA tile");
  Block* block = fibre->block;
  const Tiles t = map->tiles;
  const long bytes = 2L * t.box[0] * t.box[1] * t.box[2];
  memset(at(block, to, bytes), 0xff, bytes);  // whoever still needs what was there finds NaN
  block->tma.push_back([=] {
    for_each_element(t, to, column, row, head, [&](uint32_t a, char* g) { g ? (void)memcpy(at(block, a, 2), g, 2) : (void)memset(at(block, a, 2), 0, 2); });
    auto& m = barrier_at(block, barrier);
    m.bytes -= bytes;
    settle(m);
  });
}
inline void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int row, int head, uint64_t policy) {
  tma_load_columns(to, map, barrier, 0, row, head, policy);
}
template <int N> inline void registers_release() {}
template <int N> inline void registers_acquire() {}
template <int N> inline void pin(float (&)[N]) {}
template <int N> inline void pin(uint32_t (&)[N]) {}
inline void wgmma_fence() {}
inline bool coin() {  // the same for all threads of a warp at the same commit
  uint32_t x = ++fibre->commits * 2654435761u ^ (uint32_t)(fibre->thread >> 5) * 40503u;
  x ^= x >> 15;
  x *= 2246822519u;
  return (x >> 13) & 1;
}
inline void run_all(std::vector<Action>& actions) { for (auto& a : actions) a(); actions.clear(); }
inline void wgmma_commit() {  // the products may run at once, or only at the wait
  __syncwarp();
  if (coin()) {
    for (auto& group : fibre->wgmma_groups) run_all(group);
    run_all(fibre->wgmma_open);
  }
  fibre->wgmma_groups.push_back(std::move(fibre->wgmma_open));
  fibre->wgmma_open.clear();
  __syncwarp();
}
template <int PENDING> inline void wgmma_wait() {
  __syncwarp();
  while ((int)fibre->wgmma_groups.size() > PENDING) { run_all(fibre->wgmma_groups.front()); fibre->wgmma_groups.pop_front(); }
  __syncwarp();
}
struct Descriptor {
  uint32_t address, leading, stride;
  explicit Descriptor(uint64_t d) : address((uint32_t)(d & 0x3fff) << 4), leading((uint32_t)(d >> 16 & 0x3fff) << 4), stride((uint32_t)(d >> 32 & 0x3fff) << 4) {
    if (d >> 62 != 1) fail("descriptor without 128-byte swizzle");
  }
  uint16_t k_major(Block* b, int row, int k) const { return element_at(b, swizzle(address + (row >> 3) * stride + (row & 7) * 128 + k * 2)); }
  uint16_t mn_major(Block* b, int n, int k) const { return element_at(b, swizzle(address + (n >> 6) * leading + (k >> 3) * stride + (k & 7) * 128 + (n & 63) * 2)); }
};
template <int N, class Convert> inline void wgmma_shared_any(float (&d)[N], uint64_t a, uint64_t b, int accumulate, Convert convert) {
  Block* block = fibre->block;
  const int t = fibre->thread & 127, lane = t & 31, row = (t >> 5) * 16 + (lane >> 2), column = (lane & 3) * 2;
  float* out = d;
  fibre->wgmma_open.push_back([=] {
    const Descriptor da(a), db(b);
    float rows[2][16];
    for (int h = 0; h < 2; ++h) for (int k = 0; k < 16; ++k) rows[h][k] = convert(da.k_major(block, row + 8 * h, k));
    for (int j = 0; j < N / 4; ++j)
      for (int e = 0; e < 2; ++e) {
        float sum[2] = {accumulate ? out[4 * j + e] : 0.f, accumulate ? out[4 * j + 2 + e] : 0.f};
        for (int k = 0; k < 16; ++k) {
          const float y = convert(db.k_major(block, 8 * j + column + e, k));
          sum[0] += rows[0][k] * y;
          sum[1] += rows[1][k] * y;
        }
        out[4 * j + e] = sum[0];
        out[4 * j + 2 + e] = sum[1];
      }
  });
}
template <int N> inline void wgmma_shared(float (&d)[N], uint64_t a, uint64_t b, int accumulate) { wgmma_shared_any(d, a, b, accumulate, to_float); }
template <int N> inline void wgmma_shared_half(float (&d)[N], uint64_t a, uint64_t b, int accumulate) { wgmma_shared_any(d, a, b, accumulate, half_to_float); }
// The left operand lives in the registers of the four lanes of a quad: each lane publishes where its own are.
inline std::map<std::pair<Block*, int>, std::map<long, const uint32_t*>> operand_board;
template <int N> inline void wgmma_registers(float (&d)[N], uint32_t& a0, uint32_t&, uint32_t&, uint32_t&, uint64_t b) {
  Block* block = fibre->block;
  const long turn = fibre->products++;
  const int thread = fibre->thread, lane = thread & 31, column = (lane & 3) * 2;
  operand_board[{block, thread}][turn] = &a0;  // the four are neighbours in one array
  float* out = d;
  fibre->wgmma_open.push_back([=] {
    const Descriptor db(b);
    float rows[2][16];
    for (int q = 0; q < 4; ++q) {
      const uint32_t* a = operand_board[{block, thread - (lane & 3) + q}].at(turn);
      for (int e = 0; e < 2; ++e)
        for (int i = 0; i < 4; ++i) rows[i & 1][8 * (i >> 1) + 2 * q + e] = to_float((uint16_t)(a[i] >> (16 * e)));
    }
    for (int j = 0; j < N / 4; ++j)
      for (int e = 0; e < 2; ++e) {
        float sum[2] = {out[4 * j + e], out[4 * j + 2 + e]};
        for (int k = 0; k < 16; ++k) {
          const float y = to_float(db.mn_major(block, 8 * j + column + e, k));
          sum[0] += rows[0][k] * y;
          sum[1] += rows[1][k] * y;
        }
        out[4 * j + e] = sum[0];
        out[4 * j + 2 + e] = sum[1];
      }
  });
}
