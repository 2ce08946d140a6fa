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
// l2 and sqeuclidean come from direct differences (a product |x|^2 + |y|^2 - 2 x.y cancels), forward and
// backward. Saved for backward: x, y and the cost itself, which is the output.
// Sums in float32 (float64 if either input is float64), in an order fixed by the shapes.
#pragma once

#include "types.h"

namespace sfr {

struct CostParams {
  int64_t B = 0, G = 0, C = 0;
  int64_t patch = 1;
  Metric metric = Metric::l2;
  DType compute = DType::float32;  // float32 | float64: accumulator, and type of the cost
  FeatureView x, y;
  int threads = 1;

  int64_t N() const { return (x.H - patch + 1) * (x.W - patch + 1); }
  int64_t M() const { return (y.H - patch + 1) * (y.W - patch + 1); }
};

struct CostForwardParams : CostParams {
  void* cost = nullptr;  // [B, G, N, M] out
};

struct CostBackwardParams : CostParams {
  const void* cost = nullptr;       // [B, G, N, M] as forward returned it
  const void* grad_cost = nullptr;  // [B, G, N, M] contiguous
  FeatureView grad_x, grad_y;       // out, shapes of x and y; no data: not wanted
};

namespace cpu {
Status cost_forward(const CostForwardParams&);  // always ok
Status cost_backward(const CostBackwardParams&);
}  // namespace cpu

}  // namespace sfr
