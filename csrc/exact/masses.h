// Weights as whole numbers of one unit. Sums and differences of flows are then exact: none is lost in another, both
// sides run out together, and what should be empty is.
//
// Weights that are multiples of something (equal ones, counts, the same ones in another order) stay so, where the sums
// of both sides in a common unit are below 2^124. Others are rounded, each by itself to the rounding of a double, down
// to 2^-120 of the total.
#pragma once

#include <cmath>
#include <limits>

#include "../contracts/types.h"

namespace SFR_EXACT_NAMESPACE {

typedef __int128 Units;

template <class T>
constexpr T largest_weight = std::numeric_limits<T>::max();
template <class T>
constexpr T least_ratio = std::numeric_limits<T>::min();  // to the largest; less counts as 0

template <class T>
constexpr double last_digit = double(std::numeric_limits<T>::epsilon());

constexpr int most_bits = 120;  // of a side's sum

template <class Whole>
SFR_LANES Whole common_divisor(Whole x, Whole y) {
  while (y != 0) {
    const Whole rest = x % y;
    x = y;
    y = rest;
  }
  return x;
}

// x > 0 as mantissa 2^exponent, with an odd mantissa.
struct Odd {
  int64_t mantissa;
  int exponent;

  explicit SFR_LANES Odd(double x) {
    mantissa = int64_t(ldexp(frexp(x, &exponent), 53));
    exponent -= 53;
    for (int bits = 32; bits > 0; bits /= 2)
      if ((mantissa & ((int64_t(1) << bits) - 1)) == 0) mantissa >>= bits, exponent += bits;
  }
};

enum class Reading { sound, empty, bad };  // empty: all 0; bad: one is negative or not finite

struct Masses {
  int32_t* list = nullptr;
  const int32_t* kept = nullptr;  // indices of the weights above 0; null: all of them
  Units* units = nullptr;         // [count], and one more for what is left over
  int64_t count = 0;
  Units sum = 0;    // of units
  double unit = 1;  // in terms of the weights
  bool given = false;

  template <class Memory>
  SFR_ANYWHERE void reserve(Memory& memory, int64_t n) {
    list = memory.template take<int32_t>(n);
    units = memory.template take<Units>(n + 1);
  }

  SFR_LANES int64_t index(int64_t i) const { return kept ? kept[i] : i; }
  SFR_LANES bool equal() const { return sum == Units(count); }  // as read: in lowest terms

  template <class T>
  SFR_LANES Reading read(const Lanes& lanes, const WeightView& view, int64_t b, int64_t g, int64_t n) {
    count = n;
    sum = Units(n);
    unit = 1 / double(n);
    kept = nullptr;
    given = view.data != nullptr;
    if (!given) {
      lanes.each(n, [&](int64_t i) { units[i] = 1; });
      return Reading::sound;
    }
    int32_t found = 0;
    if (lanes.first)
      found =
          int32_t(gather(static_cast<const T*>(view.data) + b * view.stride_b + g * view.stride_g, view.stride_n, n));
    lanes.sync();
    count = lanes.of_first(count);
    sum = lanes.of_first(sum);
    unit = lanes.of_first(unit);
    if (count < n) kept = list;
    return Reading(lanes.of_first(found));
  }

  SFR_LANES void multiply(const Lanes& lanes, Units factor) {
    if (factor == 1) return;
    lanes.each(count, [&](int64_t i) { units[i] *= factor; });
    sum *= factor;
    unit /= double(factor);
  }

  // What rounding leaves over goes to the largest.
  SFR_LANES void round_to(const Lanes& lanes, Units total) {
    const double factor = double(total) / double(sum);
    if (lanes.first) {
      int64_t largest = 0;
      Units left = total;
      for (int64_t i = 0; i < count; ++i) {
        const Units whole = Units(rint(double(units[i]) * factor));
        units[i] = whole > 0 ? whole : 1;
        left -= units[i];
        if (units[i] > units[largest]) largest = i;
      }
      units[largest] += left;
    }
    lanes.sync();
    sum = total;
    unit /= factor;
  }

