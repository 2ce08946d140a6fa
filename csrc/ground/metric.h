// What a metric is, once for both devices: what is summed over the channels of a pair of pixels (and over the pixels of
// a pair of patches), how a cost follows from that sum, and the way back. Numbers are scalars or vectors of them.
//
// Included after SFR_GROUND_NAMESPACE, SFR_GROUND_INLINE and, in that namespace, sqrt_of(T) and ratio(T, T), x / y.
#pragma once

#include "../contracts/types.h"

namespace SFR_GROUND_NAMESPACE {

enum class Pair {
  difference,  // (x - y)^2
  product,     // x y
  absolute,    // |x - y|
};

SFR_GROUND_INLINE constexpr Pair pair_of(Metric metric) {
  return metric == Metric::cosine ? Pair::product : metric == Metric::l1 ? Pair::absolute : Pair::difference;
}

// The gradient of a pair's x, from the weight of the pair, is add_pull; products have a share of x itself besides.
template <Pair pair, class T>
SFR_GROUND_INLINE void add_pair(T& sum, T x, T y) {
  if constexpr (pair == Pair::difference) {
    const T d = x - y;
    sum += d * d;
  } else if constexpr (pair == Pair::absolute) {
    const T d = x - y;
    sum += d < 0 ? -d : d;
  } else {
    sum += x * y;
  }
}
template <Pair pair, class T>
SFR_GROUND_INLINE void add_pull(T& sum, T weight, T x, T y) {
  if constexpr (pair == Pair::difference) {
    sum += weight * (x - y);
  } else if constexpr (pair == Pair::absolute) {
    const T d = x - y;
    sum += d > 0 ? weight : d < 0 ? -weight : weight * d;  // 0 for 0, NaN for NaN
  } else {
    sum -= weight * y;
  }
}

// scaled(v) is v / (|x| |y|), and 0 where one of them is 0: what products want.
template <Metric metric, class T, class Scaled>
SFR_GROUND_INLINE T cost_of(T sum, Scaled&& scaled) {
  if constexpr (metric == Metric::l2) {
    return sqrt_of(sum);
  } else if constexpr (metric == Metric::cosine) {
    const T c = 1 - scaled(sum);
    return c < 0 ? T(0) : c;
  } else {
    static_assert(metric == Metric::sqeuclidean || metric == Metric::l1, "the cost of this metric");
    return sum;
  }
}
// From the gradient of a cost to the weight of its pair: NaN for a cost that is no number, so that all channels of both
// patches are NaN, but 0 for a gradient of 0, whatever the cost.
template <Metric metric, class T, class Scaled>
SFR_GROUND_INLINE T weight_of(T grad, T cost, Scaled&& scaled) {
  const auto of_finite = [&] {
    if constexpr (metric == Metric::l2) {
      return cost == 0 ? T(0) : ratio(grad, cost);
    } else if constexpr (metric == Metric::sqeuclidean) {
      return 2 * grad;
    } else if constexpr (metric == Metric::cosine) {
      return scaled(grad);
    } else {
      static_assert(metric == Metric::l1, "the gradient of this metric");
      return grad;
    }
  };
  return grad == 0 ? T(0) : of_finite() + (cost - cost);
}
// Cosine: what a pair adds to the own coefficients of its patches, from the gradient of its cost, is their product.
template <class T>
SFR_GROUND_INLINE T alike_of(T grad, T cost) {
  return grad == 0 ? T(0) : 1 - cost;
}

// Calls f with a number that is known to the compiler as f's argument::value.
template <class Choice, Choice choice>
struct Known {
  static constexpr Choice value = choice;
};
template <class F>
SFR_GROUND_INLINE void with_metric(Metric metric, F&& f) {
  switch (metric) {
#define SFR_CASE(name) \
  case Metric::name:   \
    return f(Known<Metric, Metric::name>{});
    SFR_METRICS(SFR_CASE)
#undef SFR_CASE
  }
}
template <class F>
SFR_GROUND_INLINE void with_pair(Pair pair, F&& f) {
  switch (pair) {
    case Pair::difference:
      return f(Known<Pair, Pair::difference>{});
    case Pair::product:
      return f(Known<Pair, Pair::product>{});
    case Pair::absolute:
      return f(Known<Pair, Pair::absolute>{});
  }
}

}  // namespace SFR_GROUND_NAMESPACE
