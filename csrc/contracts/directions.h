// Feature maps on a coarser grid, as directions: what self-feature regularisation compares. On a CPU.
//
//     p[b, g, c, i]  the mean of x over block i, of H / h by W / w pixels
//     s[b, g, i]     sum_c p^2
//     d[b, g, c, i]  p / sqrt(max(s, floor)),   floor = (mean_i sqrt(s) / 1000)^2, the least normal number at least
//
//   x         [B, G, C, H, W]   neighbours in a row beside each other, float32 | float64
//   d         [B, G, C, h, w]   out, contiguous; h and w divide H and W
//   inverse   [B, G, h, w]      out: 1 / sqrt(max(s, floor)), negative where that is the floor
//
// Backward takes the floor for a constant. Saved for it: d, inverse. A NaN makes its map NaN.
#pragma once

#include "types.h"

namespace sfr {

#define SFR_DIRECTIONS_PARAMS(FIELD)    \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, C, 0)                  \
  FIELD(int64_t, h, 0)                  \
  FIELD(int64_t, w, 0)                  \
  FIELD(DType, compute, DType::float32) \
  FIELD(FeatureView, x, {})             \
  FIELD(int, threads, 1)
struct DirectionsParams {
  SFR_FIELDS(DirectionsParams, SFR_DIRECTIONS_PARAMS)
};

#define SFR_DIRECTIONS_FORWARD(FIELD, BASE) \
  BASE(DirectionsParams, problem)           \
  FIELD(void*, directions, nullptr)         \
  FIELD(void*, inverse, nullptr)
struct DirectionsForwardParams : DirectionsParams {
  SFR_DERIVED_FIELDS(DirectionsForwardParams, SFR_DIRECTIONS_FORWARD)
};

// x is where the gradient goes, out; `grad` is contiguous.
#define SFR_DIRECTIONS_BACKWARD(FIELD, BASE) \
  BASE(DirectionsParams, problem)            \
  FIELD(const void*, directions, nullptr)    \
  FIELD(const void*, inverse, nullptr)       \
  FIELD(const void*, grad, nullptr)
struct DirectionsBackwardParams : DirectionsParams {
  SFR_DERIVED_FIELDS(DirectionsBackwardParams, SFR_DIRECTIONS_BACKWARD)
};

}  // namespace sfr
