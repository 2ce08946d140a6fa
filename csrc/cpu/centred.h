// Squared distances by products: |x|^2 + |y|^2 - 2 x y of features less a common centre, which changes no distance. One
// operation a pair and channel where a difference takes two, which is worth it where both share a unit (dispatch.h).
// Gradients likewise: sum_j W_ij (x_i - y_j) is x_i sum_j W_ij - sum_j W_ij y_j.
//
// What is left of a sum after it cancels has few digits. A pair whose squared distance is below an eighth of
// |x|^2 + |y|^2, or that leaves the range of numbers, is summed again by differences, with the bits that it has without
// products. Of all others the error is about as small.
//
// The centre is the teacher's first pixel that takes part: what a pair comes to follows from its own features and that
// one, whatever patches of weight 0 are there besides.
#pragma once

#include <limits>

#include "pairwise.h"
#include "team.h"

namespace sfr::cpu::SFR_ISA {

// Channels below which a centre, and what follows the sums, take longer than products gain.
constexpr int64_t least_product_channels = 32;

// A panel less the first pixel of each row of `centre`, into `out`; either may be the panel itself.
template <class T>
void subtract_centre(const T* panel, int64_t ld, int64_t pixels, int64_t channels, const T* centre, int64_t ld_centre,
                     T* out, int64_t ld_out) {
  for (int64_t c = 0; c < channels; ++c) {
    const Vec<T> first = splat(centre[c * ld_centre]);
    for (int64_t p = 0; p < pixels; p += lanes<T>) store(out + c * ld_out + p, load(panel + c * ld + p) - first);
  }
}

// Where a pixel of x meets a vector of y.
struct Meeting {
  int32_t x, y;
};

// sums[k][:] (+)= sum_c (x - y)^2 at K meetings, whose sums wait for each other no more than those of a tile do.
template <int K, class T>
SFR_INLINE void meetings_tile(const Meeting* at, const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t channels,
                              T* sums, bool first) {
  Vec<T> sum[K] = {};
  for (int64_t c = 0; c < channels; ++c)
    for (int k = 0; k < K; ++k)
      add_pair<Pair::difference>(sum[k], splat(x[c * ldx + at[k].x]), load(y + c * ldy + at[k].y));
  for (int k = 0; k < K; ++k) {
    T* out = sums + k * lanes<T>;
    store(out, first ? sum[k] : load(out) + sum[k]);
  }
}
template <class T>
void sum_meetings(const Meeting* at, int64_t count, const T* x, int64_t ldx, const T* y, int64_t ldy, int64_t channels,
                  T* sums, bool first) {
  int64_t k = 0;
  for (; k + 6 <= count; k += 6) meetings_tile<6>(at + k, x, ldx, y, ldy, channels, sums + k * lanes<T>, first);
  for (; k < count; ++k) meetings_tile<1>(at + k, x, ldx, y, ldy, channels, sums + k * lanes<T>, first);
}

// Squared distances of one pixel of x, from its square and those of y, and the products.
template <class T>
SFR_INLINE Vec<T> from_products(T x_square, Vec<T> y_squares, Vec<T> products) {
  return (splat(x_square) + y_squares) - 2 * products;
}
// Lanes in which that tells too little.
template <class T>
SFR_INLINE Int<T> cancelled(T x_square, Vec<T> y_squares, Vec<T> squared) {
  constexpr T least = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
  const Vec<T> both = splat(x_square) + y_squares;
  return ~((squared >= both * T(0.125)) & (both >= least) & (both <= std::numeric_limits<T>::max()));
}

}  // namespace sfr::cpu::SFR_ISA
