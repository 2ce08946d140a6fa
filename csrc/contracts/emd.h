// Entropic optimal transport between the patches of two feature maps: cost.h and sinkhorn.h in one pass.
//
// The cost matrix of a problem lives in a workspace of the thread (or block) that solves it. Shapes as in cost.h and
// sinkhorn.h. Saved for backward: x, y, a, b and sinkhorn.h's f, g, eps, centre, shift. The plan is recomputed, and so
// are the costs unless they were kept, which changes no bit. The gradient of x sums over the groups in order.
//
//   cost  [B, G, N, M]   contiguous, of the accumulator type; no data: not kept. Out in forward, or in where they are
//                        known from another forward of the same features and weights; in, in backward. What it
//                        holds of patches that are removed is the device's own matter
#pragma once

#include "cost.h"
#include "sinkhorn.h"

namespace sfr {

#define SFR_EMD_FORWARD(FIELD, BASE) \
  BASE(CostParams, problem)          \
  FIELD(Solve, solve, {})            \
  FIELD(void*, cost, nullptr)        \
  FIELD(bool, known, false)
struct EmdForwardParams : CostParams {
  SFR_DERIVED_FIELDS(EmdForwardParams, SFR_EMD_FORWARD)
};

// grad_x and grad_y, out, have the shapes of x and y. No data: not wanted.
#define SFR_EMD_BACKWARD(FIELD, BASE) \
  BASE(CostParams, problem)           \
  FIELD(SolveGrad, solve, {})         \
  FIELD(const void*, cost, nullptr)   \
  FIELD(FeatureView, grad_x, {})      \
  FIELD(FeatureView, grad_y, {})
struct EmdBackwardParams : CostParams {
  SFR_DERIVED_FIELDS(EmdBackwardParams, SFR_EMD_BACKWARD)
};

}  // namespace sfr
