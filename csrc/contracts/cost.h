// Ground cost between the patches of two feature maps, for a batch of pairs.
//
//     C[b, g, i, j] = metric(x[b, patch i], y[b, g, patch j])
//
//   x      [B, 1, C, H, W]     student, any strides, float16 | bfloat16 | float32 | float64
//   y      [B, G, C, H', W']   teacher, G channel groups against one student
//   cost   [B, G, N, M]        out, contiguous
//
// A patch is the patch x patch neighbourhood that F.unfold would cut (valid windows), so
// N = (H - patch + 1)(W - patch + 1), M likewise. Squared differences and products of patches are sums of
// those of pixels along the diagonal of offsets: nothing is ever unfolded.
//
// l2 and sqeuclidean come from direct differences, forward and backward; or from |x|^2 + |y|^2 - 2 x.y of float32
// features less a centre, but for pairs in which that cancels (../ground/products.h): on a GPU, and on some CPUs. Saved
// for backward: x, y and the cost itself, which is the output. Sums in float32 (float64 if either input is float64), in
// an order fixed by the shapes.
#pragma once

#include "types.h"

namespace sfr {

// `compute` is the accumulator, and type of the cost: float32 | float64.
#define SFR_COST_PARAMS(FIELD)          \
  FIELD(int64_t, B, 0)                  \
  FIELD(int64_t, G, 0)                  \
  FIELD(int64_t, C, 0)                  \
  FIELD(int64_t, patch, 1)              \
  FIELD(Metric, metric, Metric::l2)     \
  FIELD(DType, compute, DType::float32) \
  FIELD(FeatureView, x, {})             \
  FIELD(FeatureView, y, {})             \
  FIELD(int, threads, 1)
struct CostParams {
  SFR_FIELDS(CostParams, SFR_COST_PARAMS)

  int64_t N() const { return (x.H - patch + 1) * (x.W - patch + 1); }
  int64_t M() const { return (y.H - patch + 1) * (y.W - patch + 1); }
};

#define SFR_COST_FORWARD(FIELD, BASE) BASE(CostParams, problem) FIELD(void*, cost, nullptr)  // [B, G, N, M] out
struct CostForwardParams : CostParams {
  SFR_DERIVED_FIELDS(CostForwardParams, SFR_COST_FORWARD)
};

// A pair whose grad_cost is 0 adds nothing, whatever its patches hold. Any other whose cost is not finite makes the
// gradients of both its patches NaN, in all channels.
//
// cost as forward returned it and grad_cost are contiguous; grad_x and grad_y, out, have the shapes of x and y.
// No data: not wanted.
#define SFR_COST_BACKWARD(FIELD, BASE)   \
  BASE(CostParams, problem)              \
  FIELD(const void*, cost, nullptr)      \
  FIELD(const void*, grad_cost, nullptr) \
  FIELD(FeatureView, grad_x, {})         \
  FIELD(FeatureView, grad_y, {})
struct CostBackwardParams : CostParams {
  SFR_DERIVED_FIELDS(CostBackwardParams, SFR_COST_BACKWARD)
};

}  // namespace sfr
