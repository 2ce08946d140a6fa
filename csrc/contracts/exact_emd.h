// Exact optimal transport between the patches of two feature maps: cost.h and exact.h in one pass, on a CPU.
//
// The costs of a problem live in the workspace of the thread that solves it and are never written out. Patches are
// single pixels, and the metric is not the cosine. Shapes as in cost.h and exact.h. Saved for backward: x, y, a, b and
// what exact.h saves; only the distances that the plan uses are computed again. The gradient of x sums over the groups
// in order.
#pragma once

#include "cost.h"
#include "exact.h"

namespace sfr {

#define SFR_EXACT_EMD_FORWARD(FIELD, BASE) \
  BASE(CostParams, problem)                \
  FIELD(WeightView, a, {})                 \
  FIELD(WeightView, b, {})                 \
  FIELD(ExactOptions, options, {})         \
  FIELD(ExactSolved, solved, {})
struct ExactEmdForwardParams : CostParams {
  SFR_DERIVED_FIELDS(ExactEmdForwardParams, SFR_EXACT_EMD_FORWARD)
};

// grad_x and grad_y, out, have the shapes of x and y. No data: not wanted. grad_a and grad_b as in exact.h.
#define SFR_EXACT_EMD_BACKWARD(FIELD, BASE) \
  BASE(CostParams, problem)                 \
  FIELD(WeightView, a, {})                  \
  FIELD(WeightView, b, {})                  \
  FIELD(ExactOptions, options, {})          \
  FIELD(ExactSaved, saved, {})              \
  FIELD(const void*, grad_value, nullptr)   \
  FIELD(FeatureView, grad_x, {})            \
  FIELD(FeatureView, grad_y, {})            \
  FIELD(void*, grad_a, nullptr)             \
  FIELD(void*, grad_b, nullptr)
struct ExactEmdBackwardParams : CostParams {
  SFR_DERIVED_FIELDS(ExactEmdBackwardParams, SFR_EXACT_EMD_BACKWARD)
};

}  // namespace sfr
