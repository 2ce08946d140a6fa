// Where the solver's rules are compiled to: each instruction set of the CPU, a GPU, or a host that tests them alone.
//
// SFR_TARGET is the namespace, SFR_FN marks a function, SFR_INLINE one that must be part of its caller, SFR_BOTH one
// that the host of a GPU calls, too. Vec<T> holds lanes<T> neighbouring entries of a vector: several on a CPU, one in
// each thread of a GPU.
#pragma once

#include <cstdint>

#if defined(SFR_ISA)

#include "../cpu/simd.h"
#define SFR_TARGET sfr::cpu::SFR_ISA
#define SFR_FN inline
#define SFR_BOTH inline

#elif defined(__CUDACC__) || defined(SFR_SIMT)

#include "../cuda/vector.cuh"
#define SFR_ON_GPU
#define SFR_TARGET sfr::cuda
#define SFR_FN SFR_DEVICE

#else

#define SFR_TARGET sfr::host
#define SFR_FN inline
#define SFR_BOTH inline

#endif

// Before a loop that is long already, or seldom run.
#if defined(__CUDACC__)
#define SFR_ROLLED _Pragma("unroll 1")
#else
#define SFR_ROLLED
#endif

// What is seldom looked at is not to take registers on a GPU.
#if defined(__CUDA_ARCH__)
#define SFR_IN_MEMORY(object) asm volatile("" ::"l"(&(object)) : "memory")
#else
#define SFR_IN_MEMORY(object)
#endif

// Of a lambda that is to be a part of its caller on a GPU, which knows there that parameters are constants, and where
// memory lies.
#if defined(SFR_ON_GPU)
#define SFR_INLINED __attribute__((always_inline))
#else
#define SFR_INLINED
#endif

#if !defined(SFR_ON_GPU)

namespace SFR_TARGET {

using Index = int64_t;

template <class T>
T sqrt_of(T x) {
  return T(__builtin_sqrt(double(x)));
}
template <class T>
T log2_of(T x) {
  return T(__builtin_log2(double(x)));
}
template <class T>
T exp2_of(T x) {
  return T(__builtin_exp2(double(x)));
}
template <class T>
T expm1_of(T x) {
  return T(__builtin_expm1(double(x)));
}

}  // namespace SFR_TARGET

#endif

namespace SFR_TARGET {

constexpr double ln2 = 0.69314718055994530942;

// What the rules have to know of a type.
template <class T>
struct Number;
template <>
struct Number<float> {
  static constexpr float epsilon = 1.1920929e-7f, smallest = 1.17549435e-38f, largest = 3.402823466e38f,
                         lowest = -1e30f;
  static constexpr float infinity = __builtin_huge_valf(), nan = __builtin_nanf("");
};
template <>
struct Number<double> {
  static constexpr double epsilon = 2.220446049250313e-16, smallest = 2.2250738585072014e-308;
  static constexpr double largest = 1.7976931348623157e308, lowest = -1e300;
  static constexpr double infinity = __builtin_huge_val(), nan = __builtin_nan("");
};

template <class T>
constexpr bool is_single = sizeof(T) == 4;

template <class T>
SFR_FN T magnitude(T x) {
  return x < 0 ? -x : x;
}

template <class T>
SFR_FN bool finite(T x) {
  return x - x == 0;
}

}  // namespace SFR_TARGET
