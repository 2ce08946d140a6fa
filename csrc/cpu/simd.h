// Vectors of the instruction set this file is compiled for, as GCC and Clang vector extensions: the same
// source serves SSE2, AVX2, AVX-512 and NEON. Nothing here is shared between instruction sets: everything
// lives in the variant's own namespace, so that the linker can never hand one variant another's code.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef SFR_ISA
#error "SFR_ISA names the instruction set that this file is compiled for"
#endif

#if defined(__AVX512F__)
#define SFR_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define SFR_VECTOR_BYTES 32
#else
#define SFR_VECTOR_BYTES 16
#endif

#define SFR_INLINE inline __attribute__((always_inline))

namespace sfr::cpu::SFR_ISA {

// 32 vectors, not 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool many_registers = true;
#else
constexpr bool many_registers = false;
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(SFR_VECTOR_BYTES)));
  typedef float Unaligned __attribute__((vector_size(SFR_VECTOR_BYTES), aligned(4)));
  typedef int32_t Int __attribute__((vector_size(SFR_VECTOR_BYTES)));
  typedef int32_t Scalar;
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(SFR_VECTOR_BYTES)));
  typedef double Unaligned __attribute__((vector_size(SFR_VECTOR_BYTES), aligned(8)));
  typedef int64_t Int __attribute__((vector_size(SFR_VECTOR_BYTES)));
  typedef int64_t Scalar;
};

template <class T>
using Vec = typename Simd<T>::Vec;
template <class T>
using Int = typename Simd<T>::Int;

template <class T>
constexpr int lanes = SFR_VECTOR_BYTES / sizeof(T);

// Through a vector type rather than memcpy: it aliases its element type alone, so that a store does not make the
// compiler read every pointer in a structure again.
template <class T>
SFR_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
}

template <class T>
SFR_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}

template <class T>
SFR_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // 0 + x would turn -0 into 0, so compilers keep that addition
}

template <class T>
SFR_INLINE Vec<T> vabs(Vec<T> x) {
  return x < 0 ? -x : x;
}

template <class T>
SFR_INLINE Vec<T> vmax(Vec<T> x, Vec<T> y) {
  return x > y ? x : y;
}

template <class T>
SFR_INLINE Vec<T> quotient(Vec<T> x, Vec<T> y) {
  return x / y;
}

// Sum of the lanes, halves first: an order that depends on the width alone.
template <class T>
SFR_INLINE T sum_lanes(Vec<T> v) {
  T x[lanes<T>];
  std::memcpy(x, &v, sizeof v);
  for (int n = lanes<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] += x[i + n];
  return x[0];
}

template <class T>
SFR_INLINE T max_lanes(Vec<T> v) {
  T x[lanes<T>];
  std::memcpy(x, &v, sizeof v);
  for (int n = lanes<T> / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) x[i] = x[i] > x[i + n] ? x[i] : x[i + n];
  return x[0];
}

// Whether some lane of what comparisons gave is set.
template <class T>
SFR_INLINE bool any_lane(Int<T> mask) {
  uint64_t words[sizeof mask / 8], any = 0;
  std::memcpy(words, &mask, sizeof mask);
  for (const uint64_t word : words) any |= word;
  return any != 0;
}

// Square root without errno, lane by lane: compilers turn this loop into one instruction.
template <class T>
SFR_INLINE Vec<T> vsqrt(Vec<T> v) {
  T x[lanes<T>];
  std::memcpy(x, &v, sizeof v);
  for (int i = 0; i < lanes<T>; ++i) x[i] = sizeof(T) == 4 ? __builtin_sqrtf(x[i]) : __builtin_sqrt(x[i]);
  std::memcpy(&v, x, sizeof v);
  return v;
}

template <class T>
SFR_INLINE T ratio(T x, T y) {
  return x / y;
}

SFR_INLINE float sqrt_of(float x) {
  return __builtin_sqrtf(x);
}
SFR_INLINE double sqrt_of(double x) {
  return __builtin_sqrt(x);
}

// The lanes of a and b, counted as one vector after the other, that `where` says for each lane.
template <class T, class Where>
SFR_INLINE Vec<T> shuffle(Vec<T> a, Vec<T> b, Where where) {
  constexpr int L = lanes<T>;
  Int<T> index{};
  for (int i = 0; i < L; ++i) index[i] = where(i);
#if defined(__clang__)
  Vec<T> out{};
  for (int i = 0; i < L; ++i) out[i] = index[i] < L ? a[index[i]] : b[index[i] - L];
  return out;
#else
  return __builtin_shuffle(a, b, index);
#endif
}

// In every group of `Width` lanes: the first halves of a's and b's group side by side, or the second halves.
template <class T, int Width, bool Second>
SFR_INLINE Vec<T> halves(Vec<T> a, Vec<T> b) {
  return shuffle<T>(a, b, [](int i) {
    const int r = i % Width, half = Width / 2;
    return i - r + r % half + (Second ? half : 0) + (r < half ? 0 : lanes<T>);
  });
}

// Every second block of 16 bytes of a, then of b, from the first or the second on.
template <class T, bool Second>
SFR_INLINE Vec<T> every_second(Vec<T> a, Vec<T> b) {
  constexpr int block = 16 / sizeof(T);
  return shuffle<T>(a, b, [](int i) { return i + i / block * block + (Second ? block : 0); });
}

