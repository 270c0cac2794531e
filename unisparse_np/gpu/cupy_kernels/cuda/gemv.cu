// One token's matrix products, y = W x: bound by reading W [rows, WIDTH] once, so that is all that counts. No step of ALGORITHM.md.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  x stays in registers: a thread block reads whole rows, each thread the same columns of every row, 16 bytes a load, the
//      next ROWS rows under way while these are added up; RMSNorm, SwiGLU and the residual addition are fused around it
//   2  the loads of the next rows stand before the products of these: ptxas had moved them behind
//   3  the first rows are asked for while the launch before this one ends
//
// The first rows are asked for before x is there, so RMSNorm costs no time of its own; where the launch allows it, before the
// kernel that makes x has ended (x is not __restrict__ for that reason: its reads must not be moved up). Warps never meet inside the loop: each
// leaves its part of every sum in shared memory, and the parts are added once, at the end, in the order of the warps. Thread
// blocks have a run of neighbouring outputs each; no sum depends on how many there are.
//
// Shared memory: parts [weight rows of the thread block][WARPS], then WARPS sums of squares.
#include "elements.cuh"

#define WARPS (THREADS / 32)
#define PIECES ((WIDTH + 8 * THREADS - 1) / (8 * THREADS))  // of a row: 8 elements each
#define ROWS (PIECES <= 1 ? 8 : PIECES <= 2 ? 4 : PIECES <= 4 ? 2 : 1)  // of W under way at a time, for one output a row

DEVICE void load_piece(Piece& piece, const Element* row, int column, bool wanted) {
  if (WIDTH % 8 == 0) {
    const Element* from = row + (column < WIDTH ? column : 0);  // x is 0 past the end
#pragma unroll
    for (int i = 0; i < (int)sizeof(Element) / 2; ++i) load_first(piece.raw[i], (const int4*)from + i, wanted);
  } else {
    read_row<WIDTH>(piece, row, wanted ? column : WIDTH);
  }
}

// x, or x / sqrt(mean(x^2) + eps) * norm, in the columns of this thread.
template <class Input>
DEVICE void load_input(float (&values)[PIECES][8], const Input* x, const float* norm, float eps, float* squares) {
  float sum = 0.f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    read_row<WIDTH>(values[p], x, 8 * (p * THREADS + threadIdx.x));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += values[p][i] * values[p][i];
  }
  if (norm == nullptr) return;
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) squares[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += squares[w];
  const float share = rsqrtf(sum * (1.f / WIDTH) + eps);
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    float weight[8];
    read_row<WIDTH>(weight, norm, 8 * (p * THREADS + threadIdx.x));
#pragma unroll
    for (int i = 0; i < 8; ++i) values[p][i] *= share * weight[i];
  }
}

