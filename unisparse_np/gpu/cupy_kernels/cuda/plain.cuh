// What the plain kernels share: any head_dim and block size, float32 and 16-bit inputs, float32 arithmetic without tensor cores.
// IS_FLOAT32 and IS_FLOAT16 choose the type of q, k, v.
//
// Tiles of rows lie in shared memory as float4: CHUNKS of a row, then a pad that makes the stride odd, so that 8 lanes that read
// the same chunk of 8 neighbouring rows meet all 32 banks once.
#pragma once
#include "shape.cuh"

#define SIDE 16  // a thread block is SIDE x SIDE threads: thread (ty, tx) owns rows ty, ty + SIDE, ... and keys tx, tx + SIDE, ...
#define THREADS (SIDE * SIDE)
#define CHUNKS ((HEAD_DIM + 3) / 4)
#define STRIDE (CHUNKS | 1)

DEVICE float widen(float x) { return x; }
DEVICE float widen(uint16_t x) { return unpack(x).x; }
DEVICE float4 widen_four(const float* x) { return *(const float4*)x; }
DEVICE float4 widen_four(const uint16_t* x) {
  const uint2 raw = *(const uint2*)x;
  const float2 low = unpack(raw.x), high = unpack(raw.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

#if IS_FLOAT32
typedef float Element;
DEVICE float narrow(float x) { return x; }
#else
typedef uint16_t Element;
DEVICE uint16_t narrow(float x) { return (uint16_t)pack(x, 0.f); }
#endif

// Elements 4 chunk .. 4 chunk + 3 of a row, zeros past HEAD_DIM.
template <class T> DEVICE float4 load_chunk(const T* row, int chunk) {
  const T* x = row + 4 * chunk;
#if HEAD_DIM % 4 == 0
  return widen_four(x);
#else
  const int n = HEAD_DIM - 4 * chunk;
  return make_float4(widen(x[0]), n > 1 ? widen(x[1]) : 0.f, n > 2 ? widen(x[2]) : 0.f, n > 3 ? widen(x[3]) : 0.f);
#endif
}

// tile[n] = factor * row number position(n) of `rows` for n < COUNT, zeros where position(n) is negative. By the whole thread block.
// A thread's loads are all under way before the first is waited for: the compiler does not move them across its stores.
template <int COUNT, class T, class Position> DEVICE void load_tile(float4* tile, const T* rows, int64_t row_stride, float factor, Position position) {
  constexpr int EACH = (COUNT * CHUNKS + THREADS - 1) / THREADS, AT_ONCE = EACH < 8 ? EACH : 8;
  constexpr bool NO_REST = COUNT * CHUNKS % (AT_ONCE * THREADS) == 0;
#pragma unroll 1
  for (int first = threadIdx.x; first < COUNT * CHUNKS; first += AT_ONCE * THREADS) {
    float4 held[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int item = first + i * THREADS, at = NO_REST || item < COUNT * CHUNKS ? position(item / CHUNKS) : -1;
      held[i] = load_chunk(rows + max(at, 0) * row_stride, item % CHUNKS);  // some row: a branch would hold the next load up
      if (at < 0) held[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int item = first + i * THREADS;
      const float4 x = held[i];
      if (NO_REST || item < COUNT * CHUNKS) tile[item / CHUNKS * STRIDE + item % CHUNKS] = make_float4(factor * x.x, factor * x.y, factor * x.z, factor * x.w);
    }
  }
}

// s[m][n] = row ty + SIDE m of `queries` times row tx + SIDE n of `keys`.
template <int ROWS, int KEYS> DEVICE void multiply(float (&s)[ROWS][KEYS], const float4* queries, const float4* keys, int ty, int tx) {
#pragma unroll
  for (int m = 0; m < ROWS; ++m)
#pragma unroll
    for (int n = 0; n < KEYS; ++n) s[m][n] = 0.f;
#pragma unroll 2
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    float4 a[ROWS], b[KEYS];
#pragma unroll
    for (int m = 0; m < ROWS; ++m) a[m] = queries[(ty + SIDE * m) * STRIDE + chunk];
#pragma unroll
    for (int n = 0; n < KEYS; ++n) b[n] = keys[(tx + SIDE * n) * STRIDE + chunk];
#pragma unroll
    for (int m = 0; m < ROWS; ++m)
#pragma unroll
      for (int n = 0; n < KEYS; ++n) {
        s[m][n] += a[m].x * b[n].x;
        s[m][n] += a[m].y * b[n].y;
        s[m][n] += a[m].z * b[n].z;
        s[m][n] += a[m].w * b[n].w;
      }
  }
}

// Over the SIDE lanes that own the same rows.
DEVICE float side_max(float x) {
  for (int step = SIDE / 2; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, step));
  return x;
}
DEVICE float side_sum(float x) {
  for (int step = SIDE / 2; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
