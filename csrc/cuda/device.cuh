// The only place for intrinsics and inline PTX. Everything above speaks in these functions, so that the same kernels
// run on a GPU and, under tests/simt, on an emulator that stands in for this header's second half.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define SFR_DEVICE __device__ __forceinline__
#define SFR_BOTH __host__ __device__ __forceinline__

namespace sfr::cuda {

constexpr int warp_threads = 32;

struct alignas(16) Word16 {
  uint32_t part[4];
};

// A value known to the compiler, as an argument.
template <class V, V v>
struct Constant {
  static constexpr V value = v;
};

// Bits of half and bfloat16 numbers; arithmetic is float's.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

// GPUs on which products of matrices in TF32 are several times as fast as single products in float32: those of data
// centres. On the others they are not, and the kernels have no such code for them. `arch`: __CUDA_ARCH__ / 10.
constexpr bool has_matrix_units(int arch) {
  return arch == 80 || arch == 90 || arch == 100;
}

// GPUs that copy from global to shared memory past the registers, while a thread goes on, of those that have kernels
// made for them alone.
constexpr bool has_async_copies(int arch) {
  return arch == 80 || arch == 90 || arch == 100;
}

#ifdef SFR_SIMT

constexpr bool matrix_units = true, async_copies = true;

// tests/simt/include/simt.h: the same declarations on fibers.
using simt::arrive_and_wait;
using simt::copy_async;
using simt::load_vector;
using simt::multiply_tf32;
using simt::shared_memory;
using simt::shuffle;
using simt::shuffle_xor;
using simt::store_vector;
using simt::sync_block;
using simt::sync_threads;
using simt::sync_warp;
using simt::wait_copies;

inline int afresh(int x) {
  return x;
}
inline float half_to_float(uint16_t bits) {
  return simt::half_to_float(bits);
}
inline uint16_t float_to_half(float x) {
  return simt::float_to_half(x);
}
inline int lowest_bit(uint32_t x) {
  return __builtin_ctz(x);
}
inline uint32_t float_bits(float x) {
  return simt::bit_cast<uint32_t>(x);
}
inline float bits_float(uint32_t x) {
  return simt::bit_cast<float>(x);
}
inline uint64_t double_bits(double x) {
  return simt::bit_cast<uint64_t>(x);
}
inline double bits_double(uint64_t x) {
  return simt::bit_cast<double>(x);
}
inline float exp2_of(float x) {
  return simt::exp2_of(x);
}
inline float quotient(float x, float y) {
  return simt::quotient(x, y);
}
inline float ratio(float x, float y) {
  return simt::ratio(x, y);
}
inline float sqrt_of(float x) {
  return simt::sqrt_of(x);
}
inline float normal_sqrt(float x) {
  return simt::sqrt_of(x);
}

#else

#ifdef __CUDA_ARCH__
constexpr bool matrix_units = has_matrix_units(__CUDA_ARCH__ / 10);
constexpr bool async_copies = has_async_copies(__CUDA_ARCH__ / 10);
#else
constexpr bool matrix_units = false, async_copies = false;
#endif

// The block's dynamic shared memory; all of it is allocated at launch.
SFR_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char shared_memory_of_block[];
  return shared_memory_of_block;
}

// All threads of the block.
SFR_DEVICE void sync_block() {
  __syncthreads();
}

// `count` threads of the block, whole warps, at barrier `id` (1 to 15).
SFR_DEVICE void sync_threads(int id, int count) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(id), "r"(count) : "memory");
}

SFR_DEVICE void sync_warp() {
  __syncwarp();
}

