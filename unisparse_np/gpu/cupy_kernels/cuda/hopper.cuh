// The PTX instructions of sm_90a: mbarriers, the tensor memory accelerator (TMA), warpgroup matrix products (wgmma).
#pragma once
#include "ptx.cuh"
#ifndef UNISPARSE_EMULATOR

struct alignas(64) TensorMap { char opaque[128]; };  // a CUtensorMap

// ---- mbarriers: a phase ends when all arrivals and all announced bytes are in
DEVICE void barrier_init(uint32_t b, int arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals)); }
DEVICE void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(uint32_t b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
DEVICE void barrier_arrive_expecting(uint32_t b, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(uint32_t b, uint32_t parity) {
  asm volatile("{\n.reg .pred p;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(b), "r"(parity) : "memory");
}
// ---- named barriers: between the warpgroups of one block
DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// ---- TMA
#define L2_EVICT_FIRST 0x12F0000000000000ull
#define L2_EVICT_LAST 0x14F0000000000000ull
DEVICE void tma_prefetch(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"((uint64_t)map) : "memory"); }
DEVICE void tma_prefetch_columns(const TensorMap* map, int column, int row, int head) {  // 64 of them, into the L2
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global.tile [%0, {%1, %2, %3, %4}];"
               ::"l"((uint64_t)map), "r"(column), "r"(row), "r"(0), "r"(head) : "memory");
}
DEVICE void tma_load(uint32_t to, const TensorMap* map, uint32_t barrier, int row, int head, uint64_t policy) {  // all columns
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %3, %5}], [%2], %6;"
               ::"r"(to), "l"((uint64_t)map), "r"(barrier), "r"(0), "r"(row), "r"(head), "l"(policy) : "memory");
}
DEVICE void tma_load_columns(uint32_t to, const TensorMap* map, uint32_t barrier, int column, int row, int head, uint64_t policy) {  // 64 of them
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6}], [%2], %7;"
               ::"r"(to), "l"((uint64_t)map), "r"(barrier), "r"(column), "r"(row), "r"(0), "r"(head), "l"(policy) : "memory");
}

// ---- registers between warpgroups
template <int N> DEVICE void registers_release() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> DEVICE void registers_acquire() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }

// ---- wgmma
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// Registers that an asynchronous product reads or writes: tells the compiler to leave them where they are.
template <int N> DEVICE void pin(float (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(r[i])::"memory");
}
template <int N> DEVICE void pin(uint32_t (&r)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(r[i])::"memory");
}

#define D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define D32(i) D8(i), D8(i + 8), D8(i + 16), D8(i + 24)
#define OPERANDS_0_TO_31 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define OPERANDS_32_TO_63 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define OPERANDS_64_TO_127 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define WGMMA(shape, element) "wgmma.mma_async.sync.aligned." shape ".f32." element "." element " "

// d [64 x N] (+)= a [64 x 16] b [16 x N]: a and b in shared memory, both with the 16 contiguous ("K-major").
// The overload is chosen by the accumulator: 32 floats a thread hold N = 64, 64 hold N = 128.
#define WGMMA_SHARED(name, element, shape, n, outputs, operands, desc_a, desc_b, flag)                                 \
  DEVICE void name(float (&d)[n], uint64_t a, uint64_t b, int accumulate) {                                            \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " flag ", 0;\n" WGMMA(shape, element) "{" operands "}, " desc_a ", " desc_b ", p, 1, 1, 0, 0;\n}\n" \
                 : outputs : "l"(a), "l"(b), "r"(accumulate));                                                         \
  }
WGMMA_SHARED(wgmma_shared, ELEMENT_TYPE, "m64n64k16", 32, D32(0), OPERANDS_0_TO_31, "%32", "%33", "%34")
#define OUTPUTS_64 D32(0), D32(32)
WGMMA_SHARED(wgmma_shared, ELEMENT_TYPE, "m64n128k16", 64, OUTPUTS_64, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_63, "%64", "%65", "%66")
#define OUTPUTS_96 D32(0), D32(32), D32(64)
#define OPERANDS_64_TO_95 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
WGMMA_SHARED(wgmma_shared, ELEMENT_TYPE, "m64n192k16", 96, OUTPUTS_96, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_63 ", " OPERANDS_64_TO_95, "%96", "%97", "%98")
WGMMA_SHARED(wgmma_shared_half, "f16", "m64n128k16", 64, OUTPUTS_64, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_63, "%64", "%65", "%66")

// d [64 x N] += a [64 x 16] b [16 x N]: a in registers, b in shared memory with the N contiguous ("MN-major").
#define WGMMA_REGISTERS(shape, n, outputs, operands, operands_a, desc_b)                                               \
  DEVICE void wgmma_registers(float (&d)[n], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t b) {         \
    asm volatile(WGMMA(shape, ELEMENT_TYPE) "{" operands "}, {" operands_a "}, " desc_b ", 1, 1, 1, 1;\n"              \
                 : outputs : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b));                                              \
  }
WGMMA_REGISTERS("m64n64k16", 32, D32(0), OPERANDS_0_TO_31, "%32, %33, %34, %35", "%36")
#define OUTPUTS_48 D32(0), D8(32), D8(40)
#define OPERANDS_32_TO_47 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
WGMMA_REGISTERS("m64n96k16", 48, OUTPUTS_48, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_47, "%48, %49, %50, %51", "%52")
WGMMA_REGISTERS("m64n128k16", 64, OUTPUTS_64, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_63, "%64, %65, %66, %67", "%68")
#define OUTPUTS_128 D32(0), D32(32), D32(64), D32(96)
WGMMA_REGISTERS("m64n256k16", 128, OUTPUTS_128, OPERANDS_0_TO_31 ", " OPERANDS_32_TO_63 ", " OPERANDS_64_TO_127, "%128, %129, %130, %131", "%132")
#endif

// Descriptor of a shared-memory tile with 128-byte swizzle: start, leading byte offset, stride byte offset, swizzle mode.
//   K-major operand (Q, K): 1024 bytes between groups of 8 rows; the leading offset is unused.
//   MN-major operand (V): leading offset = bytes between panels of 64 columns, 1024 bytes between groups of 8 keys.
DEVICE uint64_t tile_descriptor(uint32_t address, uint32_t leading_bytes) {
  return (uint64_t)((address & 0x3FFFF) >> 4) | ((uint64_t)((leading_bytes & 0x3FFFF) >> 4) << 16) | ((uint64_t)(1024 >> 4) << 32) | (1ull << 62);
}
