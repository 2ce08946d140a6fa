// The solver's vectors on a GPU: one entry in each thread. The names of csrc/cpu/simd.h, so that rules that are written
// for both devices (csrc/solver) read the same.
#pragma once

#include "device.cuh"

#define SFR_INLINE SFR_DEVICE

namespace sfr::cuda {

using Index = int;

template <class T>
using Vec = T;

template <class T>
SFR_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
SFR_DEVICE void store(T* p, T x) {
  *p = x;
}
template <class T>
SFR_DEVICE T splat(T x) {
  return x;
}
template <class T>
SFR_DEVICE T vabs(T x) {
  return x < 0 ? -x : x;
}
template <class T>
SFR_DEVICE T vmax(T x, T y) {
  return x > y ? x : y;
}
template <class T>
SFR_DEVICE T vsqrt(T x) {
  return sqrt_of(x);
}
// By name with its type, as on a CPU; of the functions of device.cuh, those that are no templates come first.
template <class T>
SFR_DEVICE T quotient(T x, T y) {
  return quotient(x, y);
}
template <class T>
SFR_DEVICE T exp2(T x) {
  return exp2_of(x);
}
template <class T>
SFR_DEVICE T log2(T x) {
  return log2_of(x);
}

}  // namespace sfr::cuda