// Output o of `outputs` is made of GROUP rows of W: o, outputs + o, ... finish(o, sums [GROUP]) writes it.
template <int GROUP, class Input, class Finish>
DEVICE void multiply(const Element* weight, const Input* x, const float* norm, float eps, int outputs, Finish finish) {
  constexpr int AT_ONCE = ROWS < GROUP ? 1 : ROWS / GROUP;  // outputs
  DYNAMIC_SHARED(shared);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int first = (int)((int64_t)outputs * blockIdx.x / gridDim.x), last = (int)((int64_t)outputs * (blockIdx.x + 1) / gridDim.x);
  const int batches = (last - first + AT_ONCE - 1) / AT_ONCE;
  float* parts = (float*)shared;

  Piece now[AT_ONCE * GROUP][PIECES] = {}, next[AT_ONCE * GROUP][PIECES] = {};
  const auto load_batch = [&](Piece (&to)[AT_ONCE * GROUP][PIECES], int batch, bool wanted) {
#pragma unroll
    for (int j = 0; j < AT_ONCE * GROUP; ++j) {
      const int output = min(first + batch * AT_ONCE + j / GROUP, last - 1);
      const Element* row = weight + ((int64_t)(j % GROUP) * outputs + output) * WIDTH;
#pragma unroll
      for (int p = 0; p < PIECES; ++p) load_piece(to[j][p], row, 8 * (p * THREADS + threadIdx.x), wanted);
    }
  };
  let_next_launch_start();
  if (batches > 0) load_batch(now, 0, true);  // always so; as a branch it keeps these loads in front of the wait
  wait_for_launch_before();
  float values[PIECES][8];
  load_input(values, x, norm, eps, parts + batches * AT_ONCE * GROUP * WARPS);

  for (int batch = 0; batch < batches; ++batch) {
    load_batch(next, batch + 1, batch + 1 < batches);
#pragma unroll
    for (int j = 0; j < AT_ONCE * GROUP; ++j) {
      float sum = 0.f;
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        float w[8];
#pragma unroll
        for (int i = 0; i < (int)sizeof(Element) / 2; ++i) use_after_here(now[j][p].raw[i]);
        widen(w, now[j][p]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum = fmaf(w[i], values[p][i], sum);
      }
      sum = warp_sum(sum);
      if (lane == 0) parts[(batch * AT_ONCE * GROUP + j) * WARPS + warp] = sum;
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE * GROUP; ++j)
#pragma unroll
      for (int p = 0; p < PIECES; ++p) now[j][p] = next[j][p];
  }
  __syncthreads();
  for (int o = threadIdx.x; o < last - first; o += THREADS) {
    float sums[GROUP];
#pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      sums[g] = 0.f;
#pragma unroll
      for (int w = 0; w < WARPS; ++w) sums[g] += parts[(o * GROUP + g) * WARPS + w];
    }
    finish(first + o, sums);
  }
}

DEVICE float bias_of(const float* bias, int i) { return bias ? bias[i] : 0.f; }

// out = W x + b. All: weight [rows, WIDTH], bias float32 or null, x [WIDTH].
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) gemv(
    const Element* __restrict__ weight, const Element* x, const float* __restrict__ bias, Element* __restrict__ out, int rows)
{
  multiply<1>(weight, x, nullptr, 0.f, rows, [&](int o, const float* sum) { write(out + o, sum[0] + bias_of(bias, o)); });
}

// The same in float32: logits.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) gemv_float32(
    const Element* __restrict__ weight, const Element* x, float* __restrict__ out, int rows)
{
  multiply<1>(weight, x, nullptr, 0.f, rows, [&](int o, const float* sum) { out[o] = sum[0]; });
}

// stream += W x + b.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) gemv_add(
    const Element* __restrict__ weight, const Element* x, const float* __restrict__ bias, float* stream, int rows)
{
  multiply<1>(weight, x, nullptr, 0.f, rows, [&](int o, const float* sum) { stream[o] += sum[0] + bias_of(bias, o); });
}

// out = W norm(stream) + b.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) norm_gemv(
    const Element* __restrict__ weight, const float* stream, const float* __restrict__ norm, float eps,
    const float* __restrict__ bias, Element* __restrict__ out, int rows)
{
  multiply<1>(weight, stream, norm, eps, rows, [&](int o, const float* sum) { write(out + o, sum[0] + bias_of(bias, o)); });
}

// The same in float32: logits.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) norm_gemv_float32(
    const Element* __restrict__ weight, const float* stream, const float* __restrict__ norm, float eps,
    float* __restrict__ out, int rows)
{
  multiply<1>(weight, stream, norm, eps, rows, [&](int o, const float* sum) { out[o] = sum[0]; });
}

// out = silu(gate) * up of W norm(stream) + b: weight [2 outputs, WIDTH], gate first.
extern "C" __global__ void __launch_bounds__(THREADS, 512 / THREADS) norm_gemv_swiglu(
    const Element* __restrict__ weight, const float* stream, const float* __restrict__ norm, float eps,
    const float* __restrict__ bias, Element* __restrict__ out, int outputs)
{
  multiply<2>(weight, stream, norm, eps, outputs, [&](int o, const float* sums) {
    write(out + o, silu(sums[0] + bias_of(bias, o)) * (sums[1] + bias_of(bias, outputs + o)));
  });
}