// rows[r][c] -> rows[c][r] for a square of lanes x lanes: blocks off the diagonal change places, halving.
template <class T, int Width = lanes<T>>
SFR_INLINE void transpose(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (Width * sizeof(T) == 64) {
    // Two rounds in one: only blocks of 16 bytes move, for which there is an instruction that needs no index.
    constexpr int quarter = Width / 4;
    for (int i = 0; i < quarter; ++i) {
      Vec<T>&a = rows[i], &b = rows[i + quarter], &c = rows[i + 2 * quarter], &d = rows[i + 3 * quarter];
      const Vec<T> even_ab = every_second<T, false>(a, b), even_cd = every_second<T, false>(c, d);
      const Vec<T> odd_ab = every_second<T, true>(a, b), odd_cd = every_second<T, true>(c, d);
      a = every_second<T, false>(even_ab, even_cd);
      b = every_second<T, false>(odd_ab, odd_cd);
      c = every_second<T, true>(even_ab, even_cd);
      d = every_second<T, true>(odd_ab, odd_cd);
    }
    transpose<T, quarter>(rows);
  } else if constexpr (Width > 1) {
    for (int block = 0; block < lanes<T>; block += Width)
      for (int i = block; i < block + Width / 2; ++i) {
        const Vec<T> a = rows[i], b = rows[i + Width / 2];
        rows[i] = halves<T, Width, false>(a, b);
        rows[i + Width / 2] = halves<T, Width, true>(a, b);
      }
    transpose<T, Width / 2>(rows);
  }
}

// Lane r of the result is the sum of the lanes of rows[r]: each round halves the number of vectors and the number
// of addends that each sum has left.
template <class T, int Width = lanes<T>>
SFR_INLINE Vec<T> sum_rows(Vec<T> (&rows)[lanes<T>]) {
  if constexpr (Width > 1) {
    for (int i = 0; i < Width / 2; ++i) {
      const Vec<T> a = rows[i], b = rows[i + Width / 2];
      rows[i] = halves<T, Width, false>(a, b) + halves<T, Width, true>(a, b);
    }
    return sum_rows<T, Width / 2>(rows);
  } else {
    return rows[0];
  }
}

template <class T>
struct Float;
template <>
struct Float<float> {
  static constexpr int mantissa = 23, bias = 127, exp2_degree = 7, log2_terms = 5, smallest = -96;
  static constexpr float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
};
template <>
struct Float<double> {
  static constexpr int mantissa = 52, bias = 1023, exp2_degree = 13, log2_terms = 11, smallest = -768;
  static constexpr double round = 6755399441055744.0;
};

// ln(2)^k / k!
constexpr double exp2_coefficient[] = {
    1.0,
    0.69314718055994530942,
    0.24022650695910071233,
    0.05550410866482157995,
    0.00961812910762847716,
    0.00133335581464284434,
    0.00015403530393381609,
    1.5252733804059840e-05,
    1.3215486790144309e-06,
    1.0178086009239699e-07,
    7.0549116208011233e-09,
    4.4455382718708114e-10,
    2.5678435993488201e-11,
    1.3691488853904128e-12,
};

// 2^x to rounding; the top of the range above it; NaN stays NaN. Below 2^smallest it is 0: what is left stays a normal
// number (denormal ones are slow on some processors) through any product with a scaling.
template <class T>
SFR_INLINE Vec<T> exp2(Vec<T> x) {
  constexpr T top = Float<T>::bias, bottom = Float<T>::smallest;
  const Vec<T> inside = x > top ? splat<T>(top) : x < bottom ? splat<T>(bottom) : x;
  const Vec<T> shifted = inside + Float<T>::round;
  const Vec<T> r = inside - (shifted - Float<T>::round);
  Vec<T> p = splat<T>(T(exp2_coefficient[Float<T>::exp2_degree]));
  for (int k = Float<T>::exp2_degree - 1; k >= 0; --k) p = p * r + T(exp2_coefficient[k]);
  const Int<T> bits = ((Int<T>)shifted + Float<T>::bias) << Float<T>::mantissa;
  p = p * (Vec<T>)bits;
  return x < bottom ? Vec<T>{} : p;
}

// log2 of a positive normal number: exponent + log2 of a mantissa in [sqrt(1/2), sqrt(2)) by the series of atanh.
template <class T>
SFR_INLINE Vec<T> log2(Vec<T> x) {
  using S = typename Simd<T>::Scalar;
  constexpr T sqrt_half = T(0.70710678118654752440);
  S offset_bits;
  std::memcpy(&offset_bits, &sqrt_half, sizeof offset_bits);
  const Int<T> exponent = ((Int<T>)x - offset_bits) >> Float<T>::mantissa;
  const Vec<T> m = (Vec<T>)((Int<T>)x - (exponent << Float<T>::mantissa));
  const Vec<T> e = __builtin_convertvector(exponent, Vec<T>);
  const Vec<T> s = (m - 1) / (m + 1), s2 = s * s;
  constexpr int n = Float<T>::log2_terms;
  Vec<T> p = splat<T>(T(1) / (2 * n - 1));
  for (int k = n - 2; k >= 0; --k) p = p * s2 + T(1) / (2 * k + 1);
  return e + p * s * T(2.88539008177792681472);  // 2 / ln 2
}

}  // namespace sfr::cpu::SFR_ISA
