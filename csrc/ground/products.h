// Squared distances by products: |x|^2 + |y|^2 - 2 x.y of features less a common centre, which changes no distance. One
// operation a pair and channel where a difference takes two, which is worth it where both share a unit. Gradients
// likewise: sum_j W_ij (x_i - y_j) is x_i sum_j W_ij - sum_j W_ij y_j.
//
// What is left of a sum after it cancels has few digits. A pair whose squared distance is below an eighth of
// |x|^2 + |y|^2, or that leaves the range of numbers, is summed again by differences. Of all others the error is about
// as small.
//
// The centre is the teacher's first pixel that takes part: what a pair comes to follows from its own features and that
// one, whatever patches of weight 0 are there besides. From there gradients know how far a pixel of the student is: as
// far as that patch.
//
// Included like metric.h, and after it.
#pragma once

#include <limits>

#include "../contracts/cost.h"

namespace SFR_GROUND_NAMESPACE {

// Channels below which a centre, and what follows the sums, take longer than products gain.
constexpr int64_t least_product_channels = 32;

// Whether they could be taken of these features, in float32.
inline bool may_take_products(const CostParams& p) {
  const bool squared = p.metric == Metric::l2 || p.metric == Metric::sqeuclidean;
  return p.patch == 1 && squared && p.C >= least_product_channels;
}

// The squared distance of two pixels, or of some.
template <class T, class Squares>
SFR_GROUND_INLINE Squares from_products(T x_square, Squares y_square, Squares product) {
  return (x_square + y_square) - 2 * product;
}
// Squares between which sums are right.
template <class T>
constexpr T least_square = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
template <class T>
constexpr T most_square = std::numeric_limits<T>::max();

// Whether (in which lanes) that tells enough.
template <class T, class Squares>
SFR_GROUND_INLINE auto is_told(T x_square, Squares y_square, Squares squared) {
  const Squares both = x_square + y_square;
  const auto enough = squared >= both * T(0.125), normal = both >= least_square<T>, finite = squared <= most_square<T>;
  return enough & normal & finite;
}

// A gradient's pair is near if its cost is below this share of the cost from the student's pixel to the centre: a
// quarter of the distance.
template <class T>
SFR_GROUND_INLINE T near_share(Metric metric) {
  return metric == Metric::sqeuclidean ? T(0.0625) : T(0.25);
}

}  // namespace SFR_GROUND_NAMESPACE