 private:
  template <class T>
  SFR_LANES Reading gather(const T* w, int64_t stride, int64_t n) {
    count = 0;
    T most = 0;
    for (int64_t i = 0; i < n; ++i) {
      const T weight = w[i * stride];
      if (!(weight >= 0 && weight <= largest_weight<T>)) return Reading::bad;
      most = weight > most ? weight : most;
    }
    if (most == 0) return Reading::empty;
    // The largest unit of which all are multiples.
    int64_t common = 0;
    int least = INT32_MAX;
    for (int64_t i = 0; i < n; ++i) {
      const T weight = w[i * stride];
      if (weight / most < least_ratio<T>) continue;
      const Odd odd{double(weight)};
      least = odd.exponent < least ? odd.exponent : least;
      common = common == 1 ? 1 : common_divisor(odd.mantissa, common);
      list[count++] = int32_t(i);
    }
    int top, bits = most_bits;
    frexp(double(most), &top);
    for (int64_t size = 1; size < count; size *= 2) --bits;
    if (top - least > bits) least = top - bits, common = 1;  // too small a unit
    sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const Units whole = Units(rint(ldexp(double(w[list[i] * stride]), -least)));
      units[i] = (whole > 0 ? whole : 1) / common;
      sum += units[i];
    }
    unit = ldexp(double(common), least);
    return Reading::sound;
  }
};

// Brings both sides to the same sum: their shares of it are what is transported.
SFR_LANES void balance(const Lanes& lanes, Masses& a, Masses& b) {
  const Units common = common_divisor(a.sum, b.sum), by_a = b.sum / common, by_b = a.sum / common;
  if (by_a <= (Units(1) << 124) / a.sum) {
    a.multiply(lanes, by_a);
    b.multiply(lanes, by_b);
  } else {
    a.round_to(lanes, Units(1) << most_bits);
    b.round_to(lanes, Units(1) << most_bits);
  }
  a.unit = b.unit = 1 / double(a.sum);
}

// Brings both sides to one unit where one of them, or both, keeps its own sum (`keep`), the other's being 1. A side
// that has to be shipped whole may exceed what the other one has by its rounding, `tolerance`.
SFR_LANES void measure(const Lanes& lanes, Masses& a, Masses& b, bool keep_a, bool keep_b, double tolerance) {
  if (!keep_a) a.unit = 1 / double(a.sum);
  if (!keep_b) b.unit = 1 / double(b.sum);
  // A unit is (odd 2^exponent) / parts.
  const bool a_whole = keep_a && a.given, b_whole = keep_b && b.given;
  const Odd of_a(a_whole ? a.unit : 1), of_b(b_whole ? b.unit : 1);
  const Units a_parts = a_whole ? 1 : a.sum, b_parts = b_whole ? 1 : b.sum;
  const double limit = 0x1p120;
  bool exact = double(of_a.mantissa) * double(b_parts) < limit && double(of_b.mantissa) * double(a_parts) < limit;
  if (exact) {
    Units by_a = of_a.mantissa * b_parts, by_b = of_b.mantissa * a_parts;
    const Units common = common_divisor(by_a, by_b);
    by_a /= common, by_b /= common;
    int exponent = of_a.exponent - of_b.exponent;
    for (; exponent > 0 && by_b % 2 == 0; --exponent) by_b /= 2;
    for (; exponent < 0 && by_a % 2 == 0; ++exponent) by_a /= 2;
    exact = ldexp(double(a.sum) * double(by_a), exponent > 0 ? exponent : 0) < limit &&
            ldexp(double(b.sum) * double(by_b), exponent < 0 ? -exponent : 0) < limit;
    if (exact) {
      a.multiply(lanes, exponent > 0 ? by_a << exponent : by_a);
      b.multiply(lanes, exponent < 0 ? by_b << -exponent : by_b);
    }
  }
  if (!exact) {
    const double a_mass = double(a.sum) * a.unit, b_mass = double(b.sum) * b.unit;
    const double unit = ldexp(a_mass > b_mass ? a_mass : b_mass, -most_bits);
    const auto whole = [&](double mass, int64_t count) {
      const Units units = Units(rint(mass / unit));
      return units > Units(count) ? units : Units(count);
    };
    a.round_to(lanes, whole(a_mass, a.count));
    b.round_to(lanes, whole(b_mass, b.count));
    a.unit = b.unit = unit;
  }
  const Units over = a.sum - b.sum;
  const bool within = fabs(double(over)) <= tolerance * double(a.sum);
  if (within && over > 0 && !keep_a) b.round_to(lanes, a.sum);
  if (within && over < 0 && !keep_b) a.round_to(lanes, b.sum);
}

}  // namespace SFR_EXACT_NAMESPACE
