// The PTX instructions that the kernels use, one small function each, for sm_80 and later.
//
// Nothing here computes anything of the algorithm. The emulator of the tests defines the same names for the CPU, so
// that the kernels' own source runs there. No CUDA header is needed: NVRTC compiles this alone.
// IS_FLOAT16 chooses the 16-bit type of q, k, v: 1 is float16, 0 is bfloat16.
#pragma once
#ifdef UNISPARSE_EMULATOR
#include "emulator.h"
#else

typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef unsigned int uint32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;

#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]
#define DEVICE __device__ __forceinline__
#define INFINITY_F __int_as_float(0x7f800000)

#if IS_FLOAT16
#define ELEMENT_TYPE "f16"
#else
#define ELEMENT_TYPE "bf16"
#endif

DEVICE int thread_again() {  // threadIdx.x, read anew at each use, so that nothing derived from it stays in registers
  int t;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(t));
  return t;
}
DEVICE int grid_again() {  // gridDim.x, likewise
  int n;
  asm volatile("mov.u32 %0, %nctaid.x;" : "=r"(n));
  return n;
}
DEVICE uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

// ---- conversions
DEVICE uint32_t pack(float low, float high) {  // two floats -> two 16-bit elements, rounded to nearest
  uint32_t r;
  asm("cvt.rn." ELEMENT_TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float2 unpack(uint32_t pair) {
#if IS_FLOAT16
  float2 r;
  asm("{\n.reg .b16 l, h;\nmov.b32 {l, h}, %2;\ncvt.f32.f16 %0, l;\ncvt.f32.f16 %1, h;\n}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
  return r;
#else
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
#endif
}
DEVICE float from_half(uint16_t bits) {  // float16, whatever IS_FLOAT16
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
DEVICE uint32_t pack_half(float low, float high) {  // float16, whatever IS_FLOAT16
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- pairs of 16-bit elements
DEVICE uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
DEVICE uint32_t high_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x7632); }
// An 8 x 8 matrix over a warp, lane (g, t) holding columns 2 t and 2 t + 1 of row g: the same of its transpose.
DEVICE uint32_t transpose_pairs(uint32_t x) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}

// ---- global memory
DEVICE int4 load_past_l1(const void* p) {  // 16 bytes, past the L1; stays behind `wait_for_launch_before`
  int4 v;
  asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
// 16 bytes that this kernel does not write, past the L1, no later than the code says; v stays if not wanted.
DEVICE void load_first(int4& v, const void* p, bool wanted) {
  asm volatile("{\n.reg .pred w;\nsetp.ne.b32 w, %5, 0;\n@w ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
               : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w) : "l"(p), "r"((int)wanted));
}
DEVICE void use_after_here(int4& x) {  // what is made of x stays behind the loads above
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}

// ---- launches that overlap (sm_90 and later; the launch must ask for it, otherwise these do nothing)
DEVICE void wait_for_launch_before() {  // until it has ended, and its writes are seen
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
DEVICE void let_next_launch_start() {  // as soon as all thread blocks have said so and there is room
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// ---- shared memory by address
DEVICE void store_shared(uint32_t address, uint32_t value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory"); }
DEVICE void store_shared(uint32_t address, int4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
DEVICE int load_shared(uint32_t address) {
  int v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
DEVICE int4 load_shared4(uint32_t address) {
  int4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
  return v;
}

// ---- asynchronous copies and tensor cores of sm_80
DEVICE void copy_async(uint32_t to, const void* from, bool exists) {  // 16 bytes; zeros where nothing exists
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(exists ? 16 : 0) : "memory");
}
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

DEVICE void load_matrix(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void load_matrix_transposed(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void mma(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {  // d [16 x 8] += a [16 x 16] b [16 x 8]; d: 4 floats
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." ELEMENT_TYPE "." ELEMENT_TYPE ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE void mma_half(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {  // float16, whatever IS_FLOAT16
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
#endif

// ---- reductions over the four lanes that hold one row of an accumulator
DEVICE float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}
