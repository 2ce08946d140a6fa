// What distances and gradients by products take besides products, on a CPU: features less their centre, and pairs
// summed again (../ground/products.h). Where they are faster: dispatch.h.
#pragma once

#include "pairwise.h"
#include "team.h"

// After what it is made of.
#include "../ground/products.h"

namespace sfr::cpu::SFR_ISA {

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

}  // namespace sfr::cpu::SFR_ISA
