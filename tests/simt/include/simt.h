// What device.cuh takes from the emulator: the meeting points of threads, shared memory, half numbers. Every meeting
// point knows the line that calls it: lanes of a warp that come to different ones have come to different points.
#pragma once

#include <cstdint>
#include <cstring>

// CUDA's own names for positions and sizes.
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

struct Site {
  const char* file;
  int line;
};
constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return {file, line};
}

// All threads of the block.
void sync_block(Site site = here());
// `count` threads of the block, whole warps, at barrier `id`.
void sync_threads(int id, int count, Site site = here());
void sync_warp(Site site = here());
// Adds 1 to the counter, then lets others run until it stands at `target` or beyond.
void arrive_and_wait(unsigned* counter, unsigned target);
// The running block's: as long as the launch asked for, and 0xFF in every byte at the start.
extern unsigned char* block_shared;
inline unsigned char* shared_memory() {
  return block_shared;
}

// Hands over 8 bytes and returns those of a lane: `lane`, or the running lane's number xor `mask`.
uint64_t exchange(uint64_t bits, int lane, Site site);
uint64_t exchange_xor(uint64_t bits, int mask, Site site);

// Matrix instructions (csrc/cuda/device.cuh). As measured on Ampere (Fasi, Higham, Mikaitis and Pranesh, "Numerical
// behavior of NVIDIA tensor cores", 2021) products are exact, and what is added is cut off at 24 bits below the
// largest, and the sum to float's.
void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = here());

// Exact, unless a test makes them as far off as the hardware's may be.
float exp2_of(float x);
float quotient(float x, float y);
float ratio(float x, float y);
float sqrt_of(float x);

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bits on both sides");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
uint64_t bits_of(T x) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof(T));
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T x;
  std::memcpy(&x, &bits, sizeof(T));
  return x;
}
template <class T>
T shuffle(T x, int lane, Site site = here()) {
  return from_bits<T>(exchange(bits_of(x), lane, site));
}
template <class T>
T shuffle_xor(T x, int mask, Site site = here()) {
  return from_bits<T>(exchange_xor(bits_of(x), mask, site));
}

// 16 bytes at a time, as the hardware does it: g++ would read one member after the other, and the counters count those.
// Always inline, so that an access has its caller's line.
template <class V>
inline __attribute__((always_inline)) V load_vector(const void* address) {
  typedef int Words __attribute__((vector_size(16), may_alias));
  static_assert(sizeof(V) % sizeof(Words) == 0, "whole words of 16 bytes");
  V to;
  for (unsigned k = 0; k < sizeof(V) / sizeof(Words); ++k) {
    const Words words = static_cast<const Words*>(address)[k];
    std::memcpy(reinterpret_cast<char*>(&to) + k * sizeof(Words), &words, sizeof(Words));
  }
  return to;
}

template <class V>
inline __attribute__((always_inline)) void store_vector(void* address, const V& value) {
  typedef int Words __attribute__((vector_size(16), may_alias));
  static_assert(sizeof(V) % sizeof(Words) == 0, "whole words of 16 bytes");
  for (unsigned k = 0; k < sizeof(V) / sizeof(Words); ++k) {
    Words words;
    std::memcpy(&words, reinterpret_cast<const char*>(&value) + k * sizeof(Words), sizeof(Words));
    static_cast<Words*>(address)[k] = words;
  }
}

// Copies to shared memory that a thread has asked for and not waited for. Until then there is NaN in their place:
// whoever reads it, or still needs what was there, finds that; the watch sees a write when it is asked for, and another
// one where its thread waits.
void begin_copy(void* to, const void* bits, int bytes);
void wait_copies();

template <int bytes>
inline __attribute__((always_inline)) void copy_async(void* to, const void* from, bool there = true) {
  static_assert(bytes == 4 || bytes == 16, "what GPUs copy");
  typedef int Words __attribute__((vector_size(bytes), may_alias));
  Words words = {};
  if (there) words = *static_cast<const Words*>(from);
  *static_cast<Words*>(to) = ~Words{};
  begin_copy(to, &words, bytes);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16, exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 31) return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return bit_cast<float>(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = float(fraction) * 0x1p-24f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(magnitude));
}

// Round to nearest, ties to even.
inline uint16_t float_to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;                    // NaN, as cvt.rn.f16.f32 gives it
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // 65520 and beyond
  if (magnitude < 0x38800000u) {
    // Below half's normal range: a sum whose last bit is worth 2^-24 rounds as wanted.
    const uint32_t sum = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f);
    return uint16_t(sign | (sum - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return uint16_t(sign | ((rounded - 0x38000000u) >> 13));
}

}  // namespace simt
