// The layers that are no product: embedding, RMSNorm, SwiGLU, bias. Each reads and writes memory once. No step of ALGORITHM.md.
//
// Version ladder (figures and verdicts: docs/kernels.md)
//   1  16 bytes a lane; RMSNorm keeps its row in registers between the sum of squares and the product
//
// The residual stream is float32 (real models reach 24,700 in it, where a bfloat16 step is 128); what goes into products is
// Element. WIDTH is the row, THREADS the thread block.
//
// Shared memory: a sum of squares a warp, of rms_norm alone.
#include "elements.cuh"

// x[t] = table[token_ids[t]]. Grid: (tokens, pieces of 8 THREADS columns).
extern "C" __global__ void __launch_bounds__(THREADS) embedding(
    const Element* __restrict__ table, const int* __restrict__ token_ids, float* __restrict__ x)
{
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  float row[8];
  read_row<WIDTH>(row, table + (int64_t)token_ids[blockIdx.x] * WIDTH, column);
  write_row<WIDTH>(x + (int64_t)blockIdx.x * WIDTH, column, row);
}

// out = x / sqrt(mean(x^2) + eps) * weight. Grid: one thread block a row.
extern "C" __global__ void __launch_bounds__(THREADS) rms_norm(
    const float* __restrict__ x, const float* __restrict__ weight, float eps, Element* __restrict__ out)
{
  constexpr int PIECES = (WIDTH + 8 * THREADS - 1) / (8 * THREADS), WARPS = THREADS / 32;
  DYNAMIC_SHARED(shared);
  float* sums = (float*)shared;  // [WARPS]
  float row[PIECES][8], sum = 0.f;
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    read_row<WIDTH>(row[p], x + (int64_t)blockIdx.x * WIDTH, 8 * (p * THREADS + threadIdx.x));
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += row[p][i] * row[p][i];
  }
  sum = warp_sum(sum);
  if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0.f;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) sum += sums[w];
  const float share = rsqrtf(sum * (1.f / WIDTH) + eps);
#pragma unroll
  for (int p = 0; p < PIECES; ++p) {
    const int column = 8 * (p * THREADS + threadIdx.x);
    float w[8];
    read_row<WIDTH>(w, weight, column);
#pragma unroll
    for (int i = 0; i < 8; ++i) row[p][i] *= share * w[i];
    write_row<WIDTH>(out + (int64_t)blockIdx.x * WIDTH, column, row[p]);
  }
}

// out = silu(gate) * up: gate_up [T, 2 WIDTH], gate first -> out [T, WIDTH]. Grid: (rows, pieces of 8 THREADS columns).
extern "C" __global__ void __launch_bounds__(THREADS) swiglu(const Element* __restrict__ gate_up, Element* __restrict__ out) {
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  const Element* from = gate_up + (int64_t)blockIdx.x * 2 * WIDTH;
  float gate[8], up[8];
  read_row<WIDTH>(gate, from, column);
  read_row<WIDTH>(up, from + WIDTH, column);
#pragma unroll
  for (int i = 0; i < 8; ++i) gate[i] = silu(gate[i]) * up[i];
  write_row<WIDTH>(out + (int64_t)blockIdx.x * WIDTH, column, gate);
}

// Rows that a product will be added to: out[t] = bias. Grid: (rows, pieces of 8 THREADS columns).
extern "C" __global__ void __launch_bounds__(THREADS) fill_rows(const float* __restrict__ bias, Element* __restrict__ out) {
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  float row[8];
  read_row<WIDTH>(row, bias, column);
  write_row<WIDTH>(out + (int64_t)blockIdx.x * WIDTH, column, row);
}

// x[t] += bias. Grid as above.
extern "C" __global__ void __launch_bounds__(THREADS) add_bias(const float* __restrict__ bias, float* __restrict__ x) {
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  float row[8], add[8];
  read_row<WIDTH>(row, x + (int64_t)blockIdx.x * WIDTH, column);
  read_row<WIDTH>(add, bias, column);
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] += add[i];
  write_row<WIDTH>(x + (int64_t)blockIdx.x * WIDTH, column, row);
}

// x[t] += y[t]. Grid as above.
extern "C" __global__ void __launch_bounds__(THREADS) add_rows(const Element* __restrict__ y, float* __restrict__ x) {
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x);
  float row[8], add[8];
  read_row<WIDTH>(row, x + (int64_t)blockIdx.x * WIDTH, column);
  read_row<WIDTH>(add, y + (int64_t)blockIdx.x * WIDTH, column);
#pragma unroll
  for (int i = 0; i < 8; ++i) row[i] += add[i];
  write_row<WIDTH>(x + (int64_t)blockIdx.x * WIDTH, column, row);
}

// merged[t] = the rows t of all heads [WIDTH / dim, tokens, dim], one after the other. Grid as above. 8 divides dim.
extern "C" __global__ void __launch_bounds__(THREADS) merge_heads(
    const Element* __restrict__ heads, Element* __restrict__ merged, int tokens, int dim)
{
  const int column = 8 * (blockIdx.y * THREADS + threadIdx.x), head = column / dim;
  float row[8];
  read_row<WIDTH>(row, heads + ((int64_t)head * tokens + blockIdx.x) * dim - head * dim, column);
  write_row<WIDTH>(merged + (int64_t)blockIdx.x * WIDTH, column, row);
}

// The token and position that the launches of one decode step read.
extern "C" __global__ void set_step(int* __restrict__ token_and_position, int token, int position) {
  token_and_position[0] = token;
  token_and_position[1] = position;
}
