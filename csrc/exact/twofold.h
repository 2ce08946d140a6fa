// Numbers in two parts, the second below the rounding of the first: twice the digits of a double, by sums whose error
// is known (Dekker, 1971; Knuth).
#pragma once

namespace SFR_EXACT_NAMESPACE {

struct Twofold {
  double high = 0, low = 0;
};

// x + y, and what it lost.
SFR_LANES Twofold sum_of(double x, double y) {
  const double sum = x + y, part = sum - x;
  return {sum, (x - (sum - part)) + (y - part)};
}

SFR_LANES Twofold operator+(Twofold x, Twofold y) {
  const Twofold sum = sum_of(x.high, y.high);
  return sum_of(sum.high, sum.low + (x.low + y.low));
}
SFR_LANES Twofold operator-(Twofold x) {
  return {-x.high, -x.low};
}

// cost - v - u in twice the digits, rounded once; NaN where the cost is infinite. Of numbers or vectors of them.
template <class V>
SFR_LANES V reduced(V cost, V v, V v_low, V minus_u, double minus_u_low) {
  const V x = cost - v, part = x - cost, lost = (cost - (x - part)) - (v + part);
  const V y = x + minus_u, piece = y - x, gone = (x - (y - piece)) + (minus_u - piece);
  return y + (gone + (lost + (minus_u_low - v_low)));
}

}  // namespace SFR_EXACT_NAMESPACE
