// Entropic optimal transport between the patches of two feature maps: cost.h and sinkhorn.h in one pass.
//
// The cost matrix of a problem lives in a workspace of the thread (or block) that solves it and is never
// written out, forward or backward. Shapes as in cost.h and sinkhorn.h. Saved for backward: x, y, a, b and
// sinkhorn.h's f, g, eps, mean; costs and plan are recomputed. The gradient of x sums over the groups in order.
#pragma once

#include "cost.h"
#include "sinkhorn.h"

namespace sfr {

struct EmdForwardParams : CostParams {
  Solve solve;
};

struct EmdBackwardParams : CostParams {
  SolveGrad solve;
  FeatureView grad_x, grad_y;  // out, shapes of x and y; no data: not wanted
};

namespace cpu {
Status emd_forward(const EmdForwardParams&);
Status emd_backward(const EmdBackwardParams&);
}  // namespace cpu

}  // namespace sfr
