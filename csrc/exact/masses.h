// Weights as whole numbers of one unit, with the same sum on both sides. Sums and differences of flows are then exact:
// none is lost in another, both sides run out together, and what should be empty is.
//
// Weights that are multiples of something (equal ones, counts, the same ones in another order) stay so, where their
// least common total is below 2^62. Others are rounded to multiples of 2^-60 of the total.
#pragma once

#include <cmath>
#include <limits>

#include "../contracts/types.h"

namespace SFR_EXACT_NAMESPACE {

template <class T>
constexpr T largest_weight = std::numeric_limits<T>::max();
template <class T>
constexpr T least_ratio = std::numeric_limits<T>::min();  // to the largest; less counts as 0

SFR_LANES int64_t common_divisor(int64_t x, int64_t y) {
  while (y != 0) {
    const int64_t rest = x % y;
    x = y;
    y = rest;
  }
  return x;
}

struct Masses {
  int32_t* list = nullptr;
  const int32_t* kept = nullptr;  // indices of the weights above 0; null: all of them
  int64_t* units = nullptr;       // [count]
  int64_t count = 0;
  int64_t sum = 0;  // of units

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t n) {
    list = memory.template take<int32_t>(n);
    units = memory.template take<int64_t>(n);
  }

  SFR_LANES int64_t index(int64_t i) const { return kept ? kept[i] : i; }
  SFR_LANES bool equal() const { return sum == count; }  // as read: in lowest terms

  // False: a weight is negative or not finite, or none is above 0.
  template <class T>
  SFR_LANES bool read(const Lanes& lanes, const WeightView& view, int64_t b, int64_t g, int64_t n) {
    count = sum = n;
    kept = nullptr;
    if (!view.data) {
      lanes.each(n, [&](int64_t i) { units[i] = 1; });
      return true;
    }
    if (lanes.first) gather(static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g, view.stride_n, n);
    lanes.sync();
    count = lanes.of_first(count);
    sum = lanes.of_first(sum);
    if (count < n) kept = list;
    return count > 0;
  }

  SFR_LANES void multiply(const Lanes& lanes, int64_t factor) {
    lanes.each(count, [&](int64_t i) { units[i] *= factor; });
    sum *= factor;
  }

  // What rounding leaves over goes to the largest.
  SFR_LANES void round_to(const Lanes& lanes, int64_t total) {
    if (lanes.first) {
      const double factor = double(total) / double(sum);
      int64_t largest = 0, left = total;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t whole = llrint(double(units[i]) * factor);
        units[i] = whole > 0 ? whole : 1;
        left -= units[i];
        if (units[i] > units[largest]) largest = i;
      }
      units[largest] += left;
    }
    lanes.sync();
    sum = total;
  }

 private:
  template <class T>
  SFR_LANES void gather(const T* w, int64_t stride, int64_t n) {
    count = 0;
    T most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T weight = w[i * stride];
      if (!(weight >= 0 && weight <= largest_weight<T>)) return;
      most = weight > most ? weight : most;
    }
    if (most == 0) return;
    // The largest weight gets as many bits as leave the sum below 2^62.
    int exponent, bits = 62;
    frexp(double(most), &exponent);
    for (int64_t size = 1; size < n; size *= 2) --bits;
    int64_t common = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T weight = w[i * stride];
      if (weight / most < least_ratio<T>) continue;
      const int64_t whole = llrint(ldexp(double(weight), bits - exponent));
      units[count] = whole > 0 ? whole : 1;
      common = common == 1 ? 1 : common_divisor(common, units[count]);
      list[count++] = int32_t(i);
    }
    sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += units[i] /= common;
  }
};

// Brings both sides to the same sum.
SFR_LANES void balance(const Lanes& lanes, Masses& a, Masses& b) {
  const int64_t common = common_divisor(a.sum, b.sum), by_a = b.sum / common, by_b = a.sum / common;
  if (by_a <= (int64_t(1) << 62) / a.sum) {
    a.multiply(lanes, by_a);
    b.multiply(lanes, by_b);
  } else {
    a.round_to(lanes, int64_t(1) << 60);
    b.round_to(lanes, int64_t(1) << 60);
  }
}

}  // namespace SFR_EXACT_NAMESPACE
