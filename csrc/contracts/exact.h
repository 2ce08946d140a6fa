// Exact optimal transport between two weighted sets of patches, one problem per cost matrix.
//
//     value = min <P, C>    over P >= 0, P 1 = a, P^T 1 = b
//           = max <a, f> + <b, g>    over f_i + g_j <= C_ij
//
//   cost      [B, G, N, M]   any strides, float16 | bfloat16 | float32 | float64
//   a         [B, G, N]      weights of the student's side, normalised here to sum to 1; 0 removes the patch
//   b         [B, G, M]      weights of the teacher's side
//   value     [B, G]         out
//   f, g      [B, G, N], [B, G, M]   out: an optimal pair of dual variables, shifted so that <a, f> = <b, g>; at a
//                            removed patch the largest value that keeps f_i + g_j <= C_ij for the kept j, which is
//                            the slope of the value there (0 where no such cost is finite)
//   rows, columns, mass   [B, G, N + M - 1]   out: an optimal plan, entry by entry: a vertex of the polytope has no
//                            more. Entries that are not used come last and are 0, 0, 0
//   n_iter    [B, G]         out: searches for a shortest path, or pivots
//   gap       [B, G]         out: <P, C> - <a, f> - <b, g> in float64, before rounding to the type of the outputs
//   error     [B, G]         out: |P 1 - a|_1 + |P^T 1 - b|_1, likewise
//
// Equal weights on equally many patches make an assignment problem: shortest augmenting paths (Jonker and Volgenant,
// 1987). Anything else is a transportation problem: the simplex method on spanning trees, with strongly feasible trees
// (Cunningham, 1976), so that it ends however degenerate the problem is. Potentials are float64. Masses are whole
// numbers, so that sums are exact, both sides have the same and every step empties something exactly.
//
// Optimal plans and dual variables need not be unique; which is found depends on the problem alone.
// Saved for backward: the plan, f, g. d value/dC = P, d value/da = f, d value/db = g, the latter two through the
// normalisation, and 0 at removed patches.
// A NaN, an Inf or a magnitude above 1e300 between kept patches gives NaN for its own problem alone.
#pragma once

#include "types.h"

namespace sfr {

struct ExactParams {
  int64_t B = 0, G = 0, N = 0, M = 0;
  DType compute = DType::float32;  // of weights, outputs and gradients
  WeightView a, b;
  int threads = 1;
};

struct ExactForwardParams : ExactParams {
  const void* cost = nullptr;
  DType cost_dtype = DType::float32;
  int64_t stride_b = 0, stride_g = 0, stride_n = 0, stride_m = 0;
  void *value = nullptr, *f = nullptr, *g = nullptr;
  int32_t *rows = nullptr, *columns = nullptr;
  void* mass = nullptr;
  int64_t* n_iter = nullptr;
  void *gap = nullptr, *error = nullptr;
};

struct ExactBackwardParams : ExactParams {
  const void *f = nullptr, *g = nullptr;  // as forward returned them
  const int32_t *rows = nullptr, *columns = nullptr;
  const void* mass = nullptr;
  const void* grad_value = nullptr;  // [B, G]
  void *grad_cost = nullptr, *grad_a = nullptr,
       *grad_b = nullptr;  // [B, G, N, M], [B, G, N], [B, G, M] out, contiguous; absent: not wanted
};

namespace cpu {
Status exact_forward(const ExactForwardParams&);
Status exact_backward(const ExactBackwardParams&);
}  // namespace cpu

}  // namespace sfr
