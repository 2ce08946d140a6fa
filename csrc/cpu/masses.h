// Weights as whole numbers of one unit, with the same sum on both sides. Sums and differences of flows are then exact:
// none is lost in another, both sides run out together, and what should be empty is.
//
// Weights that are multiples of something (equal ones, counts, the same ones in another order) stay so, where their
// least common total is below 2^62. Others are rounded to multiples of 2^-60 of the total.
#pragma once

#include <cmath>
#include <limits>
#include <numeric>

#include "../types.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

struct Masses {
  int32_t* list = nullptr;
  const int32_t* kept = nullptr;  // indices of the weights above 0; null: all of them
  int64_t* units = nullptr;       // [count]
  int64_t count = 0, all = 0;
  int64_t sum = 0;  // of units

  void reserve(Arena& arena, int64_t n) {
    list = arena.take<int32_t>(n);
    units = arena.take<int64_t>(n);
  }

  int64_t index(int64_t i) const { return kept ? kept[i] : i; }
  bool equal() const { return sum == count; }  // as read: in lowest terms

  template <class T>
  void read(const WeightView& view, int64_t b, int64_t g, int64_t n) {
    all = count = n;
    kept = nullptr;
    if (!view.data) {
      for (int64_t i = 0; i < n; ++i) units[i] = 1;
      sum = n;
      return;
    }
    const T* w = static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g;
    T most = 0;
    for (int64_t i = 0; i < n; ++i) most = w[i * view.stride_n] > most ? w[i * view.stride_n] : most;
    // The largest weight gets as many bits as leave the sum below 2^62.
    int exponent, bits = 62;
    std::frexp(double(most), &exponent);
    for (int64_t size = 1; size < n; size *= 2) --bits;
    count = 0;
    int64_t common = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T weight = w[i * view.stride_n];
      if (weight / most < std::numeric_limits<T>::min()) continue;
      const int64_t whole = std::llrint(std::ldexp(double(weight), bits - exponent));
      units[count] = whole > 0 ? whole : 1;
      common = common == 1 ? 1 : std::gcd(common, units[count]);
      list[count++] = int32_t(i);
    }
    if (count < n) kept = list;
    sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += units[i] /= common;
  }

  void multiply(int64_t factor) {
    for (int64_t i = 0; i < count; ++i) units[i] *= factor;
    sum *= factor;
  }

  // What rounding leaves over goes to the largest.
  void round_to(int64_t total) {
    const double factor = double(total) / double(sum);
    int64_t largest = 0, left = total;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t whole = std::llrint(double(units[i]) * factor);
      units[i] = whole > 0 ? whole : 1;
      left -= units[i];
      if (units[i] > units[largest]) largest = i;
    }
    units[largest] += left;
    sum = total;
  }
};

// Brings both sides to the same sum.
inline void balance(Masses& a, Masses& b) {
  const int64_t common = std::gcd(a.sum, b.sum), by_a = b.sum / common, by_b = a.sum / common;
  if (by_a <= (int64_t(1) << 62) / a.sum) {
    a.multiply(by_a);
    b.multiply(by_b);
  } else {
    a.round_to(int64_t(1) << 60);
    b.round_to(int64_t(1) << 60);
  }
}

}  // namespace sfr::cpu::SFR_ISA