// All 32 lanes take part.
template <class T>
SFR_DEVICE T shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class T>
SFR_DEVICE T shuffle(T x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// One thread of each block: adds 1 to the counter and waits until it stands at `target` or beyond. What the blocks
// wrote before is seen by all of them after.
SFR_DEVICE void arrive_and_wait(unsigned* counter, unsigned target) {
  __threadfence();
  atomicAdd(counter, 1u);
  unsigned seen;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (int(seen - target) < 0);
  __threadfence();
}

SFR_DEVICE float half_to_float(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
SFR_DEVICE uint16_t float_to_half(float x) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}
SFR_DEVICE uint32_t float_bits(float x) {
  return __float_as_uint(x);
}
SFR_DEVICE float bits_float(uint32_t x) {
  return __uint_as_float(x);
}
// The number of the lowest bit that is set.
SFR_DEVICE int lowest_bit(uint32_t x) {
  return __ffs(int(x)) - 1;
}
SFR_DEVICE uint64_t double_bits(double x) {
  return uint64_t(__double_as_longlong(x));
}
SFR_DEVICE double bits_double(uint64_t x) {
  return __longlong_as_double(int64_t(x));
}

// 2^x within 2 ulp; results below float's normal range are 0.
SFR_DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b of a warp, a [16][8] and b [8][8], of which the first 19 bits of each number count: with g = lane / 4 and
// t = lane % 4 a lane gives a[g + 8 (k % 2)][t + 4 (k / 2)] and b[t + 4 k][g], and has d[g + 8 (k / 2)][2 t + k % 2].
// What is added is cut off, not rounded. All 32 lanes take part.
SFR_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Asks for `bytes`, 4 or 16, of global memory in shared memory, or, not `there`, for zeros; both addresses are
// multiples of that. They have come once this thread has waited, and for others after a barrier.
template <int bytes>
SFR_DEVICE void copy_async(void* to, const void* from, bool there = true) {
  static_assert(bytes == 4 || bytes == 16, "what GPUs copy");
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const uint32_t shared = uint32_t(__cvta_generic_to_shared(to));
  const int read = there ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(read) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared), "l"(from), "r"(read) : "memory");
#endif
}
// Until all that this thread asked for has come.
SFR_DEVICE void wait_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// x, of which the compiler knows nothing: what follows from it is found there, and not kept in registers since before
// a loop.
SFR_DEVICE int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// x / y within 2 ulp, for |y| in [2^-126, 2^126].
SFR_DEVICE float quotient(float x, float y) {
  return __fdividef(x, y);
}
// x / y within 2 ulp for all numbers, and no branch.
SFR_DEVICE float ratio(float x, float y) {
  float q;
  asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(x), "f"(y));
  return q;
}
// The square root within 1 ulp, and no branch.
SFR_DEVICE float sqrt_of(float x) {
  float y;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Of a number that is 0 or in the normal range, one instruction.
SFR_DEVICE float normal_sqrt(float x) {
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A V of 16 bytes, or several, in one pass over each 16; the address must be a multiple of 16.
template <class V>
SFR_DEVICE V load_vector(const void* address) {
  return *static_cast<const V*>(address);
}
template <class V>
SFR_DEVICE void store_vector(void* address, const V& value) {
  *static_cast<V*>(address) = value;
}

#endif

// Long sequences of instructions, and nothing that has to be fast: called, not repeated.
__device__ __noinline__ inline double exp2_of(double x) {
  return exp2(x);
}
__device__ __noinline__ inline double quotient(double x, double y) {
  return x / y;
}
SFR_DEVICE float log2_of(float x) {
  return log2f(x);
}
__device__ __noinline__ inline double log2_of(double x) {
  return log2(x);
}
// e^x - 1
SFR_DEVICE float expm1_of(float x) {
  return expm1f(x);
}
__device__ __noinline__ inline double expm1_of(double x) {
  return expm1(x);
}
SFR_DEVICE double ratio(double x, double y) {
  return x / y;
}
SFR_DEVICE double sqrt_of(double x) {
  return sqrt(x);
}
SFR_DEVICE double normal_sqrt(double x) {
  return sqrt(x);
}

SFR_DEVICE Word16 load16(const void* address) {
  return load_vector<Word16>(address);
}

// Four neighbours, the first at a multiple of 16 bytes.
template <class T>
struct alignas(16) Four {
  T at[4];
};
template <class T>
SFR_DEVICE Four<T> load4(const T* from) {
  return load_vector<Four<T>>(from);
}

SFR_DEVICE float to_float(Half h) {
  return half_to_float(h.bits);
}
SFR_DEVICE float to_float(Bfloat h) {
  return bits_float(uint32_t(h.bits) << 16);
}
SFR_DEVICE float to_float(float x) {
  return x;
}
SFR_DEVICE double to_float(double x) {
  return x;
}

// Round to nearest, ties to even.
SFR_DEVICE void from_float(float x, Half& out) {
  out.bits = float_to_half(x);
}
SFR_DEVICE void from_float(float x, Bfloat& out) {
  const uint32_t bits = float_bits(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
SFR_DEVICE void from_float(float x, float& out) {
  out = x;
}
SFR_DEVICE void from_float(double x, double& out) {
  out = x;
}
template <class E>
SFR_DEVICE void from_float(double x, E& out) {
  from_float(float(x), out);
}

}  // namespace sfr::cuda
