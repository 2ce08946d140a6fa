// Entropic optimal transport between the patches of two feature maps: cost.h and sinkhorn.h in one pass.
//
// The cost matrix of a problem lives in a workspace of the thread (or block) that solves it and is never
// written out, forward or backward. Shapes as in cost.h and sinkhorn.h. Saved for backward: x, y, a, b and
// sinkhorn.h's f, g, eps, centre; costs and plan are recomputed. The gradient of x sums over the groups in order.
#pragma once

#include "cost.h"
#include "sinkhorn.h"

namespace sfr {

#define SFR_EMD_FORWARD(FIELD, BASE) BASE(CostParams, problem) FIELD(Solve, solve, {})
struct EmdForwardParams : CostParams {
  SFR_DERIVED_FIELDS(EmdForwardParams, SFR_EMD_FORWARD)
};

// grad_x and grad_y, out, have the shapes of x and y. No data: not wanted.
#define SFR_EMD_BACKWARD(FIELD, BASE) \
  BASE(CostParams, problem)           \
  FIELD(SolveGrad, solve, {})         \
  FIELD(FeatureView, grad_x, {})      \
  FIELD(FeatureView, grad_y, {})
struct EmdBackwardParams : CostParams {
  SFR_DERIVED_FIELDS(EmdBackwardParams, SFR_EMD_BACKWARD)
};

}  // namespace sfr
