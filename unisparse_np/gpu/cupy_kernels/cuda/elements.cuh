// Eight neighbouring numbers a lane, 16 bytes a load: weights, activations, queries and keys in 16 bits or in float32.
//
// IS_FLOAT32 makes Element a float; otherwise it is the 16-bit type that IS_FLOAT16 chooses. Rows whose width is not a multiple
// of 8 do not start on 16-byte boundaries: they are read number by number.
#pragma once
#include "ptx.cuh"

#ifndef IS_FLOAT32
#define IS_FLOAT32 0
#endif
#if IS_FLOAT32
typedef float Element;
#else
typedef uint16_t Element;
#endif

// The eight elements of one lane, from 16-bit pairs.
DEVICE void unpack8(float (&x)[8], int4 raw) {
  const float2 a = unpack(raw.x), b = unpack(raw.y), c = unpack(raw.z), d = unpack(raw.w);
  x[0] = a.x; x[1] = a.y; x[2] = b.x; x[3] = b.y;
  x[4] = c.x; x[5] = c.y; x[6] = d.x; x[7] = d.y;
}

DEVICE float read(const float* from) { return *from; }
DEVICE float read(const uint16_t* from) { return unpack(*from).x; }
DEVICE void write(float* to, float x) { *to = x; }
DEVICE void write(uint16_t* to, float x) { *to = (uint16_t)pack(x, 0.f); }

DEVICE void read8(float (&x)[8], const uint16_t* from) { unpack8(x, *(const int4*)from); }
DEVICE void read8(float (&x)[8], const float* from) {
  const int4 a = ((const int4*)from)[0], b = ((const int4*)from)[1];
  x[0] = __int_as_float(a.x); x[1] = __int_as_float(a.y); x[2] = __int_as_float(a.z); x[3] = __int_as_float(a.w);
  x[4] = __int_as_float(b.x); x[5] = __int_as_float(b.y); x[6] = __int_as_float(b.z); x[7] = __int_as_float(b.w);
}
DEVICE void write8(uint16_t* to, const float (&x)[8]) {
  *(int4*)to = make_int4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
}
DEVICE void write8(float* to, const float (&x)[8]) {
  ((int4*)to)[0] = make_int4(__float_as_int(x[0]), __float_as_int(x[1]), __float_as_int(x[2]), __float_as_int(x[3]));
  ((int4*)to)[1] = make_int4(__float_as_int(x[4]), __float_as_int(x[5]), __float_as_int(x[6]), __float_as_int(x[7]));
}

// Elements column .. column + 7 of a row of N; those past its end are 0 and stay unwritten.
template <int N, class T> DEVICE void read_row(float (&x)[8], const T* row, int column) {
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = 0.f;
  if (N % 8 == 0) {
    if (column < N) read8(x, row + column);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < N) x[i] = read(row + column + i);
  }
}
template <int N, class T> DEVICE void write_row(T* row, int column, const float (&x)[8]) {
  if (N % 8 == 0) {
    if (column < N) write8(row + column, x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (column + i < N) write(row + column + i, x[i]);
  }
}

// The same eight as they lie in memory, to be widened where they are used: half the registers.
struct Piece {
  int4 raw[sizeof(Element) / 2];
};
template <int N> DEVICE void read_row(Piece& piece, const Element* row, int column) {
  if (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Element) / 2; ++i) piece.raw[i] = column < N ? ((const int4*)(row + column))[i] : make_int4(0, 0, 0, 0);
  } else {
    float x[8];
    read_row<N>(x, row, column);
    write8((Element*)piece.raw, x);
  }
}
template <int N> DEVICE void write_row(Element* row, int column, const Piece& piece) {
  if (N % 8 == 0) {
#pragma unroll
    for (int i = 0; i < (int)sizeof(Element) / 2; ++i) ((int4*)(row + column))[i] = piece.raw[i];
  } else {
    float x[8];
    read8(x, (const Element*)piece.raw);
    write_row<N>(row, column, x);
  }
}
DEVICE void widen(float (&x)[8], const Piece& piece) { read8(x, (const Element*)piece.raw); }

DEVICE float warp_sum(float x) {  // the same number in all lanes
#pragma unroll
  for (int step = 16; step; step >>= 1) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
DEVICE float silu(float x) { return __fdividef(x, 1.f + exp2_fast(-1.4426950408889634f * x)); }  // x / (1 + exp(-x)); 0 where that overflows
